"""Every table and figure as a command, end to end at a very small scale; runs are trained once and shared."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attnmap_core.errors import InputError
from attnmap_core.experiments import paired_difference
from attnmap_core.recipes import load_recipe
from PIL import Image
from sar_vit.cli import main
from sar_vit.config import SarConfig
from sar_vit.experiments import REPRODUCTIONS
from sar_vit.experiments.cases import TABLES, Case, Training
from sar_vit.experiments.evidence import table_rows
from sar_vit.experiments.figures import FIG_3
from sar_vit.experiments.tables import RUNNER, full_size
from scipy import stats

DATA = "synthetic:classes=4,superclasses=2,image_size=32,scale_min=0.4,train=16,val=4,test=8"
SMALL = {"image_size": 32, "batch_size": 8, "local_size": 16, "hidden_dim": 32, "prototypes": 32}
SMALL |= {"warmup_epochs": 0, "projection_dim": 16, "neck_channels": 8, "head_channels": 8}
RECIPE = f"""# Smallest run.
data = "{DATA}"
backbone = "vit"
image_size = 32
test_crop = 1.0
augmentation = "crop_flip"
mixup = 0.0
cutmix = 0.0
drop_path_rate = 0.0
epochs = 1
batch_size = 8
lr = 1e-3
workers = 0
threads = 1
select_on = "last"
backbone_options = {{ patch_size = 8, embed_dim = 12, depth = 2, num_heads = 2 }}
"""

# What the paper prints, by the labels of a row.
PUBLISHED: dict[str, dict[tuple[str, ...], tuple[float | None, ...]]] = {
    "table1a": {
        ("0",): (75.72,),
        ("0.001",): (75.82,),
        ("0.005",): (76.16,),
        ("0.01",): (76.72,),
        ("0.05",): (76.22,),
        ("0.1",): (75.88,),
    },
    "table1b": {
        ("A", "plain"): (74.22,),
        ("B", "A, no MSA skip"): (74.64,),
        ("C", "B, no LN before the MLP"): (75.72,),
        ("D", "C, no MLP skip"): (73.76,),
        ("E", "A + loss"): (74.78,),
        ("F", "C + loss (SAR)"): (76.72,),
    },
    "table1c": {
        ("100", "ViT-S, plain"): (74.22,),
        ("100", "ViT-S, SAR"): (76.72,),
        ("300", "ViT-S, plain"): (80.82,),
        ("300", "ViT-S, SAR"): (85.24,),
    },
    "table2": {
        ("ViT-T", "plain"): (72.2,),
        ("ViT-T", "SAR"): (72.4,),
        ("ViT-S", "plain"): (79.8,),
        ("ViT-S", "SAR"): (80.7,),
        ("T2T-ViT-14", "plain"): (81.5,),
        ("T2T-ViT-14", "SAR"): (81.9,),
        ("PVT-Small", "plain"): (79.8,),
        ("PVT-Small", "SAR"): (79.84,),
        ("CvT-13", "plain"): (81.6,),
        ("CvT-13", "SAR"): (81.8,),
    },
    "table3": {
        ("Cars", "plain"): (35.3,),
        ("Cars", "SAR"): (64.65,),
        ("Clipart", "plain"): (41.0,),
        ("Clipart", "SAR"): (64.95,),
        ("Painting", "plain"): (38.4,),
        ("Painting", "SAR"): (57.11,),
        ("Sketch", "plain"): (37.2,),
        ("Sketch", "SAR"): (62.98,),
    },
    "table4": {
        ("CIFAR-10", "no", "no"): (98.59,),
        ("CIFAR-10", "yes", "no"): (98.69,),
        ("CIFAR-10", "no", "yes"): (98.72,),
        ("CIFAR-10", "yes", "yes"): (98.65,),
        ("CIFAR-100", "no", "no"): (88.95,),
        ("CIFAR-100", "yes", "no"): (89.19,),
        ("CIFAR-100", "no", "yes"): (88.95,),
        ("CIFAR-100", "yes", "yes"): (89.21,),
        ("Flowers", "no", "no"): (95.07,),
        ("Flowers", "yes", "no"): (96.05,),
        ("Flowers", "no", "yes"): (95.1,),
        ("Flowers", "yes", "yes"): (96.1,),
        ("Pets", "no", "no"): (92.21,),
        ("Pets", "yes", "no"): (92.7,),
        ("Pets", "no", "yes"): (92.34,),
        ("Pets", "yes", "yes"): (92.7,),
    },
    "table5": {("ViT-S, plain",): (19.2, 52.8), ("ViT-S, SAR",): (22.39, 51.6)},
    "table6": {("ViT-S, plain",): (19.18,), ("ViT-S, SAR",): (31.19,)},
    "table7": {
        ("ViT-S", "plain"): (74.22,),
        ("ViT-S", "SAR"): (76.72,),
        ("T2T-ViT-14", "plain"): (82.42,),
        ("T2T-ViT-14", "SAR"): (83.96,),
        ("PVT-Small", "plain"): (76.57,),
        ("PVT-Small", "SAR"): (77.78,),
        ("CvT-13", "plain"): (83.38,),
        ("CvT-13", "SAR"): (85.20,),
    },
    "table8": {
        ("0.25", "ViT-S, plain"): (21.66,),
        ("0.25", "ViT-S, SAR"): (29.06,),
        ("0.5", "ViT-S, plain"): (29.86,),
        ("0.5", "ViT-S, SAR"): (38.02,),
        ("0.75", "ViT-S, plain"): (35.62,),
        ("0.75", "ViT-S, SAR"): (46.12,),
        ("1", "ViT-S, plain"): (74.22,),
        ("1", "ViT-S, SAR"): (76.72,),
    },
    "table9a": {
        ("MoCo-v3", "plain"): (77.60,),
        ("MoCo-v3", "SAR"): (78.88,),
        ("DINO", "plain"): (77.42,),
        ("DINO", "SAR"): (79.90,),
    },
    "table9b": {
        ("MoCo-v3", "plain"): (27.40,),
        ("MoCo-v3", "SAR"): (33.10,),
        ("DINO", "plain"): (35.06,),
        ("DINO", "SAR"): (35.28,),
    },
    "table12": {("PVT-Small, plain",): (39.8,), ("PVT-Small, SAR",): (41.1,)},
    "table13": {("ViT-S, plain",): (79.8,), ("ViT-S, DRLoc",): (80.2,), ("ViT-S, SAR",): (80.7,)},
    "appB": {
        ("spatial entropy (Eq. 7)",): (76.72,),
        ("of cosine similarity (Eq. 15)",): (76.25,),
        ("total variation (Eq. 14)",): (None,),
        ("spatial entropy of the softmax",): (None,),
    },
}
TITLE = {"top1": "Top-1", "imagenet_a": "ImageNet-A", "mce": "mCE", "jaccard": "Jaccard", "mean_iou": "mIoU"}
METRICS = {"table5": ("imagenet_a", "mce"), "table6": ("jaccard",), "table9b": ("jaccard",)}
METRICS |= {"table12": ("mean_iou",)}


class Shop:
    """Where all tests reproduce into: one folder of runs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs, self.out = folder, folder / "runs", folder / "out"
        self.photo = folder / "photo.png"
        pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(self.photo)

    def arguments(self, name: str, *more: object, data: str | None = DATA) -> list[str]:
        changes = [part for field, value in SMALL.items() for part in (f"--changes.{field}", str(value))]
        where = ["--runs", str(self.runs), "--out", str(self.out), "--device", "cpu"]
        given = [] if data is None else ["--data", data]
        return ["reproduce", name, *given, "--epochs", "1", *changes, *where, *map(str, more)]

    def reproduce(self, name: str, *more: object, data: str | None = DATA) -> Path:
        assert main(self.arguments(name, *more, data=data)) == 0
        return self.out / name


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("experiments"))


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def read(folder: Path, name: str = "table") -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text())


def size_and_colour(path: Path) -> tuple[int, int, float]:
    """Size of a picture and how much of it is coloured."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return pixels.shape[1], pixels.shape[0], float((np.ptp(pixels, axis=2) > 30).mean())


# --- Tables -------------------------------------------------------------------------------------------------


def test_everything_that_the_paper_has_is_a_command():
    figures = {"fig1", "fig2", "fig3", "fig4", "fig6", "fig7", "fig8"}  # fig5 is the pseudo-code
    assert set(REPRODUCTIONS) == {*PUBLISHED, *figures, "evidence"}
    assert all(item.summary for item in REPRODUCTIONS.values())


def test_published_numbers_are_those_of_the_paper():
    assert set(TABLES) == set(PUBLISHED)
    for name, table in TABLES.items():
        metrics = METRICS.get(name, ("top1",))
        assert table.metrics == metrics
        found = {
            tuple(case.labels.values()): tuple(case.published.get(metric) for metric in metrics)
            for case in table.cases
        }
        assert found == PUBLISHED[name], name
    assert FIG_3 == {"plain": {"300": 79.8}, "SAR": {"250": 79.9, "300": 80.7}}


def every_training(case: Case, scale: str) -> list[Training]:
    return [getattr(case, scale), *(every_training(case.start, scale) if case.start else [])]


@pytest.mark.parametrize("scale", ["tiny", "paper"])
def test_every_row_is_a_valid_run(scale):
    for name, table in TABLES.items():
        for case in table.cases:
            for training in every_training(case, scale):
                start = {"start": "runs/somewhere"} if case.start else {}
                config = load_recipe("sar_vit", training.recipe, SarConfig, {**training.changes, **start})
                config.check()
                assert (scale == "tiny") == config.data.startswith("synthetic:"), name


@pytest.mark.parametrize(
    ("name", "only", "rows"),
    [
        ("table1a", ["0.01", "0.05"], [3, 4]),
        ("table1b", ["SAR", "plain"], [0, 5]),
        ("table1c", [], [0, 1, 2, 3]),
        ("table3", [], range(8)),
        ("table4", [], range(16)),
        ("table5", ["sar"], [1]),
        ("table6", [], [0, 1]),
        ("table7", ["ViT-S", "CvT"], [0, 1, 6, 7]),
        ("table9a", ["DINO"], [2, 3]),
        ("table9b", [], range(4)),
        ("table12", ["plain"], [0]),
        ("table13", [], range(3)),
        ("appB", [], range(4)),
    ],
)
def test_tables_print_published_beside_ours(name, only, rows, shop, capsys):
    folder = shop.reproduce(name, *(["--only", *only] if only else []))
    printed = capsys.readouterr().out
    check_table(name, folder, [list(PUBLISHED[name])[i] for i in rows], printed)
    assert "cannot be compared with published ones" in printed


def check_table(name: str, folder: Path, keys: list[tuple[str, ...]], printed: str) -> None:
    found = read(folder)
    metrics = METRICS.get(name, ("top1",))
    assert printed.startswith(TABLES[name].title)
    assert str(folder) in printed
    assert len(found["rows"]) == len(keys)
    for row, key in zip(found["rows"], keys, strict=True):
        assert tuple(row.values())[: len(key)] == key
        for metric, published in zip(metrics, PUBLISHED[name][key], strict=True):
            shown = row[f"{TITLE[metric]}, published"]
            assert (None if shown is None else float(shown)) == published
            assert 0 <= row[f"{TITLE[metric]}, ours"]["mean"] <= 100
            if published is not None:
                assert any(key[-1] in line and f"{published:g}" in line for line in printed.splitlines())
    assert len(found["records"]) == len(keys) * len(metrics)
    for i, record in enumerate(found["records"]):
        key, metric = keys[i // len(metrics)], metrics[i % len(metrics)]
        published = PUBLISHED[name][key][i % len(metrics)]
        assert (record["metric"], record["published"], record["seed"]) == (metric, published, 26)
        difference = None if published is None else record["ours"] - published
        assert record["difference"] == difference
        assert record["ours"] == found["rows"][i // len(metrics)][f"{TITLE[metric]}, ours"]["mean"]
        run = Path(record["run"])
        if name != "table5":
            assert record["ours"] == json.loads((run / "metrics.json").read_text())["metrics"][metric]
        else:
            assert (run / "metrics.json").is_file()
    with (folder / "table.csv").open() as file:
        assert [tuple(row.values())[: len(keys[0])] for row in csv.DictReader(file)] == keys
    assert (folder / "table.md").read_text().startswith(f"# {TABLES[name].title}")
    assert found["record"]["versions"]["sar-vit"]


def test_shares_of_the_data_are_of_the_data(shop, capsys):
    folder = shop.reproduce("table8", "--only", "0.25", data=None)
    check_table("table8", folder, list(PUBLISHED["table8"])[:2], capsys.readouterr().out)
    run = Path(read(folder)["records"][0]["run"])
    assert load_recipe("sar_vit", str(run / "recipe.toml"), SarConfig).data.endswith(
        "train=250,val=200,test=400"
    )


def test_table_2_has_the_sizes_at_full_scale(shop, capsys):
    folder = shop.reproduce("table2", "--only", "ViT-S")
    check_table("table2", folder, list(PUBLISHED["table2"])[2:4], capsys.readouterr().out)
    plain, sar = read(folder)["rows"]
    assert (plain["M params, published"], plain["G mult-adds, published"]) == ("22", "4.7")
    assert (plain["M params, ours"], sar["M params, ours"]) == (22.050664, 22.049896)
    n, d = 197, 384
    block = 12 * n * d**2 + 2 * n**2 * d  # q, k, v, projection and MLP; logits and their use
    products = 196 * 768 * d + 12 * block + 1000 * d
    for row in (plain, sar):
        assert row["G mult-adds, ours"] == pytest.approx(products / 1e9, rel=1e-3)


@pytest.mark.parametrize(
    ("backbone", "plain", "sar"),
    [
        ("deit_tiny_patch16_224", 5_717_416, 5_717_032),
        ("t2t_vit_14", 21_545_550, 21_544_782),
        ("pvt_small", 24_485_864, 24_484_840),
        ("cvt_13", 19_997_480, 19_996_712),
    ],
)
def test_full_size(backbone, plain, sar):
    published = {"deit_tiny_patch16_224": 1.25, "t2t_vit_14": 4.8, "pvt_small": 3.8, "cvt_13": 4.5}
    for form, parameters in ((True, plain), (False, sar)):
        found, products = full_size(backbone, form)
        assert round(found * 1e6) == parameters
        assert products == pytest.approx(published[backbone], rel=0.1)


def test_paper_scale_runs_the_papers_recipe(shop, capsys):
    changes = {"backbone": "pvt_nano", "imagenet100": "false", "mixed_precision": "no", "workers": 0}
    given = [part for field, value in changes.items() for part in (f"--changes.{field}", value)]
    folder = shop.reproduce("table7", "--scale", "paper", "--only", "PVT", *given)
    printed = capsys.readouterr().out
    check_table("table7", folder, list(PUBLISHED["table7"])[4:6], printed)
    assert "Reduced scale" not in printed
    run = Path(read(folder)["records"][1]["run"])
    config = load_recipe("sar_vit", str(run / "recipe.toml"), SarConfig)
    assert run.parent.name.startswith("in1k-pvt-small-")
    assert (config.augmentation, config.mixup, config.select_on, config.lr) == ("deit", 0.8, "test", 1e-3)


def test_table_1a_draws_its_curve(shop):
    shop.reproduce("table1a", "--only", "0.01", "0.05")
    width, height, _ = size_and_colour(shop.out / "table1a" / "weights.png")
    assert width > height > 200


def test_finished_runs_are_not_repeated_and_shared(shop):
    shop.reproduce("table6")
    runs = {path: path.stat().st_mtime_ns for path in shop.runs.rglob("*") if path.is_file()}
    first = [record["run"] for record in read(shop.out / "table6")["records"]]
    shop.reproduce("table1b", "--only", "SAR", "plain")
    assert [record["run"] for record in read(shop.out / "table1b")["records"]] == first
    assert runs == {path: path.stat().st_mtime_ns for path in shop.runs.rglob("*") if path.is_file()}


def test_a_run_of_another_configuration_is_refused(shop):
    shop.reproduce("table6")
    run = Path(read(shop.out / "table6")["records"][0]["run"])
    with pytest.raises(InputError, match=r"lr"):
        RUNNER.finished(run, str(run / "recipe.toml"), lr=0.5)


def test_longer_rows_train_longer(shop):
    shop.reproduce("table1c")
    lengths = [
        len((Path(record["run"]) / "history.jsonl").read_text().splitlines())
        for record in read(shop.out / "table1c")["records"]
    ]
    assert lengths == [1, 1, 3, 3]


def test_fine_tuning_rows_start_with_the_form_of_their_pretraining(shop):
    shop.reproduce("table4", "--only", "Pets")
    forms = []
    for record in read(shop.out / "table4")["records"]:
        run = Path(record["run"])
        config = load_recipe("sar_vit", str(run / "recipe.toml"), SarConfig)
        model = json.loads((run / "model" / "config.json").read_text())["model"]
        forms.append((model["msa_skip"], model["mlp_norm"], config.entropy_weight))
    assert forms == [(True, True, 0), (False, False, 0), (True, True, 0.01), (False, False, 0.01)]


# --- Figures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "models", "photos"),
    [
        ("fig1", ["supervised", "DINO", "SAR"], 4),
        ("fig2", ["SAR"], 1),
        ("fig4", ["plain", "SAR"], 4),
        ("fig6", ["MoCo-v3", "MoCo-v3 + SAR"], 4),
        ("fig7", ["DINO", "DINO + SAR"], 4),
        ("fig8", ["plain", "SAR"], 8),
    ],
)
def test_figures_show_their_models(name, models, photos, shop, capsys):
    folder = shop.reproduce(name)
    printed = capsys.readouterr().out
    assert str(folder / f"{name}.png") in printed
    assert "cannot be compared" in printed
    facts = read(folder, name)
    assert list(facts["models"]) == models
    assert all((Path(run) / "metrics.json").is_file() for run in facts["models"].values())
    width, height, coloured = size_and_colour(folder / f"{name}.png")
    assert width > 300
    assert height > 100 * (1 if name == "fig2" else photos)
    assert coloured > 0.03


def test_fig3_is_the_accuracy_of_every_epoch(shop):
    folder = shop.reproduce("fig3", "--epochs", "2")
    facts = read(folder, "fig3")
    assert set(facts["top1"]) == {"ViT-S, plain", "ViT-S, SAR"}
    assert all(
        len(curve) == 2 and all(0 <= value <= 100 for value in curve) for curve in facts["top1"].values()
    )
    assert facts["published"]["SAR"]["300"] == 80.7
    assert size_and_colour(folder / "fig3.png")[0] > 600


def test_models_and_photos_of_ones_own(shop, tmp_path):
    shop.reproduce("table6")
    plain, sar = (record["run"] for record in read(shop.out / "table6")["records"])
    given = [
        "--models.before",
        plain,
        "--models.after",
        sar,
        "--photos",
        shop.photo,
        "--out",
        tmp_path / "own",
    ]
    assert main(["reproduce", "fig4", *map(str, given), "--device", "cpu"]) == 0
    facts = read(tmp_path / "own" / "fig4", "fig4")
    assert facts["models"] == {"before": plain, "after": sar}
    more = ["--models.SAR", sar, "--images", "0", "7", "--out", tmp_path / "two", "--device", "cpu"]
    assert main(["reproduce", "fig4", *map(str, more)]) == 0
    assert (tmp_path / "two" / "fig4" / "fig4.png").is_file()


# --- Evidence -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recipe(shop: Shop) -> Path:
    path = shop.folder / "small.toml"
    path.write_text(RECIPE)
    return path


def evidence(shop: Shop, recipe: Path, *more: object) -> list[str]:
    where = ["--runs", shop.folder / "evidence-runs", "--out", shop.folder / "evidence", "--device", "cpu"]
    return list(map(str, ["reproduce", "evidence", "--recipe", recipe, "--rows", "A", "F", *where, *more]))


def test_evidence_compares_seed_by_seed(shop, recipe, capsys):
    assert main(evidence(shop, recipe, "--seeds", "0", "1")) == 0
    printed = capsys.readouterr().out
    found = read(shop.folder / "evidence")
    assert [(row["row"], row["what"]) for row in found["rows"]] == [("A", "plain"), ("F", "C + loss (SAR)")]
    records = {(record["row"], record["seed"]): record for record in found["records"]}
    assert set(records) == {("A", 0), ("A", 1), ("F", 0), ("F", 1)}
    ours, theirs = ([records[row, seed]["top1"] for seed in (0, 1)] for row in ("F", "A"))
    assert found["rows"][1]["top-1 minus A"] == paired_difference(ours, theirs)
    assert found["rows"][0]["Top-1"]["mean"] == pytest.approx(np.mean(theirs))
    assert found["rows"][0]["Top-1"]["std"] == pytest.approx(np.std(theirs, ddof=1))
    for name in ("Entropy (nats)", "Components", "Jaccard"):
        assert found["rows"][1][name]["n"] == 2
    assert "2 seeds" in printed
    width, height, coloured = size_and_colour(shop.folder / "evidence" / "attention.png")
    assert (width > 150, height > 400, coloured > 0.03) == (True, True, True)
    files = [path for path in (shop.folder / "evidence-runs").rglob("*") if path.is_file()]
    times = [path.stat().st_mtime_ns for path in files]
    assert (
        main(evidence(shop, recipe, "--seeds", "0", "--pictures", "0")) == 0
    )  # a part of it: nothing is trained
    assert times == [path.stat().st_mtime_ns for path in files]
    edited = shop.folder / "edited" / recipe.name  # the same name, so the same runs are meant
    edited.parent.mkdir()
    edited.write_text(RECIPE.replace("lr = 1e-3", "lr = 2e-3"))
    capsys.readouterr()
    assert main(evidence(shop, edited, "--seeds", "0")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert "lr=0.001" in line
    assert "lr=0.002" in line


@pytest.mark.parametrize("n", [2, 3, 5, 9])
def test_paired_difference_is_the_interval_of_the_paired_t_test(n):
    rng = np.random.default_rng(n)
    theirs = rng.normal(60, 3, n)
    ours = theirs + rng.normal(2, 1.5, n)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    expected = f"{np.mean(ours - theirs):+.1f} [{interval.low:+.1f}, {interval.high:+.1f}]"
    assert paired_difference(ours.tolist(), theirs.tolist()) == expected


def test_paired_difference_of_one_seed_and_rows_without_a_baseline():
    assert paired_difference([61.25], [60.0]) == "+1.2"
    assert paired_difference([60.0, 61.0], [60.5, 61.5]) == "-0.5 [-0.5, -0.5]"
    (row,) = table_rows({"F": [{"top1": 60.0}, {"top1": 62.0}]})
    assert "top-1 minus A" not in row
    assert row["Top-1"] == {"mean": 61.0, "std": pytest.approx(math.sqrt(2)), "n": 2}


# --- Wrong input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table9"], ["table9", "table9"]),
        (["table1b", "--only", "G"], ["--only G", "no MSA skip"]),
        (["table1b", "--scale", "huge"], ["huge", "tiny"]),
        (["table1b", "--epoch", "1"], ["--epoch", "--epochs"]),
        (["table1b", "--changes.lrs", "1"], ["lrs", "lr"]),
        (["table1b", "--seeds"], ["--seeds"]),
        (["table1b", "--data", "no/such/folder"], ["no/such/folder"]),
        (["table1b", "--epochs", "0"], ["epochs 0"]),
        (["table5", "--data", "no/such/folder"], ["no/such/folder"]),
        (["fig4", "--models.SAR", "no/such/model", "--data", DATA], ["no/such/model"]),
        (["fig4", "--models.SAR", "no/such/model"], ["--photos", "--data"]),
        (["fig4", "--seeds"], ["--seeds"]),
        (["evidence", "--rows", "G"], ["G"]),
        (["evidence", "--seeds"], ["--seeds"]),
        (["evidence", "--recipe", "tiny-sarr"], ["tiny-sarr", "tiny-sar"]),
    ],
)
def test_wrong_options_end_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["reproduce", *arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert line.startswith("sar-vit: error: ")
    for word in words:
        assert word in line
    assert not list(tmp_path.iterdir())  # nothing half-written


def test_an_image_that_is_not_there(shop, capsys):
    shop.reproduce("table6")
    assert main(shop.arguments("fig4", "--images", "99")) == 2
    assert "--images 99" in capsys.readouterr().err


def test_every_reproduction_explains_itself(capsys):
    for name in ("table1b", "fig4", "evidence"):
        with pytest.raises(SystemExit) as stop:
            main(["reproduce", name, "--help"])
        assert stop.value.code == 0
        assert "--out" in capsys.readouterr().out
