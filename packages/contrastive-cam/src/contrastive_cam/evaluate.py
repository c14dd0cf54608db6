"""Score boxes against known ones: CorLoc under a rule fixed beforehand, beside floors, and the PsyNet protocol."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.data.loaders import eval_loader, gather_objects, samples_of
from attnmap_core.data.sources import ImageData, check_data_options, load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import write_json
from numpy.typing import NDArray
from tqdm import tqdm

from .inference import (
    CorLocProtocol,
    Multi,
    PsyNetProtocol,
    heat_map,
    largest_component_box,
    parse_rule,
    psynet_boxes,
)
from .localizers import Localizer, Rule
from .model import ContrastiveCAM
from .pooling import active_fraction

FLOORS = {"whole image": 1.0, "centred box 80 %": 0.8, "centred box 90 %": 0.9}
"""Boxes that see nothing, as shares of both sides of the photo: what a method has to beat."""

SWEEP: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(1, 20))
"""Thresholds of a sweep."""

ACTIVE_PHOTOS = 128
"""So many photos of each process tell how many channels are active."""

METRIC_NAMES = {
    "corloc_iou30": "CorLoc 0.3",
    "corloc_iou50": "CorLoc 0.5",
    "corloc_iou70": "CorLoc 0.7",
    "corloc_mean": "mean",
}
"""Titles of the metrics of :class:`~contrastive_cam.inference.CorLocProtocol`."""


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics by the titles that people read.

    Example:
        >>> shown({"corloc_iou50": 50.0, "images": 2.0})
        {'CorLoc 0.5': 50.0}
    """
    return {title: metrics[name] for name, title in METRIC_NAMES.items() if name in metrics}


def centred(share: float) -> NDArray[np.float64]:
    """``(4,)`` xyxy in shares of the photo: the middle ``share`` of both sides.

    Example:
        >>> centred(0.5).tolist()
        [0.25, 0.25, 0.75, 0.75]
    """
    return np.array([1 - share, 1 - share, 1 + share, 1 + share]) / 2


def floor_protocols(multi: Multi = "first") -> dict[str, tuple[NDArray[np.float64], CorLocProtocol]]:
    """For each of :data:`FLOORS` its box, in shares of the photo, and an empty protocol."""
    return {name: (centred(share), CorLocProtocol(multi=multi)) for name, share in FLOORS.items()}


@dataclass(kw_only=True)
class Evaluation:
    """What was measured on one split.

    Attributes:
        data, split: what it was measured on.
        rule: of the localizer's own boxes, in words.
        own: their protocol.
        rules: protocols of other cuts of the same heat maps, by name.
        sweep: protocols by share of the heat map's range; empty unless asked for.
        floors: protocols of boxes that see nothing, by name.
        psynet: the released PsyNet code's protocol; None unless asked for.
        facts: numbers by name: ``mask_area`` and, of trained models, ``active_fraction`` and ``ptap_acts`` in percent;
            ``empty`` photos without a box, ``unboxed`` photos without truth, ``seconds`` a photo.
    """

    data: str
    split: str
    rule: str
    own: CorLocProtocol
    rules: dict[str, CorLocProtocol] = field(default_factory=dict[str, CorLocProtocol])
    sweep: dict[float, CorLocProtocol] = field(default_factory=dict[float, CorLocProtocol])
    floors: dict[str, CorLocProtocol] = field(default_factory=dict[str, CorLocProtocol])
    psynet: PsyNetProtocol | None = None
    facts: dict[str, float] = field(default_factory=dict[str, float])

    def metrics(self) -> dict[str, float]:
        """CorLoc of the localizer's own boxes, percent; nothing without known boxes."""
        return self.own.compute() if self.own.rows else {}

    def best_threshold(self) -> float | None:
        """The share of the sweep with the best mean CorLoc; None without one."""
        scores = {share: p.compute()["corloc_mean"] for share, p in self.sweep.items() if p.rows}
        return max(scores, key=lambda share: (scores[share], -share)) if scores else None

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        found: dict[str, Any] = {
            "data": self.data,
            "split": self.split,
            "rule": self.rule,
            "metrics": self.metrics(),
            "rules": {name: p.compute() for name, p in self.rules.items() if p.rows},
            "floors": {name: p.compute() for name, p in self.floors.items() if p.rows},
            "facts": dict(self.facts),
        }
        if self.sweep:
            found["sweep"] = {f"{share:g}": p.compute() for share, p in self.sweep.items() if p.rows}
        if self.psynet is not None and self.psynet.rows:
            found["psynet"] = self.psynet.compute()
        return found

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows for people: own boxes, other cuts, the PsyNet protocol, the oracle of a sweep, the floors."""
        rows: list[dict[str, Any]] = [{"": f"{name}, cut at {self.rule}"} | shown(self.metrics())]
        rows += [
            {"": f"{name}, cut at {rule}"} | shown(p.compute()) for rule, p in self.rules.items() if p.rows
        ]
        if self.psynet is not None and self.psynet.rows:
            rows.append({"": f"{name}, PsyNet protocol"} | shown(self.psynet.compute()))
        best = self.best_threshold()
        if best is not None:
            rows.append({"": f"{name}, oracle cut {best:g}"} | shown(self.sweep[best].compute()))
        return rows + [
            {"": f"floor: {floor}"} | shown(p.compute()) for floor, p in self.floors.items() if p.rows
        ]


@torch.inference_mode()
def evaluate_localizer(
    localizer: Localizer,
    data: ImageData,
    *,
    accelerator: Any = None,
    rules: Sequence[Rule] = (),
    sweep: bool = False,
    floors: bool = True,
    psynet: bool = False,
    multi: Multi = "first",
    batch_size: int = 32,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Find a box in every photo and score it where one is known.

    Args:
        localizer: fitted.
        data: photos; those without boxes count in ``facts`` only.
        accelerator: for several processes; each takes whole batches, and all get the whole result.
        rules: further cuts of the same heat maps: shares, ``"mean"``, ``"otsu"``.
        sweep: also every share of :data:`SWEEP`.
        floors: also boxes that see nothing.
        psynet: also the PsyNet protocol; boxes of CUB are rounded as its code does.
        multi: which of several annotated objects counts, see :class:`~contrastive_cam.inference.CorLocProtocol`.
        batch_size, workers: of the loader.
        progress: show a bar on the main process.

    Raises:
        InputError: for a photo that cannot be read, or a model that does not see the whole photo.
    """
    model = localizer.model
    if model.preprocessing.crop != "none":
        raise InputError("evaluation needs a model that sees the whole photo; set preprocessing crop to none")
    size = model.preprocessing.size
    result = Evaluation(
        data=data.name,
        split=data.split,
        rule=str(localizer.rule),
        own=CorLocProtocol(multi=multi),
        rules={str(rule): CorLocProtocol(multi=multi) for rule in rules if rule != localizer.rule},
        sweep={share: CorLocProtocol(multi=multi) for share in SWEEP} if sweep else {},
        psynet=PsyNetProtocol(multi=multi) if psynet else None,
    )
    blind = floor_protocols(multi) if floors else {}
    watched: dict[int, dict[str, float]] = {}
    samples = samples_of(data, eval_transform(model.preprocessing), seed=0, with_targets=True)
    processes, process = (
        (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    )
    loader = eval_loader(samples, batch_size, processes=processes, process=process, workers=workers)
    total = None if data.streaming else -(-len(data) // (batch_size * processes))
    started = time.monotonic()
    for batch in tqdm(
        loader,
        total=total,
        desc=f"evaluate {data.split}",
        leave=False,
        disable=None if progress and not process else True,
    ):
        active = _active(model, batch["images"].to(localizer.device)) if len(watched) < ACTIVE_PHOTOS else {}
        for i, found in enumerate(localizer.find(batch["images"])):
            index = int(batch["index"][i])
            level = found.heat >= 0.2
            watched[index] = {
                "empty": float(found.box_xyxy is None),
                "mask_area": 100 * float(level.mean()),
                **active,
            }
            boxes, photo_size = batch["boxes_xyxy"][i], batch["size_wh"][i]
            if not len(boxes):
                continue
            scale = np.tile(np.asarray(photo_size) / np.asarray(size[::-1]), 2)

            def in_photo(box: NDArray[np.float64] | None, scale: NDArray[np.float64] = scale) -> Any:
                return None if box is None else box * scale

            result.own.add(index, box_xyxy=in_photo(found.box_xyxy), boxes_xyxy=boxes)
            for rule, protocol in {**result.rules, **result.sweep}.items():
                cut: Any = float(rule) if rule not in ("mean", "otsu") else rule
                protocol.add(
                    index, box_xyxy=in_photo(largest_component_box(found.heat, cut)), boxes_xyxy=boxes
                )
            for box, protocol in blind.values():
                protocol.add(index, box_xyxy=box * np.tile(photo_size, 2), boxes_xyxy=boxes)
            if result.psynet is not None:
                in_frame = psynet_boxes(boxes, photo_size, as_xywh=data.name.startswith("cub"))
                heat = found.heat if size == (224, 224) else heat_map(found.heat, (224, 224))
                result.psynet.add(index, score_map=heat, boxes_xyxy=in_frame)
    seconds = time.monotonic() - started
    result.floors = {name: protocol for name, (_, protocol) in blind.items()}
    protocols = [result.own, *result.rules.values(), *result.sweep.values(), *result.floors.values()]
    for protocol in protocols + ([result.psynet] if result.psynet is not None else []):
        protocol.merge(gather_objects(accelerator, protocol.state()))
    rows = {i: row for part in gather_objects(accelerator, watched) for i, row in part.items()}
    if rows:
        names = dict.fromkeys(name for row in rows.values() for name in row)
        result.facts = {
            name: float(np.mean([row[name] for row in rows.values() if name in row])) for name in names
        }
        result.facts["empty"] = sum(row["empty"] for row in rows.values())
        result.facts["unboxed"] = float(len(rows) - len(result.own.rows))
        result.facts["seconds"] = seconds * processes / len(rows)
    return result


def _active(model: Any, images: torch.Tensor) -> dict[str, float]:
    """How many channels are at work in a batch, in percent: whether k can matter."""
    if not isinstance(model, ContrastiveCAM):
        return {}
    found = active_fraction(model.gate(model.backbone(images).map), model.ratio)
    return {"active_fraction": 100 * float(found.mean), "ptap_acts": 100 * float(found.acts)}


# --- For people ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """CorLoc of a model's boxes on data with known ones, beside floors; writes metrics.json and report.html where
    ``out`` is given."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id."""
    data: str = "synthetic"
    """Data source; ``contrastive-cam list`` shows what it may be."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source, such as split_file."""
    skip_unreadable: bool = False
    """List and leave out photos that cannot be read."""
    clip_boxes: bool = False
    """Cut boxes that leave their photo."""
    split: Literal["train", "val", "test", "all"] = "test"
    """Part of the data to measure."""
    threshold: str = "auto"
    """Where heat maps are cut: a share such as 0.2, or mean, otsu, zero; auto: the model's own."""
    rules: tuple[str, ...] = ()
    """Further cuts to compare, such as 0.3 mean otsu."""
    sweep_from: Literal["none", "train", "val"] = "none"
    """Labelled split to choose the cut on, among 0.05 to 0.95; it is then frozen."""
    oracle: bool = False
    """Also the cut that is best on the measured split itself; it flatters."""
    psynet: bool = False
    """Also the evaluation of the released PsyNet code."""
    multi: Literal["first", "any", "best"] = "first"
    """Which of several annotated objects counts."""
    batch_size: int = 32
    """Photos a forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path | None = None
    """Folder for metrics.json and report.html."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def evaluate_command(arguments: list[str]) -> None:
    """``contrastive-cam evaluate MODEL --data ... [--psynet]``."""
    from attnmap_core.files import new_output_folder
    from attnmap_core.recipes import run_record
    from attnmap_core.report import run_facts

    from .cli import load_model
    from .report import method_name, write_evaluation_report

    options = cli.parse(EvaluateOptions, arguments, command="contrastive-cam evaluate")
    folder = cli.resolve_model(options.model)
    further: list[Rule | None] = [parse_rule(text) for text in options.rules]
    rule = parse_rule(options.threshold)
    model = load_model(folder).to(cli.choose_device(options.device)).eval()
    source: dict[str, Any] = {**options.data_options}
    source |= {name: True for name in ("skip_unreadable", "clip_boxes") if getattr(options, name)}
    check_data_options(source)
    data = load_data(options.data, options.split, **source)
    if options.out is not None:
        new_output_folder(options.out, overwrite=options.overwrite)
    shared: dict[str, Any] = {
        "multi": options.multi,
        "batch_size": options.batch_size,
        "workers": options.workers,
    }
    if options.sweep_from != "none":
        calibration = load_data(options.data, options.sweep_from, **source)
        rule = evaluate_localizer(
            Localizer(model, "model"), calibration, sweep=True, floors=False, **shared
        ).best_threshold()
        if rule is None:
            raise InputError(
                f"--sweep-from {options.sweep_from}: no photo with a box in it; give --threshold"
            )
    localizer = Localizer(model, "model", rule)
    cuts: list[Rule] = [cut for cut in further if cut is not None and cut != "zero"]
    result = evaluate_localizer(
        localizer,
        data,
        rules=cuts,
        sweep=options.oracle,
        psynet=options.psynet,
        **shared,
    )
    if not result.own.rows:
        raise InputError(f"{data.name}, {data.split}: no photo with a known box; nothing to score")
    sys.stdout.write(f"{data.name}, {data.split}\n{format_table(result.table(method_name(model)))}\n")
    if options.out is not None:
        write_json(options.out / "metrics.json", result.to_json())
        facts = run_facts(run_record(packages=("contrastive-cam",)))
        report = write_evaluation_report(options.out / "report.html", localizer, data, result, facts=facts)
        sys.stdout.write(f"\n{report}\n")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
