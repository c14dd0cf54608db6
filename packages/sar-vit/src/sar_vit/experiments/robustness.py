"""Table 5 at both scales: ImageNet-A and ImageNet-C, or what stands in for them on the embedded default."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from attnmap_core import cli
from attnmap_core.data.loaders import SampleDataset, eval_loader
from attnmap_core.data.sources import ImageData, load_data
from attnmap_core.data.transforms import Preprocessing
from attnmap_core.experiments import Run
from PIL import Image
from torch import Tensor

from ..evaluate import evaluate_imagenet_c, evaluate_model, load_split, open_model
from ..model import SARViT

if TYPE_CHECKING:
    from .tables import Options

SEVERITIES = (1, 2, 3)


def robustness_of(run: Run, options: Options) -> dict[str, float]:
    """``imagenet_a`` and ``mce`` of a run's model, percent.

    At the tiny scale ``imagenet_a`` is the accuracy on images of shifted colours, light and textures, and ``mce`` the
    mean error under six corruptions of torchvision at three severities, not divided by AlexNet's errors.
    """
    model = open_model(str(run.folder)).to(cli.choose_device(options.device)).eval()
    if options.scale == "tiny":
        data = run.config.data
        shifted = load_data(f"{data},domain_shift=1", "test")
        return {
            "imagenet_a": evaluate_model(model, shifted).metrics()["top1"],
            "mce": corruption_error(model, load_data(data, "test")),
        }
    found: dict[str, float] = {}
    if options.imagenet_a:
        data = load_split(options.imagenet_a, "test", {})
        found["imagenet_a"] = evaluate_model(model, data, protocols=("imagenet-a",)).metrics()["imagenet_a"]
    if options.imagenet_c:
        found["mce"] = evaluate_imagenet_c(model, options.imagenet_c).metrics()["mce"]
    return found


@torch.inference_mode()
def corruption_error(model: SARViT, data: ImageData) -> float:
    """Mean error in percent over six corruptions and three severities, as ImageNet-C has fifteen and five."""
    errors: list[float] = []
    device = next(model.parameters()).device
    for name in corruptions(1):
        for severity in SEVERITIES:
            samples = SampleDataset(
                data, Corrupted(model.preprocessing, corruptions(severity)[name]), seed=severity
            )
            wrong = [
                (model(batch["images"].to(device)).argmax(1).cpu() != batch["labels"]).numpy()
                for batch in eval_loader(samples, 64)
            ]
            errors.append(100 * float(np.concatenate(wrong).mean()))
    return float(np.mean(errors))


def corruptions(severity: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Corruptions of ``(3, h, w)`` uint8 images by name.

    Example:
        >>> sorted(corruptions(1))
        ['brightness', 'contrast', 'elastic', 'gaussian_blur', 'gaussian_noise', 'jpeg']
    """
    from torchvision.transforms import v2
    from torchvision.transforms.v2 import functional

    noise: Any = v2.Compose([
        v2.ToDtype(torch.float32, scale=True),
        v2.GaussianNoise(sigma=0.06 * severity),
        v2.ToDtype(torch.uint8, scale=True),
    ])  # fmt: skip
    return {
        "gaussian_noise": noise,
        "gaussian_blur": lambda pixels: functional.gaussian_blur(pixels, [7, 7], [0.6 * severity] * 2),
        "jpeg": lambda pixels: functional.jpeg(pixels, 30 // severity),
        "brightness": lambda pixels: functional.adjust_brightness(pixels, 1 + 0.3 * severity),
        "contrast": lambda pixels: functional.adjust_contrast(pixels, 0.7**severity),
        "elastic": v2.ElasticTransform(alpha=12.0 * severity, sigma=4.0),
    }


class Corrupted:
    """A model's own preprocessing after a corruption of the pixels.

    Args:
        preprocessing: of the model.
        corruption: of ``(3, h, w)`` uint8.
    """

    def __init__(self, preprocessing: Preprocessing, corruption: Callable[[Tensor], Tensor]) -> None:
        from attnmap_core.data.transforms import eval_transform

        self.corruption, self.after = corruption, eval_transform(preprocessing)

    def __call__(self, image: Image.Image) -> Tensor:
        """Normalised ``(3, h, w)``."""
        pixels = self.corruption(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        return self.after(Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()))
