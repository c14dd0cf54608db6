"""The card says what is known, and only that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from attnmap_core.model_card import CardFacts, Metric, write_card
from huggingface_hub import ModelCard

LEAST: dict[str, Any] = {"model_class": "SCM", "package": "scm_wsol"}

FULL: dict[str, Any] = LEAST | {
    "repo_id": "someone/scm-cub",
    "title": "SCM on CUB",
    "summary": "Finds birds.",
    "limits": "Birds only.",
    "license": "cc-by-nc-4.0",
    "tags": ["wsol"],
    "datasets": ["someone/cub"],
    "base_model": "timm/deit_small_patch16_224",
    "paper": "https://example.org/paper",
    "citation": "@inproceedings{bai}",
    "metrics": [
        {
            "name": "GT-known Loc",
            "value": 71.24,
            "std": 0.36,
            "seeds": [0, 1, 2],
            "data": "CUB-200-2011",
            "split": "test",
            "protocol": "scm",
            "published": 96.6,
        },
        {"name": "Mean IoU", "value": 0.51234, "unit": "", "data": "raccoons | zoo"},
    ],
    "recipe": "cub-scm",
    "train_command": "scm-wsol train cub-scm",
    "evaluate_command": "scm-wsol evaluate run --protocol scm",
    "seeds": [0, 1, 2],
    "hardware": "2 CPU cores",
    "duration": "6 min",
    "commit": "0123abc",
    "versions": {"torch": "2.6"},
    "labels": ["wren", "heron"],
}


def test_front_matter(tmp_path: Path) -> None:
    card = ModelCard.load(write_card(tmp_path, FULL))
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.library_name == "scm-wsol"
    assert card.data.pipeline_tag == "object-detection"
    assert card.data.tags == ["scm-wsol", "wsol"]
    assert card.data.datasets == ["someone/cub"]
    assert card.data.base_model == "timm/deit_small_patch16_224"
    first, second = card.data.eval_results
    assert (first.metric_type, first.metric_value) == ("gt_known_loc", 71.24)
    assert first.metric_name == "GT-known Loc (scm)"
    assert (first.dataset_name, first.dataset_type, first.dataset_split) == (
        "CUB-200-2011",
        "cub_200_2011",
        "test",
    )
    assert first.metric_args == {
        "protocol": "scm",
        "unit": "%",
        "std": 0.36,
        "seeds": [0, 1, 2],
        "published": 96.6,
    }
    assert second.metric_args in (None, {})
    assert second.dataset_split is None


def test_text_holds_every_fact(tmp_path: Path) -> None:
    text = write_card(tmp_path, FULL).read_text(encoding="utf-8")
    for fact in (
        "# SCM on CUB",
        "Finds birds.",
        'SCM.from_pretrained("someone/scm-cub")',
        "| metric | data | protocol | ours | published | seeds |",
        "| GT-known Loc | CUB-200-2011, test | scm | 71.2 ± 0.4 % | 96.6 % | 0, 1, 2 |",
        "| Mean IoU | raccoons \\| zoo |  | 0.5123 |  |  |",
        "```bash\nscm-wsol train cub-scm\n```",
        "```bash\nscm-wsol evaluate run --protocol scm\n```",
        "- Recipe: cub-scm",
        "- Seeds: 0, 1, 2",
        "- Hardware: 2 CPU cores",
        "- Duration: 6 min",
        "- Commit: `0123abc`",
        "- Versions: torch 2.6",
        "- Paper: https://example.org/paper",
        "Birds only.",
        "wren, heron",
        "@inproceedings{bai}",
    ):
        assert fact in text, fact


def test_what_is_unknown_stays_out(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    text = write_card(folder, LEAST).read_text(encoding="utf-8")
    assert 'SCM.from_pretrained("my-model")' in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == ["# SCM: my-model", "## Use"]
    for word in ("None", "N/A", "unknown", "license", "model-index", "More Information"):
        assert word not in text
    assert "\n\n\n" not in text


def test_columns_without_a_value_stay_out(tmp_path: Path) -> None:
    metrics = [Metric(name="PxAP", value=50.0, data="Creatures")]
    text = write_card(tmp_path, CardFacts(**LEAST, metrics=metrics)).read_text(encoding="utf-8")
    assert "| metric | data | ours |\n| --- | --- | --- |\n| PxAP | Creatures | 50.0 % |\n" in text


def test_an_older_card_is_replaced(tmp_path: Path) -> None:
    write_card(tmp_path, FULL)
    path = write_card(tmp_path, LEAST | {"title": "Second"})
    assert "SCM on CUB" not in path.read_text(encoding="utf-8")
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "facts", [{"colour": "red"}, {"metrics": [{"name": "a", "value": 1, "data": "b", "x": 1}]}]
)
def test_unknown_fields_are_named(tmp_path: Path, facts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has no field '(colour|x)'; expected some of"):
        write_card(tmp_path, LEAST | facts)
    assert not list(tmp_path.iterdir())
