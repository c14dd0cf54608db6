"""The evidence table of the README is that of the results files."""

import json
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table, shown_rows
from sar_vit.experiments.evidence import METRICS
from sar_vit.experiments.tables import DIGITS, TITLES

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["embedded", "caltech101_animals", "grocery"])
def test_readme_shows_the_results(name):
    results, readme = PACKAGE / "results" / f"evidence_{name}.json", PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    digits = {TITLES[metric]: DIGITS.get(metric, 1) for metric in METRICS}
    assert markdown_table(shown_rows(rows, digits)) in readme.read_text(encoding="utf-8")
