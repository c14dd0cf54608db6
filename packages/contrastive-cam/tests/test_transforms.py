"""Transformations against array operations and coordinates worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from contrastive_cam.transforms import (
    TASKS,
    PretextTransform,
    inverse_theta,
    map_validity,
    map_warp,
    parse_tasks,
    rotate_images,
    theta_of,
    warp_images,
    warp_maps,
)
from torch import Tensor
from torch.nn import functional


def labels_of(**classes: int) -> dict[str, Tensor]:
    return {name: torch.tensor([label]) for name, label in classes.items()}


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("label", range(4))
def test_rotation_turns_counter_clockwise(image, label, align_corners):
    theta = theta_of(labels_of(rotation=label))
    expected = torch.rot90(image, label, (2, 3))
    torch.testing.assert_close(warp_images(image, theta, align_corners=align_corners), expected)
    assert torch.equal(rotate_images(image, torch.tensor([label])), expected)
    assert torch.equal(
        warp_maps(image[:, 0], theta, align_corners=align_corners), expected[:, 0]
    )  # to the bit


def test_flip_and_half_turn_of_wide_maps_move_values():
    A = torch.rand(1, 3, 7)
    assert torch.equal(warp_maps(A, theta_of(labels_of(flip=0))), A.flip(2))
    assert torch.equal(warp_maps(A, theta_of(labels_of(flip=1))), A)
    assert torch.equal(warp_maps(A, theta_of(labels_of(rotation=2))), A.flip(1, 2))


def test_translation_moves_content_up_and_left():
    image = torch.zeros(1, 1, 20, 20)
    image[0, 0, 10, 10] = 1
    moved = warp_images(image, theta_of(labels_of(translation=2)), "zeros")
    assert moved[0, 0, 9, 9].item() == pytest.approx(1)  # 5 % of 20 pixels


def test_scale_zooms_out_and_in(image):
    assert warp_images(torch.ones(1, 1, 8, 8), theta_of(labels_of(scale=0)), "zeros")[0, 0, 0, 0] < 0.9
    assert (warp_images(torch.ones(1, 1, 8, 8), theta_of(labels_of(scale=2)), "zeros") == 1).all()
    torch.testing.assert_close(warp_images(image, theta_of(labels_of(scale=1))), image)


def test_odd_is_symmetric_under_reflection(image):
    for corners in (False, True):
        extremes = [
            warp_images(image, theta_of(labels_of(odd=label)), align_corners=corners) for label in (0, 4)
        ]
        for found in extremes:
            torch.testing.assert_close(found, image.flip(2, 3), rtol=1e-4, atol=1e-5)
        one = warp_images(image, theta_of(labels_of(odd=1)), align_corners=corners)
        torch.testing.assert_close(one, one.flip(2), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(one, one.flip(3), rtol=1e-4, atol=1e-5)


def test_odd_and_rotation_give_eight_different_images(image):
    seen: list[Tensor] = []
    for odd in range(5):
        for rotation in range(4):
            found = warp_images(image, theta_of(labels_of(odd=odd, rotation=rotation)), align_corners=True)
            if not any(torch.allclose(found, other, atol=1e-4) for other in seen):
                seen.append(found)
    assert len(seen) == 8


def test_order_of_the_product():
    labels = labels_of(odd=3, rotation=1, translation=2, shear=2, flip=0, scale=2)
    point = np.array([0.3, -0.2])
    x = point * 0.7  # scale first
    x = x * [-1, 1]
    x = np.array([x[0] + math.tan(math.radians(30)) * x[1], x[1]])
    x = x + 0.1
    x = np.array([-x[1], x[0]])
    x = x + 3
    theta = theta_of(dict(reversed(labels.items())))[0].numpy()
    np.testing.assert_allclose(theta @ [*point, 1], x, atol=1e-12)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", [(5, 5), (4, 9), (1, 6), (14, 14)])
def test_map_warp_is_bilinear_sampling(size, align_corners):
    torch.manual_seed(1)
    A = torch.rand(6, *size, dtype=torch.float64)
    theta = theta_of({name: torch.randint(classes, (6,)) for name, classes in TASKS.items() if name != "odd"})
    if align_corners and 1 in size:
        pytest.skip("one cell has two corners in one place, which grid_sample defines otherwise")
    grid = functional.affine_grid(theta, [6, 1, *size], align_corners=align_corners)
    expected = functional.grid_sample(A.unsqueeze(1), grid, padding_mode="zeros", align_corners=align_corners)
    torch.testing.assert_close(
        warp_maps(A, theta, align_corners=align_corners), expected.squeeze(1), rtol=0, atol=1e-5
    )
    ones = functional.grid_sample(torch.ones_like(A).unsqueeze(1), grid, align_corners=align_corners)
    valid = map_validity(theta, size, align_corners=align_corners)
    torch.testing.assert_close(valid, ones.squeeze(1), rtol=0, atol=1e-5)
    every = map_warp(theta, size, align_corners=align_corners).of_all(A)
    torch.testing.assert_close(
        every[torch.arange(6), torch.arange(6)], warp_maps(A, theta, align_corners=align_corners).flatten(1)
    )
    torch.testing.assert_close(
        every[2, 4], warp_maps(A[4:5], theta[2:3], align_corners=align_corners).flatten()
    )


def test_gradient_of_the_warp():
    theta = theta_of({"rotation": torch.tensor([1, 3]), "scale": torch.tensor([0, 2])})
    A = torch.rand(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: warp_maps(x, theta), A)


def test_inverse_leads_back():
    torch.manual_seed(0)
    theta = theta_of({name: torch.randint(classes, (9,)) for name, classes in TASKS.items()})
    bottom = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64).expand(9, 1, 3)
    product = torch.cat([theta, bottom], 1) @ torch.cat([inverse_theta(theta), bottom], 1)
    torch.testing.assert_close(product, torch.eye(3, dtype=torch.float64).expand(9, 3, 3))
    turn, A = theta_of({"rotation": torch.tensor([1])}), torch.rand(1, 5, 5)
    assert torch.equal(warp_maps(warp_maps(A, turn), inverse_theta(turn)), A)


def test_image_and_map_are_moved_alike():
    """A patch of an image lands where the same patch of its map lands: what align_corners=False is for."""
    image = torch.zeros(1, 1, 64, 64)
    image[..., 16:24, 40:48] = 1
    A = functional.avg_pool2d(image, 8)[:, 0]
    for name, label in (("rotation", 3), ("translation", 0), ("scale", 2), ("flip", 0)):
        theta = theta_of(labels_of(**{name: label}))
        centres = []
        for density in (warp_images(image, theta, "zeros")[0, 0], warp_maps(A, theta)[0]):
            where = (torch.arange(len(density)) + 0.5) / len(density)
            total = density.sum()
            centres.append(((density.sum(1) @ where / total).item(), (density.sum(0) @ where / total).item()))
        assert centres[0] == pytest.approx(centres[1], abs=0.01)


def test_transform_draws_by_torchs_generator():
    transform = PretextTransform("R+S+T", "zeros")
    images = torch.rand(16, 3, 8, 8)
    torch.manual_seed(3)
    first = transform(images)
    torch.manual_seed(3)
    again = transform(images)
    assert torch.equal(first.images, again.images)
    assert list(first.labels) == ["rotation", "translation", "scale"]
    assert all(len(first.labels[task].unique()) == TASKS[task] for task in transform.tasks)
    torch.testing.assert_close(first.images, warp_images(images, first.theta, "zeros"))


def test_rotation_alone_is_exact_on_square_images():
    images = torch.rand(4, 3, 9, 9)
    labels = {"rotation": torch.arange(4)}
    moved = PretextTransform("R")(images, labels)
    for label in range(4):
        assert torch.equal(moved.images[label], images[label].rot90(label, (1, 2)))
    wide = PretextTransform("R")(images[..., :6], labels)
    assert wide.images.shape == (4, 3, 9, 6)
    sampled = PretextTransform("R", compat="psynet")(images, labels)
    torch.testing.assert_close(sampled.images, moved.images)


def test_letters():
    assert parse_tasks("R + S+T") == ("rotation", "translation", "scale")
    assert parse_tasks("O+R+T+S+H+C", "psynet") == tuple(TASKS)
    assert PretextTransform("R+S", compat="psynet").tasks == ("rotation", "shear")
    assert PretextTransform("odd+R", compat="psynet").align_corners
    for wrong in ("C", "", "R+R", "R+rotation", "spin"):
        with pytest.raises(ValueError, match="expected different ones"):
            parse_tasks(wrong)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"padding": "wrap"}, "padding must be"),
        ({"compat": "psynet", "padding": "zeros"}, "reflects and aligns"),
        ({"compat": "psynet", "align_corners": False}, "reflects and aligns"),
        ({"compat": "old"}, "compat must be"),
    ],
)
def test_bad_options(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        PretextTransform("R", **options)
    with pytest.raises(ValueError, match="square"):
        rotate_images(torch.zeros(1, 3, 4, 5), torch.tensor([1]))
