"""The tables of the README are those of the results files."""

import json
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table, shown_rows
from contrastive_cam.experiments.compare import by_folder

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", ["evidence", "evidence_more"])
def test_readme_shows_the_evidence(name):
    results, readme = PACKAGE / "results" / f"{name}.json", PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    found = json.loads(results.read_text(encoding="utf-8"))
    table = markdown_table(shown_rows(by_folder(found["rows"], found["records"])))
    assert table in readme.read_text(encoding="utf-8")
