"""A page in the browser for any localization model: drop a photo, see class, heat map and box (extra ``[demo]``)."""

from __future__ import annotations

from typing import Any

from .errors import InputError


def build_demo(model: Any, *, title: str) -> Any:
    """Make the Gradio page of a model.

    Args:
        model: a :class:`~attnmap_core.hub.PretrainedModel` in eval mode, on its device.
        title: heading of the page.

    Returns:
        A ``gradio.Interface``; ``.launch()`` serves it.

    Raises:
        InputError: if Gradio is not installed.
    """
    try:
        import gradio
    except ImportError:
        raise InputError('the demo needs Gradio; pip install "attnmap-core[demo]"') from None

    from .pictures import draw_boxes, overlay

    def localize(photo: Any, threshold: float) -> tuple[dict[str, float], Any, Any]:
        prediction = model.predict(photo, threshold=threshold)
        classes = {name: probability for _, name, probability in prediction.top}
        boxed = draw_boxes(photo, predicted_xyxy=prediction.boxes_xyxy)
        return classes, overlay(photo, prediction.score_map), boxed

    return gradio.Interface(
        localize,
        inputs=[
            gradio.Image(type="pil", label="photo"),
            gradio.Slider(0.0, 0.95, value=float(model.threshold), step=0.01, label="box threshold"),
        ],
        outputs=[
            gradio.Label(num_top_classes=5, label="class"),
            gradio.Image(type="pil", label="score map"),
            gradio.Image(type="pil", label="box"),
        ],
        title=title,
        flagging_mode="never",
    )
