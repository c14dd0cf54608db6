"""Models that save, load and publish themselves, and turn photos into predictions.

A model folder holds ``config.json`` (constructor values, preprocessing, label names), ``model.safetensors``
and a card. Loading is strict, never unpickles and never fetches backbone weights: the file holds them all.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    BinaryIO,
    ClassVar,
    Literal,
    NamedTuple,
    Self,
    TypeAlias,
    cast,
    overload,
)

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from PIL import Image
from torch import Tensor, nn

from .backbones import evaluating, mismatched_keys, read_weights
from .errors import InputError
from .files import atomic_file, atomic_folder, read_json, write_json
from .model_card import write_card
from .prediction import Prediction

if TYPE_CHECKING:
    from numpy.typing import NDArray

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
    """Base of the models of all packages: strict loading, saving and publishing, and prediction from photos.

    A subclass takes plain values in its constructor (numbers, strings, None, and lists, tuples or dicts of
    these) and defines :meth:`localize`. What it was constructed with is what ``config.json`` says, except for

    - ``pretrained`` and ``weights``, which name where backbone weights came from: they are noted under
      ``"provenance"`` and are off when the model is loaded, so that nothing more is downloaded or read;
    - ``labels``, ``preprocessing`` (a dict) and ``threshold``, which become attributes before ``__init__``
      runs: they may change after construction and are saved as they are then.

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
        if isinstance(given.get("weights"), os.PathLike):
            given["weights"] = os.fspath(given["weights"])
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
        """How photos become input; unless set, the whole photo at ``.backbone``'s size and normalisation.

        Raises:
            RuntimeError: if it is not set and there is no backbone to ask.
        """
        known = self._known_preprocessing()
        if known is None:
            raise RuntimeError(f"{type(self).__name__}.preprocessing is not set; assign a Preprocessing")
        return known

    @preprocessing.setter
    def preprocessing(self, preprocessing: Preprocessing) -> None:
        self._preprocessing = preprocessing

    def _known_preprocessing(self) -> Preprocessing | None:
        backbone: Any = getattr(self, "backbone", None)
        if self._preprocessing is None and hasattr(backbone, "preprocessing_config"):
            from .data.transforms import Preprocessing

            self._preprocessing = Preprocessing(size=backbone.img_size, **backbone.preprocessing_config)
        return self._preprocessing

    def localize(self, images: Tensor) -> Localization:
        """Logits and the score map of the predicted class for preprocessed ``images`` ``(b, 3, H, W)``."""
        raise NotImplementedError(f"{type(self).__name__} must define localize(images)")

    @overload
    def predict(  # pyright: ignore[reportOverlappingOverload] (a string is iterable, but one path)
        self, photos: Photo, **options: Any
    ) -> Prediction: ...

    @overload
    def predict(self, photos: Iterable[Photo], **options: Any) -> list[Prediction]: ...

    def predict(self, photos: Photo | Iterable[Photo], **options: Any) -> Prediction | list[Prediction]:
        """Class, score map and boxes of one photo, or of several.

        Args:
            photos: a path, bytes, an open file or a PIL image, or an iterable of these.
            **options: ``threshold``, ``contours``, ``batch_size``, ``on_unreadable`` of :meth:`predict_iter`,
                which is also the way through more photos than results fit in memory.

        Returns:
            One prediction for one photo (an error if it is unreadable), a list for an iterable.
        """
        if isinstance(photos, (str, PathLike, bytes, Image.Image)) or hasattr(photos, "read"):
            options["on_unreadable"] = "error"
            return next(self.predict_iter([cast(Photo, photos)], **options))
        return list(self.predict_iter(cast(Iterable[Photo], photos), **options))

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
            on_unreadable: raise, skip with a warning, or a function to call with the photo's name and why.

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
                f"{inputs[0].name} or a photo just after it: {type(self).__name__} gives values that are not "
                "finite; its weights are damaged or overflowed in training, load others"
            )
        probabilities = logits.cpu().double().softmax(dim=1)
        maps = score_maps.cpu().double().numpy()
        return [
            self._prediction(item, p, m, threshold, contours)
            for item, p, m in zip(inputs, probabilities, maps)
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
            # "tscam" boxes end exclusively, also at the border, where the metrics' stop a pixel short.
            found = boxes_from_score_map(score_map, threshold, contours, convention="tscam")
            boxes = found.astype(np.float64)
        scores = np.array(
            [score_map[int(y0) : int(y1), int(x0) : int(x1)].mean() for x0, y0, x1, y1 in boxes]
        )
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
            InputError: if the folder or repository is missing, holds another class or only pickled weights,
                or its weights do not fit the configuration (the message lists the keys).
        """
        if model_kwargs:
            raise TypeError(
                f"{', '.join(model_kwargs)}: constructor values come from {CONFIG_FILE}; leave them out"
            )
        folder = Path(pretrained_model_name_or_path).expanduser()
        if folder.is_dir():
            config_path, weights_path = _local_files(folder)
        else:
            config_path, weights_path = _hub_files(
                os.fspath(pretrained_model_name_or_path),
                force_download=force_download,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                revision=revision,
            )
        model = cls._from_config(_read_config(config_path), config_path)
        _load(model, weights_path, strict)
        return model.to(device).eval()

    @classmethod
    def _from_config(cls, config: dict[str, Any], path: Path) -> Self:
        if config.get("class") != cls.__name__:
            raise InputError(
                f"{path}: describes a {config.get('class')}, expected {cls.__name__}; "
                f"call {config.get('class')}.from_pretrained instead"
            )
        parameters = inspect.signature(cls.__init__).parameters
        off: dict[str, Any] = {"pretrained": False, "weights": None}
        values: dict[str, Any] = _tuples(config["model"])
        values |= {name: value for name, value in off.items() if name in parameters}
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
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write ``config.json``, ``model.safetensors`` and, unless there is one, a card: all or nothing.

        Args:
            save_directory: a new folder, or one whose model is to be replaced; its other files stay.
            config: must be None: the configuration is what the model was constructed with.
            repo_id: repository for ``push_to_hub``; default: the folder's name.
            push_to_hub: upload afterwards.
            model_card_kwargs: fields of :class:`attnmap_core.model_card.CardFacts`.
            push_to_hub_kwargs: passed to :meth:`push_to_hub`.

        Returns:
            The commit's address if ``push_to_hub``, else None.

        Raises:
            InputError: if the disk is full or the folder cannot be written; an older model is then untouched.
        """
        if config is not None:
            raise ValueError(f"{CONFIG_FILE} says what the model was constructed with; leave config out")
        folder = Path(save_directory)
        facts = self._card_facts(repo_id or folder.name, model_card_kwargs)
        if folder.is_dir():
            # Both files are complete before either is moved into place.
            with (
                atomic_file(folder / CONFIG_FILE) as config_file,
                atomic_file(folder / WEIGHTS_FILE) as weights_file,
            ):
                self._write(config_file, weights_file)
            if not (folder / CARD_FILE).exists():
                write_card(folder, facts)
        else:
            with atomic_folder(folder) as temporary:
                self._write(temporary / CONFIG_FILE, temporary / WEIGHTS_FILE)
                write_card(temporary, facts)
        if push_to_hub:
            options = {"model_card_kwargs": model_card_kwargs} | push_to_hub_kwargs
            return self.push_to_hub(repo_id or folder.name, **options)
        return None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload weights, configuration and card in one commit; options as in ``huggingface_hub``.

        To publish a folder that a run wrote, card and all, upload that folder instead.

        Returns:
            The commit's address.
        """
        card_facts = {"repo_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card_facts, **options)

    def _write(self, config_file: Path, weights_file: Path) -> None:
        package = type(self).__module__.partition(".")[0]
        preprocessing = self._known_preprocessing()
        config = {
            "class": type(self).__name__,
            "package": package,
            "version": getattr(sys.modules[package], "__version__", None),
            "model": self._config,
            "preprocessing": preprocessing and preprocessing.to_dict(),
            "labels": self.labels,
            "threshold": self.threshold,
            "provenance": self._provenance,
        }
        known = {key: value for key, value in config.items() if key == "model" or value not in (None, {}, [])}
        write_json(config_file, known)
        _save(self, weights_file)

    def _card_facts(self, repo_id: str, more: Mapping[str, Any] | None) -> dict[str, Any]:
        """What the class and the model know for the card; ``more`` has priority."""
        data, info = self._hub_mixin_info.model_card_data, self._hub_mixin_info
        known = {
            "repo_id": repo_id,
            "model_class": type(self).__name__,
            "package": type(self).__module__.partition(".")[0],
            "license": data.license,
            "tags": [tag for tag in data.tags or () if not tag.endswith("hub_mixin")],
            "pipeline_tag": data.pipeline_tag,
            "library_name": data.library_name,
            "paper": info.paper_url,
            "labels": self.labels,
        }
        return {key: value for key, value in known.items() if value} | dict(more or {})


def _constructor_values(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Every constructor argument by name, defaults filled in, ``**options`` flattened."""
    signature = inspect.signature(cls.__init__)
    bound = signature.bind_partial(
        None, *args, **kwargs
    )  # partial: a missing one is __init__'s to complain of
    bound.apply_defaults()
    values = dict(list(bound.arguments.items())[1:])
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            values |= values.pop(name, {})
        elif parameter.kind is parameter.VAR_POSITIONAL and not values.get(name):
            values.pop(name, None)
    return values


def _require_plain(value: Any, where: str) -> None:
    """Refuse what JSON cannot say, or would say differently."""
    if (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    ):
        return
    if isinstance(value, (list, tuple)):
        for item in cast(Sequence[Any], value):
            _require_plain(item, where)
    elif isinstance(value, dict) and all(isinstance(key, str) for key in cast(dict[Any, Any], value)):
        for item in cast(dict[str, Any], value).values():
            _require_plain(item, where)
    else:
        raise TypeError(
            f"{where}: {value!r} is a {type(value).__name__}; {CONFIG_FILE} takes finite numbers, strings, "
            "None, and lists, tuples or string-keyed dicts of these"
        )


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, which constructors more often expect."""
    if isinstance(value, list):
        return tuple(_tuples(item) for item in cast(list[Any], value))
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in cast(dict[str, Any], value).items()}
    return value


def read_config(name: str | Path) -> dict[str, Any]:
    """``config.json`` of a model folder or Hub repository, for programs that must choose the class first.

    Raises:
        InputError: as :meth:`PretrainedModel.from_pretrained`.
    """
    folder = Path(name).expanduser()
    config, _ = _local_files(folder) if folder.is_dir() else _hub_files(os.fspath(name))
    return _read_config(config)


def _read_config(path: Path) -> dict[str, Any]:
    config: Any = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise InputError(f'{path}: holds no "model", expected what save_pretrained writes; save it again')
    return cast(dict[str, Any], config)


def _local_files(folder: Path) -> tuple[Path, Path]:
    config, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    if not weights.is_file():
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        if pickles:
            raise InputError(
                f"{folder}: holds pickled weights ({', '.join(pickles)}), expected {WEIGHTS_FILE}; pickles "
                "can run foreign code and are refused: save the model again with save_pretrained"
            )
        raise InputError(f"{folder}: no {WEIGHTS_FILE} in it, expected a model folder; check the path")
    if not config.is_file():
        raise InputError(
            f"{folder}: no {CONFIG_FILE} beside the weights, expected a model folder; save it again"
        )
    return config, weights


def _hub_files(name: str, **options: Any) -> tuple[Path, Path]:
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) or Path(name).parent.is_dir():
        raise InputError(
            f"{name}: no such folder, expected a model folder or owner/name of the Hub; check the path"
        )
    try:
        config = hf_hub_download(name, CONFIG_FILE, **options)
        return Path(config), Path(hf_hub_download(name, WEIGHTS_FILE, **options))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{name}: no such folder, and the Hub gave no {CONFIG_FILE} with {WEIGHTS_FILE} ({reason}); "
            "check the name, your network and login"
        ) from error


def _load(model: nn.Module, path: Path, strict: bool) -> None:
    found = read_weights(path)
    wanted = model.state_dict()
    # A tensor shared by two layers is stored once, under one of its names.
    stored = {wanted[key].data_ptr() for key in found if key in wanted}
    needed = {
        key: t for key, t in wanted.items() if key in found or t.numel() == 0 or t.data_ptr() not in stored
    }
    problem = mismatched_keys(needed, found)
    if problem:
        if strict:
            raise InputError(
                f"{path}: does not fit this {type(model).__name__} ({problem}); load weights of its own"
            )
        _logger.warning("%s: loaded in part only (%s)", path, problem)
        found = {key: t for key, t in found.items() if key in needed and needed[key].shape == t.shape}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in found and tensor.is_floating_point() and found[key].is_floating_point():
            tensor.data = tensor.data.to(found[key].dtype)  # bit for bit, so in the file's precision
    model.load_state_dict(found, strict=False)


def _save(model: nn.Module, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        save_model(model, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class _Input(NamedTuple):
    """One photo on its way into a batch: its pixels are gone, only the network's input is kept."""

    name: str
    width: int
    height: int
    image: Tensor


def _name(photo: Photo, index: int) -> str:
    if isinstance(photo, (str, os.PathLike)):
        return os.fspath(photo)
    named = getattr(photo, "filename", "") or getattr(photo, "name", "")
    return str(named) or f"photo {index + 1}"
