"""Every table and figure as a command, end to end at a very small scale. Two runs are trained for most of them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnmap_core.boxes import upsample_score_map
from attnmap_core.data.sources import load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from PIL import Image
from scm_wsol.calibration import newton_schulz
from scm_wsol.cli import load_model, main
from scm_wsol.config import ScmConfig
from scm_wsol.evaluate import evaluate_model
from scm_wsol.experiments import REPRODUCTIONS
from scm_wsol.experiments.ablate_ns import finding, region_area
from scm_wsol.experiments.combine_maps import measure, untrained_like
from scm_wsol.experiments.fig_diffusion import diffuse, gain
from scm_wsol.experiments.maxboxacc import best_epoch, run_rows
from scm_wsol.experiments.runs import Run, mean_and_deviation, run_once, shown
from scm_wsol.published import LOCALIZATION, MAX_BOX_ACC

DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=16,val=8,test=8"
RECIPE = f"""# Smallest {{method}} run.
data = "{DATA}"
method = "{{method}}"
backbone = "vit"
image_size = 32
resize = 36
epochs = 1
batch_size = 8
lr = 1e-3
workers = 0
threads = 1
drop_path_rate = 0.0
threshold_step = 0.05
backbone_options = {{{{ patch_size = 8, embed_dim = 12, depth = 2, num_heads = 2 }}}}
"""


class Small:
    """Recipes, and the run folders that main-results trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for method in ("scm", "tscam"):
            (folder / f"small-{method}.toml").write_text(RECIPE.format(method=method))
        self.recipe = {method: str(folder / f"small-{method}.toml") for method in ("scm", "tscam")}
        self.main = folder / "main"
        self.run = {method: self.main / f"small-{method}" / "seed26" for method in ("scm", "tscam")}

    def reproduce(self, name: str, *arguments: str) -> int:
        return main(["reproduce", name, *arguments])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    small = Small(tmp_path_factory.mktemp("experiments"))
    recipes = [small.recipe["tscam"], small.recipe["scm"]]
    assert small.reproduce("main-results", "--recipes", *recipes, "--out", str(small.main)) == 0
    return small


def table(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "table.json").read_text())["rows"]


def size_and_colour(path: Path) -> tuple[tuple[int, int], float]:
    """Size of a picture and how much of it is coloured."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (pixels.shape[1], pixels.shape[0]), float((np.ptp(pixels, axis=2) > 30).mean())


# --- main-results -------------------------------------------------------------------------------------------------


def test_main_results_stand_beside_the_published_row_of_their_protocol(small: Small) -> None:
    rows = table(small.main)
    assert [(row["method"], row["protocol"]) for row in rows] == [
        ("TS-CAM", "standard"), ("TS-CAM", "scm"), ("TS-CAM", "tscam"), ("TS-CAM DeiT-S, published", "tscam"),
        ("SCM", "standard"), ("SCM", "scm"), ("SCM", "tscam"), ("SCM DeiT-S, published", "scm"),
    ]  # fmt: skip
    assert rows[-1]["GT-known"] == LOCALIZATION["cub"]["SCM DeiT-S"]["gt_known"]
    metrics = json.loads((small.run["scm"] / "metrics.json").read_text())
    assert rows[4]["GT-known"]["mean"] == metrics["protocol standard"]["scm"]["gt_known"]
    assert rows[5]["GT-known"]["mean"] == metrics["protocol scm"]["GT-Known_top-1"]
    assert rows[5]["Top-5 Loc"]["mean"] == metrics["protocol scm"]["loc_acc_thr_50.00_top-5"]
    assert rows[6]["Top-1 Loc"]["mean"] == metrics["protocol tscam"]["top1_loc"]
    text = (small.main / "table.md").read_text()
    assert "Reduced scale: synthetic:classes=4" in text
    with (small.main / "table.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in rows]


def test_finished_runs_are_read_and_other_settings_refused(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in small.run["scm"].rglob("*") if path.is_file()}
    scm_only = ["--recipes", small.recipe["scm"], "--out", str(small.main)]
    protocols = ["standard", "scm", "tscam"]
    metrics = run_once(small.run["scm"], small.recipe["scm"], seed=26, protocols=protocols, threads=2)
    assert metrics["map"] == "scm"
    assert small.reproduce("main-results", *scm_only, "--changes.lr", "0.5") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "lr=0.001" in said
    assert "lr=0.5" in said
    assert before == {path: path.stat().st_mtime_ns for path in small.run["scm"].rglob("*") if path.is_file()}


# --- ablate-ns ----------------------------------------------------------------------------------------------------


def test_ablate_ns_trains_one_model_per_p(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    out = small.folder / "ns"
    arguments = ["--recipe", small.recipe["scm"], "--iterations", "4", "1", "--out", str(out)]
    assert small.reproduce("ablate-ns", *arguments) == 0
    said = capsys.readouterr().out
    assert "Published: p = 4 is best" in said
    assert [row["p"] for row in table(out)] == [1, 4]
    assert list(table(out)[0]) == ["p", "GT-known", "optimum τ", "region area", "MaxBoxAccV2", "PxAP"]
    for row in table(out):
        model = load_model(str(out / f"p{row['p']}" / "seed26" / "model"))
        assert [block.iterations for block in model.calibration.blocks] == [row["p"]] * 4
        assert all(block.stable_shrink for block in model.calibration.blocks)
        metrics = json.loads((out / f"p{row['p']}" / "seed26" / "metrics.json").read_text())
        own = metrics["protocol standard"]["scm"]
        assert row["GT-known"]["mean"] == own["gt_known"]
        assert row["optimum τ"]["mean"] == own["threshold"]
    for name in ("iterations.png", "thresholds.png"):
        assert Image.open(out / name).size[0] > 600


def test_region_area_counts_the_pixels_above_the_threshold(small: Small) -> None:
    model = load_model(str(small.run["scm"] / "model")).eval()
    data = load_data(DATA, "test")
    shares = []
    for sample in data:
        maps = model.maps(eval_transform(model.preprocessing)(sample.image)[None])
        raw = model.class_maps(maps, torch.tensor([sample.label]), "scm")[0].double().detach().numpy()
        values = np.floor(255 * upsample_score_map(raw, (32, 32)))
        shares.append(float((values > np.floor(0.3 * 255)).mean()))
    assert region_area(model, data, 0.3, batch_size=3) == pytest.approx(100 * np.mean(shares))
    assert region_area(model, data, 0.7) < region_area(model, data, 0.3)


def test_finding_names_the_best_p_and_its_lead() -> None:
    def cell(gt_known: float, area: float) -> dict[str, dict[str, float]]:
        return mean_and_deviation([{"gt_known": gt_known, "region_area": area}], ("gt_known", "region_area"))

    said = finding({1: cell(60, 30), 4: cell(71.5, 20), 16: cell(66, 10)})
    assert said == "p = 4 is best, 5.5 points GT-known above p = 16; the region is largest at p = 1"


# --- combine-maps -------------------------------------------------------------------------------------------------


def test_combine_maps_measures_every_pair_and_the_control(
    small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    out = small.folder / "pairs"
    given = [
        "--model",
        str(small.run["scm"]),
        "--control",
        str(small.run["tscam"]),
        "--recipe",
        small.recipe["scm"],
    ]
    assert small.reproduce("combine-maps", *given, "--images", "1", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "GT-known, TS-CAM weights, untrained SCM" in said
    rows = table(out)
    assert [(row["S"], row["F"]) for row in rows[:25]] == [(i, j) for i in range(5) for j in range(5)]
    assert {row["weights"] for row in rows} == {"SCM", "TS-CAM weights, untrained SCM"}
    metrics = json.loads((small.run["scm"] / "metrics.json").read_text())
    assert rows[0]["MaxBoxAccV1"] == metrics["protocol standard"]["scm"]["max_box_acc_v1"]
    for name in ("scm", "control"):
        (width, height), coloured = size_and_colour(out / f"grid_001_{name}.png")
        assert width > 800 < height + 100
        assert coloured > 0.5


def test_pairs_from_one_pass_are_those_of_the_model(small: Small) -> None:
    model = load_model(str(small.run["scm"] / "model")).eval()
    data = load_data(DATA, "test")
    pairs = measure(model, data, 0.2, 0.05)
    for pair in ((0, 0), (1, 3), (4, 2)):
        alone = evaluate_model(model, data, kinds=["combine:{},{}".format(*pair)], threshold=0.2, step=0.05)
        assert alone.metrics() == pairs[pair]


def test_control_is_the_tscam_weights_under_a_fresh_calibration(small: Small) -> None:
    scm = load_model(str(small.run["scm"] / "model"))
    plain = load_model(str(small.run["tscam"] / "model"))
    control = untrained_like(scm, plain)
    assert torch.equal(control.head.weight, plain.head.weight)
    assert [block.lam.item() for block in control.calibration.blocks] == [1.0] * 4
    assert [block.beta.item() for block in control.calibration.blocks] == [0.5] * 4
    assert [block.iterations for block in control.calibration.blocks] == [4] * 4


def test_fig_grid_draws_without_measuring(small: Small) -> None:
    out = small.folder / "grid"
    given = ["--model", str(small.run["scm"]), "--recipe", small.recipe["scm"]]
    assert small.reproduce("fig-grid", *given, "--images", "0", "3", "--out", str(out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["grid_000_scm.png", "grid_003_scm.png"]


# --- maxboxacc ----------------------------------------------------------------------------------------------------


def test_maxboxacc_reports_both_selections_on_both_splits(small: Small) -> None:
    out = small.folder / "mba"
    assert small.reproduce("maxboxacc", "--recipes", small.recipe["scm"], "--out", str(out)) == 0
    rows = table(out)
    ours, published = rows[:4], rows[4:]
    assert [(row["epoch of best"], row["split"]) for row in ours] == [
        ("V1: 1", "val"), ("V1: 1", "test"), ("V2: 1", "val"), ("V2: 1", "test"),
    ]  # fmt: skip
    for row in ours:
        terms = [row[f"V2 at 0.{digit}"]["mean"] for digit in (3, 5, 7)]
        assert row["MaxBoxAccV2"]["mean"] == pytest.approx(np.mean(terms))
    assert {row["method"]: row["MaxBoxAccV2"] for row in published} == {
        f"{name}, published": values["max_box_acc_v2"] for name, values in MAX_BOX_ACC.items()
    }
    # One epoch is best by either metric, so one run serves both selections.
    assert [path.name for path in (out / "small-scm").iterdir()] == ["best-v2"]


def test_best_epoch_is_the_first_best_and_gives_the_val_row(tmp_path: Path) -> None:
    values = [(40.0, 30.0), (50.0, 20.0), (50.0, 30.0)]
    lines = [{"kind": "log", "loss": 1.0}] + [
        {"kind": "epoch", "epoch": i, "metrics": {"max_box_acc_v1": v1, "max_box_acc_v2": v2}}
        for i, (v1, v2) in enumerate(values, start=1)
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    metrics = {"map": "scm", "protocol standard": {"scm": {"max_box_acc_v1": 7.0, "max_box_acc_v2": 8.0}}}
    run = Run(tmp_path, ScmConfig(), metrics)
    assert (best_epoch(run, "max_box_acc_v1"), best_epoch(run, "max_box_acc_v2")) == (1, 0)
    val, test = run_rows("V1", [run])
    assert (val["epoch of best"], val["MaxBoxAccV1"]["mean"], val["MaxBoxAccV2"]["mean"]) == (
        "V1: 2",
        50.0,
        20.0,
    )
    assert test["MaxBoxAccV1"]["mean"] == 7.0
    without_boxes = {"kind": "epoch", "epoch": 1, "metrics": {"top1_cls": 3.0}}
    (tmp_path / "history.jsonl").write_text(json.dumps(without_boxes) + "\n")
    with pytest.raises(InputError, match="validation images with boxes"):
        best_epoch(replace_history(run, tmp_path), "max_box_acc_v1")


def replace_history(run: Run, folder: Path) -> Run:
    (folder / "history.jsonl").write_text(
        json.dumps({"kind": "epoch", "epoch": 1, "metrics": {"top1_cls": 3.0}}) + "\n"
    )
    return run


# --- fig-diffusion ------------------------------------------------------------------------------------------------


def test_fig_diffusion_of_fresh_weights(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    out = small.folder / "diffusion"
    assert small.reproduce("fig-diffusion", "--recipe", small.recipe["scm"], "--out", str(out)) == 0
    rows = table(out)
    assert [row["p"] for row in rows] == ["p = 0", "p = 1", "p = 2", "p = 4", "p = 8", "p = 16", "exact"]
    residuals = [row["residual"] for row in rows]
    assert residuals == sorted(residuals, reverse=True)  # every iteration comes nearer
    assert "fresh" in capsys.readouterr().out
    (width, _), coloured = size_and_colour(out / "diffusion.png")
    assert width > 1000
    assert coloured > 0.5
    assert Image.open(out / "gain.png").size[0] > 600


def test_diffusion_follows_the_closed_form(small: Small) -> None:
    model = load_model(str(small.run["scm"] / "model")).eval()
    sample = load_data(DATA, "test")[0]
    found = diffuse(model, eval_transform(model.preprocessing)(sample.image), [4], 0.002)
    # V_p has the singular values g_p(σ), and the residual those of (1 - α σ²)^(2^p).
    expected = np.sqrt(np.mean((1 - 0.002 * found.singular**2) ** 32))
    assert found.residuals["p = 4"] == pytest.approx(expected)
    assert found.maps["F⁰"].min() == 0
    assert found.maps["F⁰"].max() == 1
    sigma = np.array([0.05, 1.0, 7.0])
    by_matrix = newton_schulz(torch.diag(torch.tensor(sigma))[None], 4, 0.002)[0].diagonal().numpy()
    np.testing.assert_allclose(gain(sigma, 4, 0.002), by_matrix, rtol=1e-12)


# --- fig-qualitative ----------------------------------------------------------------------------------------------


def test_fig_qualitative_shows_both_methods(small: Small) -> None:
    out = small.folder / "qualitative"
    given = [
        "--tscam",
        str(small.run["tscam"]),
        "--scm",
        str(small.run["scm"]),
        "--scm-recipe",
        small.recipe["scm"],
    ]
    more = ["--images", "2", "5", "--threshold", "0.35", "--out", str(out)]
    assert small.reproduce("fig-qualitative", *given, *more) == 0
    rows = table(out)
    data = load_data(DATA, "test")
    assert [(row["image"], row["method"]) for row in rows] == [
        (data[index].image_id, method) for index in (2, 5) for method in ("TS-CAM", "SCM")
    ]
    assert all(0 <= row["IoU"] <= 1 and row["τ"] == 0.35 for row in rows)
    (width, height), coloured = size_and_colour(out / "qualitative.png")
    assert (width > 1000, height > 800, coloured > 0.3) == (True, True, True)


# --- synthetic ----------------------------------------------------------------------------------------------------


def test_synthetic_files_load_as_cub_with_the_same_boxes_labels_and_masks(tmp_path: Path) -> None:
    out = tmp_path / "drawn"
    assert main(["reproduce", "synthetic", "--data", DATA, "--out", str(out)]) == 0
    root = out / "CUB_200_2011"
    sources = {
        "cub": f"cub:{root}",
        "boxes": f"wsol:{out}/metadata/CUB@{root}",
        "masks": f"wsol:{out}/metadata/CUB-masks@{root}",
    }
    for split in ("train", "val", "test"):
        drawn = {sample.image_id: sample for sample in load_data(DATA, split)}
        for name, source in sources.items():
            data = load_data(source, split)
            assert data.labels == load_data(DATA, split).labels
            assert sorted(Path(image_id).stem for image_id in data.image_ids) == sorted(drawn)
            for sample in data:
                truth = drawn[Path(sample.image_id).stem]
                assert sample.label == truth.label
                assert np.array_equal(np.asarray(sample.image), np.asarray(truth.image))
                if name == "masks":
                    assert np.array_equal(sample.mask, truth.mask)
                else:
                    assert np.array_equal(sample.boxes_xyxy, truth.boxes_xyxy)


def test_a_model_measures_the_same_on_drawn_files(small: Small, tmp_path: Path) -> None:
    assert main(["reproduce", "synthetic", "--data", DATA, "--out", str(tmp_path / "drawn")]) == 0
    model = load_model(str(small.run["scm"] / "model")).eval()
    files = evaluate_model(
        model, load_data(f"cub:{tmp_path / 'drawn'}/CUB_200_2011", "test"), step=0.05
    ).metrics()
    memory = evaluate_model(model, load_data(DATA, "test"), step=0.05).metrics()
    assert files == {name: value for name, value in memory.items() if name not in ("pxap", "miou")}


# --- Wrong input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["ablate-ns", "--iterations", "-1"], "--iterations"),
        (["ablate-ns", "--recipe", "tiny-tscam"], "needs an SCM recipe"),
        (["ablate-ns", "--recipe", "tiny-smc"], "did you mean tiny-scm?"),
        (["combine-maps", "--images", "99", "--data", DATA], "--images 99"),
        (["combine-maps", "--model", "no/such/model", "--data", DATA], "no/such/model"),
        (["fig-grid", "--epoch", "1"], "did you mean --epochs?"),
        (["maxboxacc", "--changes.select_on", "test"], "select_on test"),
        (["main-results", "--changes.lrs", "1"], "did you mean lr?"),
        (["main-results", "--data", "synthetic:classes=x"], "classes"),
        (["fig-diffusion", "--iterations", "0"], "--iterations"),
        (["fig-diffusion", "--alpha", "0"], "--alpha"),
        (["fig-diffusion", "--image", "12", "--data", DATA], "12"),
        (["fig-qualitative", "--threshold", "1.5"], "--threshold 1.5"),
        (["synthetic", "--data", "cub:/x"], "expected synthetic"),
        (["synthetic", "--data", "synthetic:test=0"], "no images in test"),
    ],
)
def test_wrong_options_end_in_one_line(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("scm-wsol: error: ")
    assert said in line
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_a_model_of_other_classes_is_refused(small: Small, capsys: pytest.CaptureFixture[str]) -> None:
    other = DATA.replace("classes=4", "classes=6")
    given = ["--model", str(small.run["scm"]), "--data", other, "--out", str(small.folder / "other")]
    assert small.reproduce("fig-diffusion", *given) == 2
    assert "evaluate on data with the classes it was trained on" in capsys.readouterr().err
    swapped = [
        "--model",
        str(small.run["tscam"]),
        "--recipe",
        small.recipe["scm"],
        "--out",
        str(small.folder / "other"),
    ]
    assert small.reproduce("fig-grid", *swapped) == 2
    assert "expected a trained SCM" in capsys.readouterr().err


# --- Numbers ------------------------------------------------------------------------------------------------------


def test_means_and_their_texts() -> None:
    cells = mean_and_deviation([{"a": 1.0, "b": 2.0}, {"a": 4.0}], ("a", "b", "c"))
    assert cells == {"a": {"mean": 2.5, "std": pytest.approx(4.5**0.5), "n": 2}}
    assert [shown(cells["a"]), shown(cells.get("b")), shown({"mean": 0.347, "std": 0.0, "n": 1}, 2)] == [
        "2.5 ± 2.1", "–", "0.35",
    ]  # fmt: skip


def test_every_reproduction_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    for name in REPRODUCTIONS:
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", name, "--help"])
        assert stop.value.code == 0
        assert "--out" in capsys.readouterr().out
