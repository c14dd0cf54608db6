"""Figures and tables at the smallest scale: files, numbers that must hold, and bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from attnmap_core.errors import InputError
from crossattn_dml.cli import main
from crossattn_dml.experiments import evidence
from crossattn_dml.experiments.attention import chosen_triples
from crossattn_dml.experiments.evidence import EvidenceOptions, SearchOptions, arms_of, search_arm
from crossattn_dml.experiments.main_results import table_rows
from crossattn_dml.experiments.runs import recipe_config


@pytest.fixture(scope="session")
def changes(tiny: list[str]) -> list[str]:
    """The arguments of a tiny run, as an experiment takes them."""
    given = dict(zip(tiny[::2], tiny[1::2]))
    arguments = ["--data", given.pop("--data"), "--epochs", "1"]
    del given["--epochs"]
    options = {name: value for name, value in given.items() if "." not in name}
    for name, value in options.items():
        arguments += [f"--changes.{name[2:].replace('-', '_')}", value]
    return arguments


@pytest.fixture(scope="session")
def looked_at(run: Path, source: str) -> list[str]:
    """A finished run and its data."""
    return ["--model", str(run), "--data", source, "--changes.image_size", "32"]


def table(folder: Path) -> dict:
    return json.loads((folder / "table.json").read_text())


def test_attention_of_triples(looked_at, tmp_path):
    out = tmp_path / "a"
    assert main(["reproduce", "fig-attention", *looked_at, "--auto", "2", "--heads", "--out", str(out)]) == 0
    found = json.loads((out / "triples.json").read_text())
    assert len(found["triples"]) == 2
    for triple in found["triples"]:
        first, second, third = triple["classes"]
        assert first == second != third
    maps = np.load(out / "maps.npz")
    upper, lower = maps["0_block1_upper"], maps["0_block1_lower"]
    assert upper.sum() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(maps["0_block1_sqdiff"], (upper - lower) ** 2)
    assert maps["0_block1_heads"].shape == (2, 2, 4, 4)
    assert (out / "triple-1.png").stat().st_size > 0
    caption = ["reproduce", "fig-attention", *looked_at, "--triples", "0", "4", "1", "--direction", "caption"]
    assert main([*caption, "--out", str(out)]) == 0
    assert "0_block1_sqdiff" not in np.load(out / "maps.npz").files


def test_triples_are_the_nearest():
    z = np.array([[1, 0], [0.9, 0.1], [0.5, 0.5], [0.8, 0.2], [0, 1.0]])
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    labels = np.array([0, 0, 0, 1, 2])
    assert {triple for triple in chosen_triples(z, labels, 9)} == {(0, 1, 3), (1, 0, 3), (2, 1, 3)}
    with pytest.raises(InputError, match="no image has another one of its class"):
        chosen_triples(z, np.arange(5), 3)


@pytest.mark.parametrize("descriptor", ["tokens", "keys:1"])
def test_parts(looked_at, tmp_path, descriptor):
    out = tmp_path / "p"
    arguments = ["reproduce", "fig-parts", *looked_at, "--queries", "3", "--descriptor", descriptor]
    assert main([*arguments, "--random-locations", "5", "--most", "4", "--out", str(out)]) == 0
    found = json.loads((out / "parts.json").read_text())
    assert 0 <= found["same_class_share"] <= 1
    for query in found["queries"]:
        cosines = [part["cosine"] for part in query["top"]]
        assert len(cosines) == 4
        assert cosines == sorted(cosines, reverse=True)
        assert query["query_image"] not in [part["image"] for part in query["top"]]
    assert (out / "parts-3.png").stat().st_size > 0


def test_neighbours_and_levels(run, source, looked_at, tmp_path):
    arguments = ["reproduce", "neighbours", "--model", str(run), "--data", source, "--split", "test"]
    assert main([*arguments, "--queries", "3", "--k", "4", "--out", str(tmp_path / "n")]) == 0
    rows = json.loads((tmp_path / "n" / "neighbours.json").read_text())["rows"]
    assert [len(row["found"]) for row in rows] == [4, 4, 4]
    assert all(row["query"] not in row["found"] for row in rows)
    assert main(["reproduce", "levels", *looked_at, "--out", str(tmp_path / "l")]) == 0
    levels = table(tmp_path / "l")["rows"]
    trained = json.loads((run / "metrics.json").read_text())["metrics"]["recall@1"]
    assert levels[0]["R@1"] == pytest.approx(100 * trained)
    assert [row["level"] for row in levels] == ["0", "1"]


@pytest.mark.slow
def test_gradients(changes, tmp_path):
    out = tmp_path / "g"
    assert main(["reproduce", "fig-gradients", *changes, "--batches", "1", "--out", str(out)]) == 0
    rows = {(row["epoch"], row["model"], row["loss"]): row["median"] for row in table(out)["rows"]}
    assert rows["0", "method", "normalised"] == pytest.approx(rows["0", "baseline", "raw"], abs=0.01)
    assert rows["0", "method", "raw"] - rows["0", "baseline", "raw"] == pytest.approx(np.log10(2), abs=0.01)
    held = np.load(out / "gradients.npz")
    assert held["counts"].shape == (2, 2, 160)
    assert held["counts"].sum() > 0


@pytest.mark.slow
def test_main_and_evidence_compare_the_same_runs(changes, tmp_path):
    assert main(["reproduce", "main", *changes, "--seeds", "0", "1", "--out", str(tmp_path / "m")]) == 0
    rows = {row["model"]: row for row in table(tmp_path / "m")["rows"]}
    assert rows["with blocks"]["R@1"]["n"] == 2
    arguments = ["reproduce", "evidence", *changes, "--seeds", "0", "1", "--controls", "1.5", "--rerank", "5"]
    assert main([*arguments, "--out", str(tmp_path / "e")]) == 0
    found = {row["model"]: row for row in table(tmp_path / "e")["rows"]}
    assert list(found) == ["baseline", "baseline, lr x1.5", "method", "method, re-ranked 5"]
    assert any(note.startswith("What re-ranking adds") for note in table(tmp_path / "e")["notes"])
    assert found["method, re-ranked 5"]["R@8"]["mean"] == pytest.approx(found["method"]["R@8"]["mean"])
    for name in ("R@1", "mAP@R"):
        assert found["method"][name]["mean"] == pytest.approx(rows["with blocks"][name]["mean"])
    records = [row for row in table(tmp_path / "e")["records"] if row["row"] == "method"]
    assert [row["seed"] for row in records] == [0, 1]


def test_search_gives_both_arms_as_many_trials_and_keeps_the_best(monkeypatch):
    asked: list[dict] = []
    optimum = 2 * recipe_config("tiny-stack", {}).lr

    def trial(options, arm, stage, changes):
        asked.append(changes)
        value = (
            10
            - abs(np.log2(changes["lr"] / optimum))
            + 2 * changes.get("conditional_weight", 1) * (arm == "method")
        )
        return evidence.Trial(stage, changes, value, 0.0)

    monkeypatch.setattr(evidence, "trial_of", trial)
    options = SearchOptions(rates=(0.5, 1.0, 2.0))
    counts = {}
    for arm, base, settings in (
        ("baseline", {"stack": False}, evidence.BASELINE_STAGES),
        ("method", {"stack": True}, [*evidence.FORMS, *evidence.WEIGHTS]),
    ):
        trials = search_arm(options, arm, base, settings)
        counts[arm] = len(trials)
        best = max(trials, key=lambda trial: trial.map_at_r)
        assert best.changes["lr"] == pytest.approx(optimum)
        if arm == "method":
            assert best.changes["conditional_weight"] == 3.0
    assert len(evidence.BASELINE_STAGES) == len(evidence.FORMS) + len(evidence.WEIGHTS)
    assert abs(counts["baseline"] - counts["method"]) <= 2  # what was tried before is not tried again


@pytest.mark.slow
def test_variants_are_compared_on_held_out_classes(changes, tmp_path):
    arguments = ["reproduce", "variants", *changes, "--seeds", "0", "1", "--out", str(tmp_path / "v")]
    arguments += ["--val-share", "0.34", "--changes.batch_size", "8"]
    assert main([*arguments, "--variants", "stack=false", "width=8, conditional_warmup_epochs=1"]) == 0
    rows = {row["model"]: row for row in table(tmp_path / "v")["rows"]}
    assert list(rows) == ["as in the recipe", "stack=false", "width=8, conditional_warmup_epochs=1"]
    assert rows["stack=false"]["mAP@R"]["n"] == 2
    assert "[" in rows["stack=false"]["mAP@R difference"]
    recipe = (tmp_path / "v/runs/conditional_warmup_epochs-1_width-8/seed1/recipe.toml").read_text()
    for line in ('select_on = "val"', "width = 8", "conditional_warmup_epochs = 1", "seed = 1"):
        assert line in recipe


def test_arms_of_the_evidence(tmp_path):
    path = tmp_path / "chosen.json"
    path.write_text(
        json.dumps({"recipe": "tiny-stack", "baseline": {"lr": 1e-3}, "method": {"lr": 5e-4, "blocks": 2}})
    )
    rows = arms_of(EvidenceOptions(chosen=path))
    assert rows["baseline"] == {"stack": False, "lr": 1e-3}
    assert [row["lr"] for name, row in rows.items() if "x" in name] == [5e-4, 1.5e-3]
    assert rows["method"] == {"stack": True, "lr": 5e-4, "blocks": 2}
    assert rows["method, lr of the baseline"]["lr"] == 1e-3
    with pytest.raises(InputError, match="chosen for recipe tiny-stack, expected grocery-vit"):
        arms_of(EvidenceOptions(chosen=path, recipe="grocery-vit"))
    path.write_text("{}")
    with pytest.raises(InputError, match="no settings of a search"):
        arms_of(EvidenceOptions(chosen=path))


def test_differences_are_paired():
    rows = table_rows(
        {"a": [{"R@1": 1.0, "mAP@R": 2.0}] * 2, "b": [{"R@1": 2.0, "mAP@R": 2.0}, {"R@1": 2.5, "mAP@R": 1.0}]}
    )
    assert rows[1]["R@1 difference"].startswith("+1.25 [")
    assert rows[1]["mAP@R difference"].startswith("-0.50 [")


def test_bad_input_is_one_line(run, looked_at, refused, tmp_path):
    out = ("--out", str(tmp_path / "x"))
    assert "expected some of 1 to 1" in refused(
        "reproduce", "fig-attention", *looked_at, "--blocks", "2", *out
    )
    assert "three places for each" in refused(
        "reproduce", "fig-attention", *looked_at, "--triples", "1", *out
    )
    assert "expected four numbers" in refused("reproduce", "fig-parts", *looked_at, "--locations", "1", *out)
    assert "expected tokens, or keys:1" in refused(
        "reproduce", "fig-parts", *looked_at, "--descriptor", "x", *out
    )
    assert "--queries 0" in refused("reproduce", "neighbours", *looked_at[:4], "--queries", "0", *out)
    assert "--batches 0" in refused("reproduce", "fig-gradients", "--batches", "0", *out)
    assert "expected field=value" in refused("reproduce", "variants", "--variants", "width:8", *out)
    assert "no field widht; did you mean width?" in refused(
        "reproduce", "variants", "--variants", "widht=8", *out
    )
    assert "no such table or figure" in refused("reproduce", "fig-gradient")
