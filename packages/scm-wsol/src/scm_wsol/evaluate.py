"""Evaluate TS-CAM and SCM models: classes, boxes and masks, under the protocols that papers use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from attnmap_core import cli
from attnmap_core.boxes import resize_boxes, upsample_score_map
from attnmap_core.data.loaders import eval_loader, gather_objects, samples_of
from attnmap_core.data.sources import ImageData, check_data_options, check_labels, load_data
from attnmap_core.data.transforms import eval_transform
from attnmap_core.errors import InputError
from attnmap_core.experiments import format_table
from attnmap_core.files import write_json
from attnmap_core.metrics.localization import (
    Protocol,
    ScmProtocol,
    StandardProtocol,
    TscamProtocol,
    centre_prior,
    centred_box,
    combine_masks,
    wsol_thresholds,
)
from attnmap_core.threads import in_pieces
from numpy.typing import NDArray
from tqdm import tqdm

from .model import TSCAM

FLOORS = {"whole image": lambda size: centred_box(1.0, size), "centred box 80 %": lambda size: centred_box(0.8, size),
          "centre prior": centre_prior}  # fmt: skip
"""Score maps that see nothing, by name: what a method has to beat."""

KIND_NAMES = {"cam": "CAM", "att": "ATT", "tscam": "TS-CAM", "scm": "SCM"}
MAP_NAMES = {"cam": "map S", "att": "map f", "tscam": "map S·f", "scm": "map S·minmax(f)"}
METRIC_NAMES = {
    "top1_cls": "Top-1 Cls",
    "top5_cls": "Top-5 Cls",
    "top1_loc": "Top-1 Loc",
    "top5_loc": "Top-5 Loc",
    "gt_known": "GT-known",
    "box_acc_iou30": "GT-known 0.3",
    "box_acc_iou70": "GT-known 0.7",
    "max_box_acc_v1": "MaxBoxAccV1",
    "max_box_acc_v2": "MaxBoxAccV2",
    "v2_iou30": "V2 at 0.3",
    "v2_iou50": "V2 at 0.5",
    "v2_iou70": "V2 at 0.7",
    "pxap": "PxAP",
    "miou": "mIoU",
}


@dataclass(kw_only=True)
class Evaluation:
    """What was measured on one split.

    Attributes:
        data, split: what it was measured on.
        own: kind of the model's own score map, the first of ``kinds``.
        kinds: standard protocol by kind of score map.
        floors: standard protocol of maps that see nothing, by name.
        others: further protocols of the model's own map, by name.
    """

    data: str
    split: str
    own: str
    kinds: dict[str, StandardProtocol]
    floors: dict[str, StandardProtocol] = field(default_factory=dict[str, StandardProtocol])
    others: dict[str, Protocol] = field(default_factory=dict[str, Protocol])

    def metrics(self, kind: str | None = None) -> dict[str, float]:
        """Standard metrics of one kind of score map, the model's own by default; percent."""
        return self.kinds[kind or self.own].compute()

    def threshold(self) -> float | None:
        """Threshold that is best for GT-known; None without boxes."""
        return self.metrics().get("threshold")

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {
            "data": self.data,
            "split": self.split,
            "map": self.own,
            "protocol standard": {kind: protocol.compute() for kind, protocol in self.kinds.items()},
            "floors": {name: protocol.compute() for name, protocol in self.floors.items()},
            **{f"protocol {name}": protocol.compute() for name, protocol in self.others.items()},
        }

    def table(self, name: str) -> list[dict[str, Any]]:
        """Rows for people: the model's own map, other maps of the same weights, then the floors."""
        rows = [
            {"": name if kind == self.own else f"{name} weights, {MAP_NAMES.get(kind, kind)}"}
            | _shown(protocol.compute())
            for kind, protocol in self.kinds.items()
        ]
        return rows + [
            {"": f"floor: {floor}"} | _shown(protocol.compute()) for floor, protocol in self.floors.items()
        ]


def _shown(metrics: dict[str, float]) -> dict[str, float]:
    return {title: metrics[name] for name, title in METRIC_NAMES.items() if name in metrics}


@torch.inference_mode()
def evaluate_model(
    model: TSCAM,
    data: ImageData,
    *,
    accelerator: Any = None,
    kinds: Sequence[str] | None = None,
    protocols: Sequence[str] = ("standard",),
    floors: bool = False,
    step: float = 0.01,
    threshold: float | None = None,
    fixed_threshold: float = 0.1,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Run a model over labelled images and measure its score maps.

    Args:
        model: in evaluation mode, on its device.
        data: images with labels; boxes and masks where there are some.
        accelerator: for several processes; each takes whole batches, and all get the whole result.
        kinds: score maps to measure; the model's own by default. See :meth:`TSCAM.class_maps`.
        protocols: ``standard`` always; ``scm`` and ``tscam`` besides.
        floors: also measure maps that see nothing.
        step: thresholds are ``arange(0, 1, step)``.
        threshold: freeze the threshold of GT-known and Top-k Loc.
        fixed_threshold: of protocol ``tscam``.
        batch_size, workers: of the loader.
        progress: show a bar on the main process.

    Raises:
        InputError: for an unknown protocol, or a model that does not see the whole photo.
    """
    if unknown := set(protocols) - {"standard", "scm", "tscam"}:
        raise InputError(f"protocol {sorted(unknown)[0]}: unknown; expected standard, scm or tscam")
    if model.preprocessing.crop != "none":
        raise InputError("evaluation needs a model that sees the whole photo; set preprocessing crop to none")
    thresholds = wsol_thresholds(step)
    size = model.preprocessing.size
    kinds = tuple(kinds or (model.own_kind,))
    result = Evaluation(
        data=data.name,
        split=data.split,
        own=kinds[0],
        kinds={kind: StandardProtocol(thresholds, threshold=threshold) for kind in kinds},
        floors={name: StandardProtocol(thresholds) for name in FLOORS} if floors else {},
    )
    scm = ScmProtocol(thresholds) if "scm" in protocols else None
    tscam = TscamProtocol(fixed_threshold) if "tscam" in protocols else None
    blind = {name: make(size) for name, make in FLOORS.items()}
    samples = samples_of(data, eval_transform(model.preprocessing), seed=0, with_targets=True)
    processes, process = (
        (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
    )
    loader = eval_loader(samples, batch_size, processes=processes, process=process, workers=workers)
    device = next(model.parameters()).device
    total = None if data.streaming else -(-len(data) // (batch_size * processes))

    def measure(
        batch: dict[str, Any], ranks: list[int], raw: dict[str, Any], best: Any, best_classes: Any, i: int
    ) -> None:
        """Hand image i of a batch to every protocol."""
        index = int(batch["index"][i])
        photo_boxes, photo_size = batch["boxes_xyxy"][i], batch["size_wh"][i]
        boxes = resize_boxes(photo_boxes, photo_size, (size[1], size[0]))
        mask = None
        if batch["mask"][i] is not None:
            mask = combine_masks([batch["mask"][i]], batch["ignore"][i], size)
        for kind, protocol in result.kinds.items():
            score_map = upsample_score_map(raw[kind][i], size)
            protocol.add(index, rank=ranks[i], score_map=score_map, boxes_xyxy=boxes, mask=mask)
        for name, protocol in result.floors.items():
            protocol.add(index, rank=None, score_map=blind[name], boxes_xyxy=boxes, mask=mask)
        if not len(photo_boxes) or not (scm or tscam):
            return
        boxes = resize_boxes(photo_boxes, photo_size, (size[1], size[0]), "scm")
        if scm and best is not None:
            linear = upsample_score_map(best[i], size, "bilinear")
            scm.add(
                index,
                label=int(batch["labels"][i]),
                classes=best_classes[i],
                score_maps=linear,
                boxes_xyxy=boxes,
            )
        if tscam:
            linear = upsample_score_map(raw[kinds[0]][i], size, "bilinear")
            tscam.add(index, rank=ranks[i], score_map=linear, boxes_xyxy=boxes)

    for batch in tqdm(
        loader,
        total=total,
        desc=f"evaluate {data.split}",
        leave=False,
        disable=None if progress and not process else True,
    ):
        images, labels = batch["images"].to(device), batch["labels"].to(device)
        maps = model.maps(images)
        ranked = maps.logits.argsort(dim=1, descending=True, stable=True)
        ranks = (ranked == labels[:, None]).int().argmax(dim=1).tolist()
        raw = {kind: _numpy(model.class_maps(maps, labels, kind)) for kind in kinds}
        best = _numpy(model.class_maps(maps, ranked[:, :5])) if scm else None
        best_classes = ranked[:, :5].cpu().numpy()
        image = partial(measure, batch, ranks, raw, best, best_classes)
        # Most of it is compiled and leaves the GIL to the other threads.
        in_pieces(lambda start, stop, image=image: [image(i) for i in range(start, stop)], len(labels))
    result.others = {name: p for name, p in (("scm", scm), ("tscam", tscam)) if p is not None}
    for protocol in (*result.kinds.values(), *result.floors.values(), *result.others.values()):
        protocol.merge(gather_objects(accelerator, protocol.state()))
    return result


def _numpy(maps: torch.Tensor) -> NDArray[np.float64]:
    return maps.double().cpu().numpy()


# --- For people ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Measure a model on labelled images; writes metrics.json and report.html where ``out`` is given."""

    model: tyro.conf.Positional[str]
    """Model folder, run folder or Hub id."""
    data: str = "synthetic"
    """Data source; ``scm-wsol list`` shows what it may be."""
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
    protocols: tuple[Literal["standard", "scm", "tscam"], ...] = ("standard",)
    """Metric protocols."""
    kinds: tuple[str, ...] = ()
    """Score maps to measure: cam, att, tscam, scm, combine:l,m; the model's own where not given."""
    threshold_from: Literal["none", "train", "val"] = "none"
    """Split to find the threshold on, which is then frozen; none: best on the measured split."""
    threshold_step: float = 0.01
    """Thresholds are arange(0, 1, step)."""
    fixed_threshold: float = 0.1
    """Threshold of protocol tscam: 0.1 for CUB, 0.12 for ILSVRC in the released code."""
    batch_size: int = 64
    """Images a forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """cpu, cuda, mps or auto."""
    out: Path | None = None
    """Folder for metrics.json and report.html."""
    overwrite: bool = False
    """Replace the folder where it exists."""


def evaluate_command(arguments: list[str]) -> None:
    """``scm-wsol evaluate MODEL --data ... [--protocols standard scm tscam]``."""
    from attnmap_core.files import new_output_folder
    from attnmap_core.recipes import run_record
    from attnmap_core.report import run_facts

    from .cli import load_model
    from .report import write_evaluation_report

    options = cli.parse(EvaluateOptions, arguments, command="scm-wsol evaluate")
    folder = cli.resolve_model(options.model)
    model = load_model(folder).to(cli.choose_device(options.device)).eval()
    source: dict[str, Any] = {**options.data_options}
    source |= {name: True for name in ("skip_unreadable", "clip_boxes") if getattr(options, name)}
    check_data_options(source)
    data = load_data(options.data, options.split, **source)
    check_labels(model.labels, data)
    if options.out is not None:
        new_output_folder(options.out, overwrite=options.overwrite)
    shared: dict[str, Any] = {
        "step": options.threshold_step,
        "batch_size": options.batch_size,
        "workers": options.workers,
    }
    threshold = None
    if options.threshold_from != "none":
        other = load_data(options.data, options.threshold_from, **source)
        threshold = evaluate_model(model, other, **shared).threshold()
    result = evaluate_model(
        model,
        data,
        kinds=options.kinds or None,
        protocols=options.protocols,
        floors=True,
        threshold=threshold,
        fixed_threshold=options.fixed_threshold,
        **shared,
    )
    sys.stdout.write(
        f"{data.name}, {data.split}, protocol standard\n{format_table(result.table(type(model).__name__))}\n"
    )
    for name, protocol in result.others.items():
        rows = [{"metric": metric, "value": value} for metric, value in protocol.compute().items()]
        sys.stdout.write(f"\nprotocol {name}\n{format_table(rows)}\n")
    if options.out is not None:
        write_json(options.out / "metrics.json", result.to_json())
        facts = run_facts(run_record(packages=("scm-wsol",)))
        report = write_evaluation_report(options.out / "report.html", model, data, result, facts=facts)
        sys.stdout.write(f"\n{report}\n")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
