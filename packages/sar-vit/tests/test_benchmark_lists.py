"""The class lists of ImageNet-100 and ImageNet-A against those that timm ships."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm.data
from sar_vit.imagenet100 import IMAGENET_100
from sar_vit.imagenet_a import IMAGENET_A


def test_imagenet_100() -> None:
    assert len(IMAGENET_100) == len(set(IMAGENET_100)) == 100
    assert list(IMAGENET_100) == sorted(IMAGENET_100)
    assert set(IMAGENET_100) <= set(timm.data.ImageNetInfo().label_names())


def test_imagenet_a() -> None:
    assert len(IMAGENET_A) == len(set(IMAGENET_A)) == 200
    assert list(IMAGENET_A) == sorted(IMAGENET_A)
    folder = Path(timm.data.__file__).with_name("_info")
    indices, wnids = folder / "imagenet_a_indices.txt", folder / "imagenet_a_synsets.txt"
    if not indices.exists() or not wnids.exists():
        pytest.skip("this version of timm does not ship the lists of ImageNet-A")
    assert list(IMAGENET_A) == [int(line) for line in indices.read_text().split()]
    # Rising index is rising wnid, which is how the folders of the data set are numbered.
    names = timm.data.ImageNetInfo().label_names()
    assert [names[index] for index in IMAGENET_A] == sorted(wnids.read_text().split())
