"""A photo with what a method finds in it."""

from __future__ import annotations

import numpy as np
import torch
from attnmap_core.data.sources import ImageData
from attnmap_core.data.transforms import eval_transform
from attnmap_core.pictures import draw_boxes, overlay
from PIL import Image

from .localizers import Localizer


@torch.inference_mode()
def shown_photo(localizer: Localizer, data: ImageData, index: int) -> Image.Image:
    """Heat map over a photo with the known box (red) and the found one (green)."""
    sample = data[index]
    preprocessing = localizer.model.preprocessing
    [found] = localizer.find(eval_transform(preprocessing)(sample.image)[None])
    width, height = sample.image.size
    box = None
    if found.box_xyxy is not None:
        box = preprocessing.to_photo_coordinates(found.box_xyxy[None], width, height)
    heat = overlay(sample.image, preprocessing.to_photo_map(found.heat.astype(np.float32), width, height))
    return draw_boxes(heat, sample.boxes_xyxy, box, size_wh=(width, height))
