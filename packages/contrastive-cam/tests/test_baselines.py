"""SCDA, DDT, DDT+ and LOST against plain NumPy written from the papers' words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attnmap_core.backbones import AttentionTap, create_backbone
from attnmap_core.errors import InputError
from contrastive_cam.baselines import (
    DescriptorStatistics,
    ddt_mask,
    ddt_plus_mask,
    grid_box,
    key_maps,
    layer_maps,
    lost,
    scda_mask,
    unit_joined,
    zero_level,
)
from contrastive_cam.inference import heat_map
from scipy import ndimage


def planted(seed: int = 0, sizes=((5, 6), (5, 6), (4, 9))) -> list[torch.Tensor]:
    """Feature maps of different grids that share one direction in their middle."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=7)
    maps = []
    for h, w in sizes:
        F = rng.normal(size=(1, 7, h, w)) + 1e3  # far from 0: sums about the origin would lose digits
        F[0, :, 1:-1, 2:-2] += 6 * shared[:, None, None]
        maps.append(torch.from_numpy(F))
    return maps


@pytest.mark.parametrize("sign", ["center", "largest"])
def test_ddt_is_the_first_principal_component_of_all_photos(sign):
    maps = planted()
    statistics = DescriptorStatistics(7)
    for F in maps:
        statistics.add(F)
    ddt = statistics.fit(sign)
    rows = np.concatenate([F[0].flatten(1).T.numpy() for F in maps])
    np.testing.assert_allclose(ddt.mean, rows.mean(axis=0), rtol=1e-12)
    values, vectors = np.linalg.eigh(np.cov(rows.T))
    assert ddt.eigenvalue == pytest.approx(values[-1], rel=1e-9)
    assert ddt.explained == pytest.approx(values[-1] / values.sum(), rel=1e-9)
    expected = vectors[:, -1]
    if sign == "largest":
        expected = expected * np.sign(expected[np.abs(expected).argmax()])
        np.testing.assert_allclose(ddt.component, expected, atol=1e-9)
    else:
        np.testing.assert_allclose(abs(float(ddt.component @ torch.from_numpy(expected))), 1, atol=1e-9)
        for F in maps:
            score = ddt(F)[0]
            assert score[1:-1, 2:-2].mean() > 0 > score[0].mean()
    score = ((rows[:30] - rows.mean(axis=0)) @ ddt.component.numpy()).reshape(5, 6)
    np.testing.assert_allclose(ddt(maps[0])[0], score, atol=1e-8)


def test_ddt_refuses_what_has_no_covariance():
    with pytest.raises(ValueError, match="two descriptors"):
        DescriptorStatistics(3).fit()
    statistics = DescriptorStatistics(3)
    with pytest.raises(ValueError, match=r"\(b, 3, h, w\)"):
        statistics.add(torch.zeros(1, 4, 2, 2))
    statistics.add(torch.zeros(1, 3, 2, 2))
    with pytest.raises(ValueError, match="sign"):
        statistics.fit("up")  # pyright: ignore[reportArgumentType]
    assert statistics.fit().explained == 0  # photos without any variance: nothing stands out
    assert not ddt_mask(statistics.fit()(torch.zeros(1, 3, 2, 2))[0]).any()


def test_masks_take_the_largest_component():
    score = np.array([[3.0, -1, 1, 1], [-1, -1, -1, 1], [2, -1, -1, -1]])
    np.testing.assert_array_equal(ddt_mask(score), [[0, 0, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(scda_mask(score), ddt_mask(np.where(score > score.mean(), 1, -1)))
    assert not scda_mask(np.ones((3, 3))).any()  # nothing is strictly above the mean of a constant map


def test_ddt_plus_keeps_what_two_layers_agree_on():
    deep = np.array([[1.0, 1, 1, -1]])
    shallow = np.kron(np.array([[-1.0, 1, 1, 1]]), np.ones((2, 2)))
    np.testing.assert_array_equal(ddt_plus_mask(deep, shallow), [[0, 1, 1, 0]])
    np.testing.assert_array_equal(ddt_plus_mask(deep, -np.ones((1, 2))), [[1, 1, 1, 0]])


def reference_lost(F: np.ndarray, k: int) -> tuple[int, np.ndarray]:
    f = F.reshape(len(F), -1).T
    n = len(f)
    degree = [sum(f[p] @ f[q] >= 0 for q in range(n)) for p in range(n)]
    order = sorted(range(n), key=lambda p: degree[p])
    seed = order[0]
    voters = [q for q in order[:k] if f[q] @ f[seed] >= 0]
    mask = np.array([sum(f[q] @ f[s] for s in voters) >= 0 for q in range(n)]).reshape(F.shape[1:])
    labels, _ = ndimage.label(mask)
    return seed, labels == labels.flat[seed]


@pytest.mark.parametrize("seed", range(4))
def test_lost_follows_its_definition(seed):
    F = np.random.default_rng(seed).normal(size=(5, 6, 7))
    start, mask = reference_lost(F, 12)
    found = lost(F, 12)
    assert found.seed == divmod(start, 7)
    np.testing.assert_array_equal(found.mask, mask)
    with pytest.raises(ValueError, match="seeds"):
        lost(F, 0)


def test_keys_are_those_of_the_attention():
    vit = create_backbone("vit", img_size=(16, 24), patch_size=8, embed_dim=12, depth=2, num_heads=3).eval()
    images = torch.randn(2, 3, 16, 24)
    first, last = key_maps(vit, images, [0, -1])
    with torch.no_grad(), AttentionTap(vit, blocks=[-1], keep_keys=True) as tap:
        vit(images)
        [(_, keys)] = tap.pop().queries_and_keys()  # (b, heads, 1 + n, d)
    for head in range(3):
        for cell in range(6):
            expected = keys[:, head, 1 + cell]
            found = last[:, 4 * head : 4 * head + 4, cell // 3, cell % 3]
            torch.testing.assert_close(found, expected)
    joined = unit_joined([first, last])
    assert joined.shape == (2, 24, 2, 3)
    torch.testing.assert_close(joined[:, :12].norm(dim=1), torch.ones(2, 2, 3))
    torch.testing.assert_close(joined[:, 12:].norm(dim=1), torch.ones(2, 2, 3))


def test_layers_by_name():
    net = create_backbone("resnet10t", img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    [last] = layer_maps(net, images, ["layer4"])
    torch.testing.assert_close(last, net(images).map)
    with pytest.raises(InputError, match=r"layer 'layer9'.*layer1"):
        layer_maps(net, images, ["layer9"])
    vit = create_backbone("vit", img_size=16, patch_size=8, embed_dim=12, depth=1, num_heads=3)
    with pytest.raises(InputError, match="no feature map"):
        layer_maps(vit, torch.zeros(1, 3, 16, 16), ["blocks.0"])


@pytest.mark.parametrize("seed", range(5))
def test_zero_keeps_its_place_in_the_heat_map(seed):
    score = np.random.default_rng(seed).normal(size=(5, 7)) + 0.3 * seed - 0.6
    size = (40, 35)
    raw = torch.nn.functional.interpolate(torch.from_numpy(score)[None, None], size, mode="bilinear")[
        0, 0
    ].numpy()
    np.testing.assert_array_equal(heat_map(score, size) > zero_level(score, size) + 1e-9, raw > 1e-9)


def test_grid_box_covers_whole_cells():
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:, 2] = True
    np.testing.assert_allclose(grid_box(mask, (200, 90)), [100, 30, 150, 90])
    assert grid_box(np.zeros((3, 4)), (200, 90)) is None
