"""The tables of the README are those of the results files."""

import json
from functools import partial
from pathlib import Path

import pytest
from attnmap_core.experiments import markdown_table, shown

PACKAGE = Path(__file__).resolve().parents[1]
RESULTS = {
    "grocery, ViT-Tiny, 96 px": "evidence_grocery_vit",
    "the same, `width = 64`": "evidence_grocery_vit_width",
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


VARIANTS = {"drawn": "variants_tiny", "grocery, ViT-Tiny": "variants_grocery_vit"}


def results(name: str) -> dict:
    return json.loads((PACKAGE / "results" / f"{name}.json").read_text(encoding="utf-8"))


def summary(metric: str) -> str:
    """Baselines with their deviation, then differences to them with their interval."""
    lines = []
    for title, name in RESULTS.items():
        rows = {row["model"]: row for row in results(name)["rows"]}
        assert rows["baseline"][metric]["n"] == 8
        line = {metric: title, "baseline": shown(rows["baseline"][metric], 2)}
        lines.append(
            line | {to: rows.get(row, {}).get(f"{metric} difference") for row, to in COLUMNS.items()}
        )
    return markdown_table(lines)


def variants() -> str:
    """Single settings, the baseline first, then by name: differences to the recipe as it is."""
    cells: dict[str, dict[str, str]] = {}
    for title, name in VARIANTS.items():
        for row in results(name)["rows"][1:]:
            cells.setdefault(row["model"], {}).update(
                {f"{title}: {metric}": row[f"{metric} difference"] for metric in ("R@1", "mAP@R")}
            )
    columns = [f"{title}: {metric}" for title in VARIANTS for metric in ("R@1", "mAP@R")]
    order = sorted(cells, key=lambda row: (row != "stack=false", *_natural(row)))
    return markdown_table(
        [{"": f"`{row}`"} | {column: cells[row].get(column) for column in columns} for row in order]
    )


def six_mutual_blocks() -> str:
    """As the evidence's own table, of two metrics."""
    columns = ("R@1", "R@1 difference", "mAP@R", "mAP@R difference")
    rows = results("evidence_mutual")["rows"]
    assert {row["R@1"]["n"] for row in rows} == {5}
    return markdown_table(
        [
            {"": row["model"]}
            | {c: v if isinstance(v := row.get(c), str) else v and shown(v, 2) for c in columns}
            for row in rows
        ]
    )


def _natural(variant: str) -> tuple[str, float]:
    name, _, value = variant.partition("=")
    return name, float(value) if value.isdecimal() else 0.0


TABLES = {
    "R@1": partial(summary, "R@1"),
    "mAP@R": partial(summary, "mAP@R"),
    "variants": variants,
    "mutual": six_mutual_blocks,
}


@pytest.mark.parametrize("table", TABLES)
def test_readme_shows_the_results(table):
    readme = PACKAGE / "README.md"
    if not readme.is_file():
        pytest.skip("tests run away from the tree, where the README is not")
    assert TABLES[table]() in readme.read_text(encoding="utf-8")


if __name__ == "__main__":
    print(*(table() for table in TABLES.values()), sep="\n\n")
