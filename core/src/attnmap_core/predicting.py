"""Photos in, annotations, heat maps and a report out: the whole of the ``predict`` verb."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from .data.images import list_images, load_image
from .errors import InputError
from .export import export_predictions
from .files import atomic_folder, write_json
from .pictures import overlay
from .prediction import Prediction
from .recipes import run_record
from .report import PredictionReport, run_facts

if TYPE_CHECKING:
    from .cli import PredictOptions

logger = logging.getLogger(__name__)


def predict_folder(model: Any, options: PredictOptions, *, command: str) -> str:
    """Predict every photo and write annotations, ``heatmaps/*.jpg``, ``predictions.json`` and ``report.html``.

    The output folder appears only when it is complete. Photos stream through the model; what is kept of each is
    its boxes and its small score map.

    Args:
        model: a :class:`~attnmap_core.hub.PretrainedModel`.
        options: the parsed options of the verb.
        command: the command line, for the report.

    Returns:
        Path of the report.

    Raises:
        InputError: for no photos, an unreadable photo (unless skipping), or an output folder that exists.
    """
    from .cli import choose_device

    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file, expected a folder; choose another --out")
    if out.is_dir() and any(out.iterdir()) and not options.overwrite:
        raise InputError(f"{out}: output folder exists; pass --overwrite or choose another --out")
    if options.threshold is not None and not 0 <= options.threshold < 1:
        raise InputError(f"--threshold {options.threshold}: expected a share of the maximum, 0 <= share < 1")
    if options.batch_size < 1:
        raise InputError(f"--batch-size {options.batch_size}: expected at least 1")
    photos = list_images(options.photos)
    if any(photo.resolve().is_relative_to(out.resolve()) for photo in photos):
        raise InputError(f"{out}: holds photos to predict, which would be overwritten; choose another --out")
    model = model.to(choose_device(options.device)).eval()
    with atomic_folder(out) as folder:
        (folder / "heatmaps").mkdir()
        unreadable: list[tuple[str, str]] = []
        kept: list[Prediction] = []
        report = PredictionReport()
        for prediction in tqdm(
            _predictions(model, photos, options, unreadable), total=len(photos), desc="predict", unit="photo"
        ):
            name = (
                f"{len(kept):06d}_{Path(prediction.source).stem[:50]}.jpg"  # the longest name has 255 bytes
            )
            photo = load_image(prediction.source)
            heat = overlay(photo, prediction.score_map, longest_side=(1, 640))
            heat.save(folder / "heatmaps" / name, quality=88)
            report.add(photo, prediction)
            # The annotations need the boxes only; maps of a large folder would not fit in memory.
            kept.append(dataclasses.replace(prediction, score_map=np.zeros((0, 0), np.float32)))
        if not kept:
            raise InputError(
                f"{' '.join(options.photos)}: none of {len(photos)} photos could be read; first: {unreadable[0][1]}"
            )
        export_predictions(kept, folder, format=options.format, labels=list(model.labels or []))
        write_json(folder / "predictions.json", [_row(prediction) for prediction in kept])
        title = f"{len(kept)} photos seen by {type(model).__name__}"
        facts = run_facts(run_record()) | {"command": command}
        report.write(folder / "report.html", title=title, unreadable=unreadable, facts=facts)
    for name, reason in unreadable:
        logger.warning("skipped %s: %s", name, reason)
    if unreadable:
        logger.warning("%d of %d photos skipped", len(unreadable), len(photos))
    return str(out / "report.html")


def _predictions(
    model: Any, photos: list[Path], options: PredictOptions, unreadable: list[tuple[str, str]]
) -> Iterator[Prediction]:
    yield from model.predict_iter(
        photos,
        threshold=options.threshold,
        contours=options.boxes,
        batch_size=options.batch_size,
        on_unreadable=(lambda source, reason: unreadable.append((str(source), str(reason))))
        if options.skip_unreadable
        else "error",
    )


def _row(prediction: Prediction) -> dict[str, Any]:
    return {
        "source": prediction.source,
        "width": prediction.width,
        "height": prediction.height,
        "label": prediction.label,
        "label_name": prediction.label_name,
        "probability": round(prediction.probability, 6),
        "boxes_xyxy": np.round(prediction.boxes_xyxy, 2).tolist(),
        "box_scores": np.round(prediction.box_scores, 4).tolist(),
        "threshold": prediction.threshold,
    }
