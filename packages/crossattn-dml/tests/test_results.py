"""The tables of the README are those of the results files."""

import json
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table, shown_rows

PACKAGE = Path(__file__).resolve().parents[1]
COLUMNS = ("model", "R@1", "mAP@R", "NMI", "R@1 difference", "mAP@R difference")


def table(found: dict) -> str:
    rows = [{name: row.get(name) for name in COLUMNS} for row in found["rows"]]
    return markdown_table(shown_rows(rows, dict.fromkeys(COLUMNS, 2)))


@pytest.mark.parametrize(
    "name",
    [
        "evidence_grocery_vit",
        "evidence_grocery_mobilenet",
        "evidence_grocery_mobilenet_224",
        "evidence_products",
        "evidence_tiny",
    ],
)
def test_readme_shows_the_results(name):
    results, readme = PACKAGE / "results" / f"{name}.json", PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    assert table(json.loads(results.read_text(encoding="utf-8"))) in readme.read_text(encoding="utf-8")
