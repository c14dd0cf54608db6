"""The tables of the README are those of the results files."""

import json
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table, shown

PACKAGE = Path(__file__).resolve().parents[1]
RESULTS = {
    "grocery, ViT-Tiny, 96 px": "evidence_grocery_vit",
    "grocery, MobileNetV2, 96 px": "evidence_grocery_mobilenet",
    "grocery, MobileNetV2, 224 px": "evidence_grocery_mobilenet_224",
    "drawn, ResNet-10, 64 px": "evidence_tiny",
    "drawn, 480 classes of six": "evidence_products",
}
COLUMNS = {
    "baseline, lr x0.5": "lr x0.5",
    "baseline, lr x1.5": "lr x1.5",
    "method": "method",
    "method, re-ranked 100": "method, re-ranked",
}


def summary(metric: str) -> str:
    """Baselines with their deviation, then differences to them with their interval."""
    lines = []
    for title, name in RESULTS.items():
        found = json.loads((PACKAGE / "results" / f"{name}.json").read_text(encoding="utf-8"))
        rows = {row["model"]: row for row in found["rows"]}
        assert rows["baseline"][metric]["n"] == 8
        line = {metric: title, "baseline": shown(rows["baseline"][metric], 2)}
        lines.append(
            line | {to: rows.get(row, {}).get(f"{metric} difference") for row, to in COLUMNS.items()}
        )
    return markdown_table(lines)


@pytest.mark.parametrize("metric", ["R@1", "mAP@R"])
def test_readme_shows_the_results(metric):
    readme = PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    assert summary(metric) in readme.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(summary("R@1"), summary("mAP@R"), sep="\n\n")
