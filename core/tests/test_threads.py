"""Work in pieces: all of it once, on the threads asked for, errors included."""

from __future__ import annotations

import os
import threading

import pytest
import torch
from attnmap_core.threads import in_pieces


@pytest.mark.parametrize("count", [0, 1, 2, 7])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_every_item_is_done_once(count, threads):
    done = []
    in_pieces(lambda start, stop: done.extend(range(start, stop)), count, threads)
    assert sorted(done) == list(range(count))


def test_pieces_run_at_the_same_time():
    together = threading.Barrier(3, timeout=30)  # breaks unless three wait at once
    in_pieces(lambda start, stop: together.wait(), 3, threads=3)


def test_threads_are_as_many_as_pytorch_uses():
    seen = []
    in_pieces(lambda start, stop: seen.append((start, stop)), 100)
    assert len(seen) == min(torch.get_num_threads(), 100)


@pytest.mark.parametrize("bad", [0, 2])
def test_an_error_comes_out_once_all_pieces_have_ended(bad):
    ended = []

    def work(start: int, stop: int) -> None:
        if start == bad:
            raise KeyError(start)
        ended.append(start)

    with pytest.raises(KeyError, match=str(bad)):
        in_pieces(work, 3, threads=3)
    assert len(ended) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_process_has_a_pool_of_its_own():
    in_pieces(lambda start, stop: None, 2, threads=2)
    child = os.fork()
    if child == 0:
        done = []
        in_pieces(lambda start, stop: done.append(start), 2, threads=2)
        os._exit(0 if len(done) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0
