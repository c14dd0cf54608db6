"""The tables and figures by the name that ``sar-vit reproduce`` takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial

from attnmap_core.cli import Reproduction


def _lazily(module: str, function: str, name: str) -> Callable[[list[str]], None]:
    def run(arguments: list[str]) -> None:
        partial(getattr(importlib.import_module(f".{module}", __name__), function), name)(arguments)

    return run


_TABLES = {
    "table1a": "weight λ of the loss",
    "table1b": "ablation of the last block's form and the loss, rows A to F",
    "table1c": "length of training",
    "table2": "ImageNet-1K: five architectures, accuracy and sizes",
    "table3": "small data sets from scratch: Cars, Clipart, Painting, Sketch",
    "table4": "fine-tuning: CIFAR-10, CIFAR-100, Flowers, Pets, with and without SAR before and after",
    "table5": "out-of-distribution images: ImageNet-A, ImageNet-C",
    "table6": "Jaccard index of attention maps with objects, PASCAL VOC 2012",
    "table7": "ImageNet-100: four architectures",
    "table8": "shares of ImageNet-100's training images",
    "table9a": "linear probes of MoCo-v3 and DINO",
    "table9b": "Jaccard index of MoCo-v3 and DINO",
    "table12": "ADE20K with PVT-Small and Semantic FPN",
    "table13": "DRLoc and SAR",
    "appB": "total variation, cosine similarity, softmax in place of the loss",
}
_FIGURES = {
    "fig1": "attention masks: supervised, DINO, SAR",
    "fig2": "schematic: similarity map, thresholded map, components",
    "fig3": "accuracy by epoch, plain and SAR",
    "fig4": "attention masks of all heads, plain and SAR",
    "fig6": "attention masks of all heads, MoCo-v3 and MoCo-v3 + SAR",
    "fig7": "attention masks of all heads, DINO and DINO + SAR",
    "fig8": "as fig4, more images",
}

REPRODUCTIONS: dict[str, Reproduction] = {
    **{
        name: Reproduction(summary=summary, run=_lazily("tables", "table_command", name))
        for name, summary in _TABLES.items()
    },
    **{
        name: Reproduction(summary=summary, run=_lazily("figures", "figure_command", name))
        for name, summary in _FIGURES.items()
    },
    "evidence": Reproduction(
        summary="rows A, C, E, F from scratch on the embedded default or on photos, seed by seed",
        run=_lazily("evidence", "evidence_command", "evidence"),
    ),
}
