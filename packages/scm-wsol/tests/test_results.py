"""The tables of the README are those of the results files."""

import json
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table
from scm_wsol.experiments.real_photos import markdown

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "render"),
    [("real_photos", markdown), ("quickstart", lambda found: markdown_table(found["rows"]) + "\n")],
)
def test_readme_shows_the_results(name, render):
    results, readme = PACKAGE / "results" / f"{name}.json", PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    assert render(json.loads(results.read_text(encoding="utf-8"))) in readme.read_text(encoding="utf-8")
