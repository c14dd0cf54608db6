"""Models that save, load and publish themselves, and turn photos into predictions.

A model folder holds ``config.json`` (constructor values, preprocessing, label names), ``model.safetensors`` and
a card. Loading is strict, never unpickles and never fetches backbone weights: the file holds every weight.
"""

from __future__ import annotations

import inspect
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, NamedTuple, Self, TypeAlias, cast

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from torch import Tensor, nn

from .backbones import evaluating, mismatched_keys, read_weights
from .errors import InputError
from .files import atomic_file, atomic_folder, read_json, write_json
from .prediction import Prediction

if TYPE_CHECKING:
    from .data.transforms import Preprocessing

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
CARD_FILE = "README.md"

Photo: TypeAlias = str | PathLike[str] | bytes | BinaryIO | Image.Image
OnUnreadable: TypeAlias = Literal["error", "skip"] | Callable[[str, str], object]

_PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")
_WEIGHT_SOURCES = ("pretrained", "weights")
_STATED_APART = ("labels", "preprocessing", "threshold")

_logger = logging.getLogger(__name__)


class Localization(NamedTuple):
    """What a model says about a batch: the class, and where it looks for it.

    Attributes:
        logits: ``(b, C)``.
        score_maps: ``(b, h, w)`` of the predicted class on the model's own grid; any sign and scale.
    """

    logits: Tensor
    score_maps: Tensor


class PretrainedModel(nn.Module, PyTorchModelHubMixin):
    """Base of the models of all packages: strict ``from_pretrained``, ``save_pretrained``, ``push_to_hub``, ``predict``.

    A subclass takes plain values in its constructor (numbers, strings, None, and lists, tuples or dicts of these)
    and defines :meth:`localize`. What it was constructed with is what ``config.json`` says, except for

    - ``pretrained`` and ``weights``, which name where backbone weights came from: they are noted under
      ``"provenance"`` and are off when the model is loaded, so that loading downloads and reads nothing more;
    - ``labels``, ``preprocessing`` and ``threshold``, which are attributes, may change after construction, and
      are saved as they are then.

    Class keywords (``license``, ``tags``, ``pipeline_tag``, ``paper_url``) go to the model card.

    Attributes:
        labels: class names in the order of the logits; empty if unknown.
        threshold: share of a score map's maximum above which pixels make the boxes.
        interpolation: how score maps are upsampled to the input size.

    Raises:
        TypeError: at construction, if an argument is not a plain value.

    Example:
        >>> class Mean(PretrainedModel):
        ...     def __init__(self, num_classes: int = 2):
        ...         super().__init__()
        ...         self.head = nn.Conv2d(3, num_classes, 4, stride=4)
        ...     def localize(self, images):
        ...         maps = self.head(images)
        ...         return Localization(maps.mean((2, 3)), maps[:, 0])
        >>> from attnmap_core.data.transforms import Preprocessing
        >>> model = Mean(num_classes=3)
        >>> model.preprocessing, model.labels = Preprocessing(size=(16, 16)), ["cat", "dog", "hen"]
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = model.save_pretrained(folder)
        ...     again = Mean.from_pretrained(folder)
        >>> again.labels, bool((again.head.weight == model.head.weight).all())
        (['cat', 'dog', 'hen'], True)
        >>> again.predict(Image.new("RGB", (40, 20))).score_map.shape
        (16, 16)
    """

    threshold: float = 0.1
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    labels: list[str]
    _config: dict[str, Any]
    _provenance: dict[str, Any]
    _preprocessing: Preprocessing | None
    _hub_mixin_info: ClassVar[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        model = super().__new__(cls, *args, **kwargs)
        given = _constructor_values(cls, args, kwargs)
        for name, value in given.items():
            _require_plain(value, f"{cls.__name__}({name}=...)")
        model._config = {k: v for k, v in given.items() if k not in _WEIGHT_SOURCES + _STATED_APART}
        model._provenance = {k: given[k] for k in _WEIGHT_SOURCES if given.get(k)}
        if "weights" in model._provenance:
            model._provenance["weights"] = Path(given["weights"]).name  # its folder means nothing elsewhere
        model._restore(given)
        return model

    @property
    def preprocessing(self) -> Preprocessing:
        """How photos become input; unless set, the whole photo at the size and normalisation of ``.backbone``.

        Raises:
            RuntimeError: if it is not set and there is no backbone to ask.
        """
        if self._preprocessing is None:
            backbone: Any = getattr(self, "backbone", None)
            if not hasattr(backbone, "preprocessing_config"):
                raise RuntimeError(f"{type(self).__name__}.preprocessing is not set; assign a Preprocessing")
            from .data.transforms import Preprocessing

            self._preprocessing = Preprocessing(size=backbone.img_size, **backbone.preprocessing_config)
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing

    def localize(self, images: Tensor) -> Localization:
        """Logits and the score map of the predicted class for preprocessed ``images`` ``(b, 3, H, W)``."""
        raise NotImplementedError(f"{type(self).__name__} must define localize(images)")

    def predict(
        self,
        photos: Photo | Iterable[Photo],
        *,
        threshold: float | None = None,
        contours: Literal["largest", "all"] = "largest",
        batch_size: int = 16,
        on_unreadable: OnUnreadable = "error",
    ) -> Prediction | list[Prediction]:
        """Class, score map and boxes of one photo, or of several; see :meth:`predict_iter`.

        Returns:
            One prediction for one photo (which must be readable), a list for an iterable.
        """
        if isinstance(photos, (str, PathLike, bytes, Image.Image)) or hasattr(photos, "read"):
            return next(self.predict_iter([cast(Photo, photos)], threshold=threshold, contours=contours))
        return list(
            self.predict_iter(
                cast(Iterable[Photo], photos),
                threshold=threshold,
                contours=contours,
                batch_size=batch_size,
                on_unreadable=on_unreadable,
            )
        )

    def predict_iter(
        self,
        photos: Iterable[Photo],
        *,
        threshold: float | None = None,
        contours: Literal["largest", "all"] = "largest",
        batch_size: int = 16,
        on_unreadable: OnUnreadable = "error",
    ) -> Iterator[Prediction]:
        """Predict photo after photo, holding one batch in memory.

        Runs in evaluation mode without gradients; the model's own mode is untouched.

        Args:
            photos: paths, bytes, open files or PIL images, in any colour mode and of any size.
            threshold: share of the score map's maximum in ``[0, 1)``; default: the model's own.
            contours: one box around the largest region, or one around each.
            batch_size: photos that pass the network together.
            on_unreadable: raise, skip with a warning, or call a function with the photo's name and the reason.

        Yields:
            Predictions in the order of the photos, boxes in pixels of the photo, best first.

        Raises:
            InputError: for a photo that cannot be read, unless skipping.
            ValueError: if ``threshold`` or ``batch_size`` is out of range.
        """
        threshold = self.threshold if threshold is None else threshold
        if not 0 <= threshold < 1:
            raise ValueError(f"threshold must be in [0, 1), got {threshold}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be 1 or more, got {batch_size}")
        return self._predictions(photos, threshold, contours, batch_size, on_unreadable)

    def _predictions(
        self,
        photos: Iterable[Photo],
        threshold: float,
        contours: Literal["largest", "all"],
        batch_size: int,
        on_unreadable: OnUnreadable,
    ) -> Iterator[Prediction]:
        waiting: list[_Input] = []
        for item in self._inputs(photos, on_unreadable):
            waiting.append(item)
            if len(waiting) == batch_size:
                yield from self._predict_batch(waiting, threshold, contours)
                waiting = []
        if waiting:
            yield from self._predict_batch(waiting, threshold, contours)

    def _inputs(self, photos: Iterable[Photo], on_unreadable: OnUnreadable) -> Iterator[_Input]:
        from .data.images import load_image
        from .data.transforms import eval_transform

        transform = eval_transform(self.preprocessing)
        for index, photo in enumerate(photos):
            name = _name(photo, index)
            try:
                image = load_image(photo, name)
            except InputError as error:
                if on_unreadable == "error":
                    raise
                if on_unreadable == "skip":
                    _logger.warning("skipped %s", error)
                else:
                    on_unreadable(name, str(error))
                continue
            yield _Input(name, image.width, image.height, transform(image))

    def _predict_batch(
        self, inputs: Sequence[_Input], threshold: float, contours: Literal["largest", "all"]
    ) -> list[Prediction]:
        weight = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        images = torch.stack([item.image for item in inputs]).to(weight.device, weight.dtype)
        with evaluating(self), torch.no_grad():
            logits, score_maps = self.localize(images)
        if not (torch.isfinite(logits).all() and torch.isfinite(score_maps).all()):
            raise InputError(
                f"{inputs[0].name}: {type(self).__name__} gives values that are not finite (a photo from here "
                "on); its weights are damaged or overflowed in training, load others"
            )
        probabilities = logits.double().softmax(dim=1).cpu()
        maps = score_maps.double().cpu().numpy()
        return [
            self._prediction(item, p, m, threshold, contours) for item, p, m in zip(inputs, probabilities, maps)
        ]

    def _prediction(
        self,
        item: _Input,
        probabilities: Tensor,
        coarse_map: NDArray[np.float64],
        threshold: float,
        contours: Literal["largest", "all"],
    ) -> Prediction:
        from .boxes import boxes_from_score_map, upsample_score_map

        preprocessing = self.preprocessing
        score_map = upsample_score_map(coarse_map, size=preprocessing.size, interpolation=self.interpolation)
        boxes = np.zeros((0, 4))
        if score_map.any():  # a constant map points nowhere
            # "tscam": ends exclusive, also at the far border, where the metrics' convention stops a pixel short
            boxes = boxes_from_score_map(score_map, threshold, contours, convention="tscam").astype(np.float64)
        scores = np.array([score_map[int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, x1, y1 in boxes])
        order = np.argsort(-scores, kind="stable")
        best = probabilities.argsort(descending=True, stable=True)[:5].tolist()
        top = [(k, self._label_name(k), float(probabilities[k])) for k in best]
        label, label_name, probability = top[0]
        return Prediction(
            source=item.name,
            width=item.width,
            height=item.height,
            label=label,
            label_name=label_name,
            probability=probability,
            top=top,
            boxes_xyxy=preprocessing.to_photo_coordinates(boxes[order], item.width, item.height),
            box_scores=scores[order],
            score_map=preprocessing.to_photo_map(score_map.astype(np.float32), item.width, item.height),
            threshold=threshold,
        )

    def _label_name(self, index: int) -> str:
        return self.labels[index] if index < len(self.labels) else str(index)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        strict: bool = True,
        device: str | torch.device = "cpu",
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model folder, or a repository of the Hub, in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder that :meth:`save_pretrained` wrote, or ``owner/name``.
            strict: every weight must be there, of its shape, and no other. False loads what fits and warns.
            device: where the model goes.
            force_download: the rest is passed to ``huggingface_hub.hf_hub_download``.

        Raises:
            InputError: if the folder or repository is missing, holds another class or only pickled weights, or
                its weights do not fit the configuration (the message lists the keys).
        """
        if model_kwargs:
            raise TypeError(f"{', '.join(model_kwargs)}: constructor values come from {CONFIG_FILE}; leave them out")
        folder = Path(pretrained_model_name_or_path).expanduser()
        if folder.is_dir():
            config_path, weights_path = _local_files(folder)
        else:
            config_path, weights_path = _hub_files(
                fspath(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        model = cls._from_config(read_json(config_path), config_path)
        _load(model, weights_path, strict)
        return model.to(device).eval()

    @classmethod
    def _from_config(cls, config: Any, path: Path) -> Self:
        values: Any = config.get("model") if isinstance(config, dict) else None
        if not isinstance(values, dict):
            raise InputError(f'{path}: holds no "model", expected what save_pretrained writes; save it again')
        if config.get("class") != cls.__name__:
            raise InputError(
                f"{path}: describes a {config.get('class')}, expected {cls.__name__}; "
                f"call {config.get('class')}.from_pretrained instead"
            )
        parameters = inspect.signature(cls.__init__).parameters
        off: dict[str, Any] = {"pretrained": False, "weights": None}
        values = {k: _tuples(v) for k, v in values.items()} | {k: v for k, v in off.items() if k in parameters}
        try:
            model = cls(**values)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{path}: {cls.__name__} cannot be made from it ({error}); it was written by "
                f"{config.get('package')} {config.get('version', '')}".rstrip()
            ) from error
        model._restore(config)
        model._provenance = dict(config.get("provenance") or {})
        return model

    def _restore(self, values: Mapping[str, Any]) -> None:
        """Take over labels, preprocessing and threshold from constructor arguments or a configuration."""
        self._preprocessing = None
        self.labels = list(values.get("labels") or ())
        if values.get("threshold") is not None:
            self.threshold = float(values["threshold"])
        if values.get("preprocessing") is not None:
            from .data.transforms import Preprocessing

            self._preprocessing = Preprocessing.from_dict(values["preprocessing"])

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and, if there is none, a card; a reader meets all or nothing.

        Args:
            save_directory: a new folder, or one whose model is to be replaced; its other files stay.
            config: not used, the configuration is what the model was constructed with.
            repo_id: repository for ``push_to_hub``; default: the folder's name.
            push_to_hub: upload afterwards.
            model_card_kwargs: fields of :class:`attnmap_core.model_card.CardFacts`.

        Returns:
            The commit's address if ``push_to_hub``, else None.

        Raises:
            InputError: if the disk is full or the folder cannot be written; an older model is then untouched.
        """
        folder = Path(save_directory)
        if folder.is_dir():
            # Both are complete before either is moved into place.
            with atomic_file(folder / CONFIG_FILE) as config_file, atomic_file(folder / WEIGHTS_FILE) as weights_file:
                self._write(config_file, weights_file)
            self._write_card(folder, model_card_kwargs)
        else:
            with atomic_folder(folder) as temporary:
                self._write(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
                self._write_card(temporary, {"repo_id": folder.name} | (model_card_kwargs or {}))
        if push_to_hub:
            return self.push_to_hub(
                repo_id or folder.name, model_card_kwargs=model_card_kwargs, **push_to_hub_kwargs
            )
        return None
