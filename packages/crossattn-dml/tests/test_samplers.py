"""Batches by class: what each holds, that epochs and processes agree, and what cannot be drawn."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from attnmap_core.data.loaders import TrainBatches
from attnmap_core.errors import InputError
from crossattn_dml.samplers import Balanced, MPerClass, make_sampler
from hypothesis import given, settings
from hypothesis import strategies as st


def batches(sampler, epoch: int = 0) -> np.ndarray:
    return np.array(sampler(epoch)).reshape(-1, sampler.batch_size)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 9), min_size=4, max_size=12),
    per_class=st.integers(2, 3),
    classes=st.integers(1, 4),
    epoch=st.integers(0, 3),
    kind=st.sampled_from(["m_per_class", "balanced"]),
)
def test_every_batch_has_groups_of_one_class(sizes, per_class, classes, epoch, kind):
    labels = np.repeat(np.arange(len(sizes)) * 7 + 2**24, sizes)
    size = per_class * classes
    if size > len(labels):
        return
    sampler = make_sampler(kind, labels, size, per_class=per_class, seed=3)
    assert sampler is not None
    assert len(sampler) == len(labels) // size * size
    found = labels[batches(sampler, epoch)].reshape(-1, classes, per_class)
    assert (found == found[:, :, :1]).all()
    assert sampler(epoch) == make_sampler(kind, labels, size, per_class=per_class, seed=3)(epoch)
    if kind == "balanced":
        assert all(len(set(row)) == classes for row in found[:, :, 0].tolist())


def test_balanced_takes_classes_equally_often_and_no_image_twice_in_a_batch():
    labels = np.repeat(np.arange(6), [4, 4, 4, 4, 40, 40])
    sampler = Balanced(labels, 12, per_class=4, seed=1)
    found = batches(sampler)
    assert all(len(set(row)) == 12 for row in found.tolist())
    counts = Counter(labels[found].ravel().tolist())
    assert max(counts.values()) - min(counts.values()) <= 4  # one draw of a class
    # Within a class every image comes before one comes again.
    large = [place for place in found.ravel().tolist() if labels[place] == 5]
    assert len(set(large[: len(large) // 1])) == len(large) <= 40


def test_m_per_class_draws_as_described():
    labels = np.repeat(np.arange(3), [2, 50, 50])
    found = batches(MPerClass(labels, 30, per_class=2, seed=0), 0)
    counts = Counter(labels[found].ravel().tolist())
    assert counts[0] > 12  # of 90: classes alike, however few images they have
    assert any(len(set(row)) < 30 for row in found.tolist())  # with replacement


def test_epochs_and_seeds_differ():
    labels = np.repeat(np.arange(8), 6)
    for kind in (MPerClass, Balanced):
        assert kind(labels, 8, seed=0)(0) != kind(labels, 8, seed=0)(1)
        assert kind(labels, 8, seed=0)(0) != kind(labels, 8, seed=1)(0)


@pytest.mark.parametrize("kind", [MPerClass, Balanced])
def test_two_processes_see_the_batches_of_one_and_resume_in_them(kind):
    labels = np.repeat(np.arange(8), 6)
    order = kind(labels, 16, per_class=2, seed=5)
    one = TrainBatches(48, 16, order=order)
    two = [TrainBatches(48, 8, processes=2, process=p, order=order) for p in (0, 1)]
    for epoch in (0, 2):
        for batch in (one, *two):
            batch.set_epoch(epoch)
        together = [[d.index for d in a + b] for a, b in zip(*two)]
        assert together == [[d.index for d in batch] for batch in one]
        for group in together:  # the piece of each process has whole classes
            assert (labels[group].reshape(-1, 2) == labels[group].reshape(-1, 2)[:, :1]).all()
        whole = list(one)
        one.start_at(2)
        assert list(one) == whole[2:]


def test_a_class_with_one_image_is_left_out_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        sampler = MPerClass([0, 0, 1, 2, 2], 4)
    assert "1 of 3 classes have a single image" in caplog.text
    assert 2 not in sampler(0)


@pytest.mark.parametrize(
    ("kind", "labels", "size", "per_class", "message"),
    [
        ("m_per_class", [0, 0, 1, 1], 3, 2, "per_class 2: expected 2 or more, and a divisor of 3"),
        ("m_per_class", [0, 0, 1, 1], 4, 1, "per_class 1: expected 2 or more"),
        ("m_per_class", [0, 0, 1, 1], 6, 2, "batch_size 6: expected at most 4"),
        ("balanced", [0] * 9 + [1] * 9, 8, 2, "takes 4 classes with 2 images each, the data have 2"),
        ("m_per_class", [0, 1, 2], 2, 2, "no class has two images among 3"),
        ("other", [0, 0], 2, 2, "sampler other: expected m_per_class, balanced or random"),
    ],
)
def test_what_cannot_be_drawn(kind, labels, size, per_class, message):
    with pytest.raises(InputError, match=message):
        make_sampler(kind, labels, size, per_class=per_class)


def test_a_class_smaller_than_its_group_fills_it_with_repeats():
    labels = np.array([0, 0, 1, 1, 1, 1])
    sampler = Balanced(labels, 6, per_class=3, seed=0)
    [batch] = batches(sampler)
    counts = Counter(batch.tolist())
    assert sorted(counts[place] for place in (0, 1)) == [1, 2]
    assert len(set(batch[labels[batch] == 1].tolist())) == 3
