"""Reference numbers of attention against class maps and of corruption errors: every file, by the prefix of its name.

The folder is ``ATTNMAP_GOLDEN`` (default: ``golden`` in the optional data folder ``ATTNMAP_SHARED``); sizes and
shares come from the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.metrics import jaccard_best_head, mass_mask, mce
from attnmap_core.metrics.robustness import ALEXNET_ERRORS, corruption_errors
from attnmap_core.metrics.segmentation import JaccardProtocol
from numpy.typing import NDArray

pytestmark = pytest.mark.golden

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FOLDER = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "sar"

Golden = dict[str, NDArray[Any]]


def each_file(prefix: str) -> Callable[[Any], Any]:
    files = sorted(FOLDER.glob(f"{prefix}*.npz"))
    absent = pytest.param(
        None, marks=pytest.mark.skip(reason=f"no {prefix}*.npz in {FOLDER} (ATTNMAP_GOLDEN)")
    )
    return pytest.mark.parametrize(
        "golden", files or [absent], ids=lambda path: path.stem if path else "absent", indirect=True
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(request.param, allow_pickle=False) as file:
        return dict(file)


@each_file("voc_jaccard")
def test_masks(golden: Golden) -> None:
    found = mass_mask(golden["attention"], float(golden["keep_mass"]))
    np.testing.assert_array_equal(found.reshape(golden["mask"].shape), golden["mask"])


@each_file("voc_jaccard")
@pytest.mark.parametrize(("exclude_void", "suffix"), [(False, ""), (True, "_void_excluded")])
def test_jaccard(golden: Golden, exclude_void: bool, suffix: str) -> None:
    keep, grid = float(golden["keep_mass"]), golden["mask"].shape[-2:]
    assert grid[0] * int(golden["patch"]) == golden["target"].shape[-2]
    found = jaccard_best_head(golden["attention"], golden["target"], keep, exclude_void=exclude_void)
    np.testing.assert_allclose(found, golden[f"J_image{suffix}"], rtol=0, atol=1e-12)
    protocol = JaccardProtocol(keep, exclude_void=exclude_void)
    for i, (attention, target) in enumerate(zip(golden["attention"], golden["target"])):
        protocol.add(i, attention=attention, target=target, grid=(grid[0], grid[1]))
    result = protocol.compute()
    assert result["jaccard"] == pytest.approx(100 * float(golden[f"J_dataset{suffix}"]), abs=1e-10)


@each_file("imagenet_c_mce")
def test_corruption_errors(golden: Golden) -> None:
    names, errors = golden["names"].tolist(), golden["errors"]
    assert dict(zip(names, golden["alexnet"].tolist())) == dict(ALEXNET_ERRORS)
    by_name = {name: row.tolist() for name, row in zip(names, errors)}
    order = [names.index(name) for name in ALEXNET_ERRORS]
    np.testing.assert_allclose(corruption_errors(by_name), golden["CE"][order], rtol=0, atol=1e-12)
    assert mce(by_name) == pytest.approx(float(golden["mCE_percent"]), abs=1e-10)
    assert mce(errors[order], golden["alexnet"][order]) == mce(by_name)
    assert 100 * errors.mean() == pytest.approx(float(golden["unnormalized_percent"]))
