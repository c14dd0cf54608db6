"""Pictures of attention: what is tinted, what is labelled, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from attnmap_core.pictures import save_picture
from PIL import Image
from sar_vit.pictures import (
    MASK_COLOR,
    attention_mosaic,
    attention_picture,
    component_colors,
    entropy_pictures,
    head_sheet,
    mass_mask_picture,
    schematic,
)
from scipy import ndimage


def gray(width: int = 60, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 200, 200))


def tinted(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture, int)
    return pixels[..., 0] > pixels[..., 1]


def test_mask_is_the_patches_with_most_of_the_mass():
    attention = np.array([[0.05, 0.3, 0.05], [0.05, 0.35, 0.2]])
    picture = mass_mask_picture(gray(), attention)
    assert picture.size == (480, 480)
    wanted = np.kron([[0, 1, 0], [0, 1, 0]], np.ones((240, 160), bool))
    assert np.array_equal(tinted(picture), wanted)
    wider = np.kron([[0, 1, 0], [0, 1, 1]], np.ones((240, 160), bool))
    assert np.array_equal(tinted(mass_mask_picture(gray(), attention, mass=0.8)), wider)
    assert np.array_equal(tinted(mass_mask_picture(gray(), 100 * attention)), wanted)  # whatever the sum


def test_mask_is_outlined_and_the_rest_dimmed():
    pixels = np.asarray(mass_mask_picture(gray(), [[0.9, 0.1]]))
    assert tuple(pixels[240, 239]) == MASK_COLOR  # the border between the patches
    assert tuple(pixels[240, 100]) == (228, 132, 124)  # half photo, half tint
    assert tuple(pixels[240, 300]) == (100, 100, 100)
    assert mass_mask_picture(gray(), [[0.9, 0.1]], size=None).size == (60, 40)


@pytest.mark.parametrize(
    "attention", [np.ones(4), np.ones((1, 2, 2)), np.zeros((0, 2)), [[1, -1]], [[np.nan, 1]]]
)
def test_what_is_no_attention_is_refused(attention):
    with pytest.raises(ValueError, match="attention"):
        mass_mask_picture(gray(), attention)


def test_mosaic_has_a_row_for_each_photo_and_model():
    maps = [np.random.default_rng(i).random((3, 4, 5)) for i in range(2)]
    one = attention_mosaic([gray(), gray(30, 90)], {"SAR": maps}, cell_size=100)
    two = attention_mosaic([gray(), gray(30, 90)], {"ViT": maps, "SAR": maps}, cell_size=100)
    assert two.height > 1.8 * one.height
    assert two.width > one.width  # the names of the models
    few = [stack[:1] for stack in maps]  # fewer heads leave places empty
    mixed = np.asarray(attention_mosaic([gray(), gray()], {"ViT": maps, "SAR": few}, cell_size=100), int)
    assert mixed.shape == np.asarray(two).shape
    assert (mixed[-60:-40, -60:-40] == 255).all()
    with_captions = attention_mosaic([gray(), gray()], {"": maps}, captions=["a", "b"], cell_size=100)
    assert with_captions.height > one.height


@pytest.mark.parametrize(
    ("photos", "attention", "captions"),
    [
        ([], {"a": []}, None),
        ([gray()], {}, None),
        ([gray()], {"a": []}, None),
        ([gray()], {"a": [np.ones((1, 2, 2))]}, []),
    ],
)
def test_mosaics_that_do_not_fit(photos, attention, captions):
    with pytest.raises(ValueError, match="photos"):
        attention_mosaic(photos, attention, captions=captions)


def test_components_have_the_colours_of_their_shares():
    S = np.zeros((5, 6))
    S[0, 0], S[2:4, 2:4], S[4, 5] = 3, 2, 1
    [_, b, components], said = entropy_pictures(S, side=300)
    labels, count = ndimage.label(S.mean() < S, np.ones((3, 3)))
    B = np.maximum(S - S.mean(), 0)
    shares = np.sort(ndimage.sum(B, labels, range(1, count + 1)) / B.sum())[::-1]
    entropy = -(shares * np.log(shares)).sum()
    assert said == f"r = 3, E = {entropy:.2f}\nP: " + " ".join(f"{share:.2f}" for share in shares)
    pixels = np.asarray(components)[30::60, 25::50]
    colors = {tuple(map(int, pixels[y, x])) for y, x in np.argwhere(labels > 0)}
    assert len(colors) == 3
    assert tuple(pixels[2, 2]) == (31, 119, 180)  # the first colour for the largest
    assert {tuple(map(int, pixels[y, x])) for y, x in np.argwhere(labels == 0)} == {(226, 229, 233)}
    assert np.asarray(b)[30, 25].sum() > np.asarray(b)[270, 275].sum()


def test_many_components_take_colours_again():
    labels = np.where(np.arange(49).reshape(7, 7) % 2 == 0, np.arange(49).reshape(7, 7), -1)
    colors = component_colors(labels, (labels >= 0).ravel() / 25)
    assert len(np.unique(colors.reshape(-1, 3), axis=0)) == 11
    assert (colors == (31, 119, 180)).all(axis=-1).sum() == 1  # the largest's alone


def test_schematic_of_a_constant_map_and_of_heads():
    assert entropy_pictures(np.ones((3, 3)))[1] == "r = 0, E = 0.00\nP: "
    maps = np.random.default_rng(0).normal(size=(2, 4, 6))
    full = schematic(maps, gray(), np.exp(maps), cell_size=100)
    assert full.width > schematic(maps, gray(), cell_size=100).width > schematic(maps, cell_size=100).width
    assert full.height > 1.8 * schematic(maps[0], cell_size=100).height
    for wrong in (np.full((2, 2), np.nan), np.ones(3)):
        with pytest.raises(ValueError, match="finite"):
            schematic(wrong)
    with pytest.raises(ValueError, match="as many heads"):
        schematic(maps, gray(), maps[:1])


def test_small_ones(tmp_path):
    assert attention_picture(gray(), np.random.default_rng(0).normal(size=(3, 4))).size == (60, 40)
    assert attention_picture(gray(), np.zeros((3, 4)), size=64).size == (64, 64)
    sheet = head_sheet(gray(), np.ones((6, 2, 2)))
    assert sheet.width > sheet.height  # three by two
    assert save_picture(sheet, tmp_path / "a.jpg").is_file()
