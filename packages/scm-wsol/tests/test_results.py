"""The tables of the README are those of the results files."""

import json
from pathlib import Path

import pytest
from scm_wsol.experiments.real_photos import markdown
from scm_wsol.quickstart import markdown_table

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "render"),
    [("real_photos", markdown), ("quickstart", lambda found: markdown_table(found["rows"]))],
)
def test_readme_shows_the_results(name, render):
    results, readme = PACKAGE / "results" / f"{name}.json", PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    assert render(json.loads(results.read_text(encoding="utf-8"))) in readme.read_text(encoding="utf-8")
