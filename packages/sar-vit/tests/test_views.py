"""Views of MoCo-v3 and DINO: their sizes, their probabilities, and where their randomness comes from."""

from __future__ import annotations

import pickle
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from attnmap_core.data.loaders import Draw, SampleDataset, collate
from attnmap_core.errors import InputError
from PIL import Image, ImageFilter
from sar_vit.views import Blur, dino_views, mocov3_views
from torchvision.transforms import InterpolationMode

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture
def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1))


@pytest.mark.parametrize(
    ("views", "sizes"),
    [
        (mocov3_views(24), [24, 24]),
        (dino_views(32, 16, 3), [32, 32, 16, 16, 16]),
        (dino_views(32, 16, 0), [32, 32]),
    ],
)
def test_sizes_and_seeds(photo, views, sizes):
    items = SampleDataset(
        [SimpleNamespace(image=photo, label=2)] * 2, pickle.loads(pickle.dumps(views)), seed=26
    )
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    first, again, other = items[Draw(0, 0)]["image"], items[Draw(0, 0)]["image"], items[Draw(1, 0)]["image"]
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # noqa: NPY002
    assert torch.equal(states[2], torch.get_rng_state())
    assert [tuple(view.shape) for view in first] == [(3, size, size) for size in sizes]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not any(torch.equal(a, b) for a, b in zip(first, other))
    assert all(not torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape)
    batch = collate([items[Draw(0, 0)], items[Draw(0, 1)]])
    assert [tuple(view.shape) for view in batch["images"]] == [(2, 3, size, size) for size in sizes]


def test_normalised(photo):
    torch.manual_seed(3)
    plain = mocov3_views(24, **PLAIN)(photo)
    torch.manual_seed(3)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    for view, expected in zip(mocov3_views(24, mean=mean, std=std)(photo), plain):
        assert expected.min() >= 0
        assert expected.max() <= 1
        expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        torch.testing.assert_close(view, expected)


@pytest.mark.parametrize("views", [mocov3_views(8, **PLAIN), dino_views(8, 8, 1, **PLAIN)])
def test_second_view_alone_is_solarised_in_a_fifth(views):
    """White stays above a half under all but solarisation, which turns it dark."""
    torch.manual_seed(0)
    white = Image.new("RGB", (12, 12), "white")
    dark = (
        torch.tensor([[bool(view.mean() < 0.5) for view in views(white)] for _ in range(400)]).float().mean(0)
    )
    assert 0.14 < dark[1] < 0.26
    assert not dark[[i for i in range(len(dark)) if i != 1]].any()


def test_gray_in_a_fifth_and_mirrored_in_a_half():
    torch.manual_seed(0)
    photo = Image.new("RGB", (16, 8), (200, 40, 40))
    photo.paste((40, 200, 40), (8, 0, 16, 8))
    views = dino_views(16, 8, 1, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0), **PLAIN)
    gray = mirrored = coloured = 0
    for _ in range(400):
        _, _, view = views(photo)
        if bool((view.amax(0) - view.amin(0)).max() < 1e-6):
            gray += 1
            continue
        coloured += 1
        mirrored += bool(view[0, :, 0].mean() < view[0, :, -1].mean())
    assert 0.14 < gray / 400 < 0.26
    assert 0.4 < mirrored / coloured < 0.6


def test_crops_and_blur_are_those_of_the_released_code():
    moco, dino = (
        mocov3_views(24, (0.2, 0.9)),
        dino_views(32, 16, 2, global_scale=(0.3, 1.0), local_scale=(0.1, 0.3)),
    )
    crops = [view.transforms[0] for view in (*moco.views, *dino.views)]
    assert [crop.size[0] for crop in crops] == [24, 24, 32, 32, 16, 16]
    assert [tuple(crop.scale) for crop in crops] == [(0.2, 0.9)] * 2 + [(0.3, 1.0)] * 2 + [(0.1, 0.3)] * 2
    assert [crop.interpolation for crop in crops] == [InterpolationMode.BILINEAR] * 2 + [
        InterpolationMode.BICUBIC
    ] * 4
    expected = [1, 0.1, 1, 0.1, 0.5, 0.5]
    found = []
    for view in (*moco.views, *dino.views):
        for transform in view.transforms:
            if isinstance(transform, Blur):
                found.append(1)
            elif isinstance(getattr(transform, "transforms", [None])[0], Blur):
                found.append(transform.p)
    assert found == expected


def test_blur_draws_its_radius(photo):
    torch.manual_seed(5)
    radius = float(torch.empty(1).uniform_(0.1, 2.0))
    torch.manual_seed(5)
    expected = photo.filter(ImageFilter.GaussianBlur(radius))
    assert np.array_equal(np.asarray(Blur()(photo)), np.asarray(expected))


def test_wrong_settings():
    with pytest.raises(InputError, match="size 0: expected a crop's side"):
        mocov3_views(0)
    with pytest.raises(InputError, match=r"crop scale 0.0 0.4: expected two shares"):
        dino_views(local_scale=(0.0, 0.4))
    with pytest.raises(InputError, match="local_crops -2: expected 0 or more"):
        dino_views(local_crops=-2)
