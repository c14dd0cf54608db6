"""What every model of every package must do, as a pytest class to subclass::

    class TestSCM(ModelConformance):
        def make_model(self):
            return SCM("vit", num_classes=3, img_size=32, backbone_options=TINY)

        def training_loss(self, model, images, labels):
            return cross_entropy(model(images), labels)

A test that cannot hold for a model is named in ``skips`` with the reason; overriding one is an error.
pytest is imported here and nowhere else.
"""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .backbones import evaluating
from .errors import InputError
from .hub import CONFIG_FILE, WEIGHTS_FILE, PretrainedModel
from .prediction import Prediction

EXTRAS = (
    "accelerate",
    "datasets",
    "gradio",
    "tensorboard",
    "wandb",
    "trackio",
    "cv2",
    "pycocotools",
    "pytest",
)
"""Modules of the optional extras and of the tests: inference must do without them."""

SLOW_MODULES = ("matplotlib", "pandas", "scipy.io", "IPython")
"""Modules that take long to import and that ``import <package>`` must leave alone."""


class ModelConformance:
    """Tests of one model class.

    Attributes:
        skips: name of a test to the reason why it cannot hold for this model.
        without_gradient: name of a trainable weight to the reason why no gradient reaches it.
        steps: of the tiny training, which must lower the loss by a tenth.
        learning_rate: of the tiny training, with AdamW.
    """

    skips: ClassVar[dict[str, str]] = {}
    without_gradient: ClassVar[dict[str, str]] = {}
    steps: ClassVar[int] = 15
    learning_rate: ClassVar[float] = 3e-3

    def make_model(self) -> PretrainedModel:
        """A tiny model with random weights (the seed is set), in training mode, that takes milliseconds."""
        raise NotImplementedError(f"{type(self).__name__} must define make_model()")

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        """The number that the package's task minimises, for images ``(b, 3, H, W)`` and labels ``(b,)``."""
        raise NotImplementedError(f"{type(self).__name__} must define training_loss(model, images, labels)")

    # --- Fixtures ---

    @pytest.fixture(autouse=True)
    def _seeded_or_skipped(self, request: pytest.FixtureRequest) -> None:
        name = getattr(request.node, "originalname", request.node.name)
        if name in self.skips:
            pytest.skip(self.skips[name])
        torch.manual_seed(0)

    @pytest.fixture
    def model(self) -> PretrainedModel:
        return self.make_model()

    # --- The suite itself ---

    def test_nothing_is_skipped_without_a_reason(self) -> None:
        suite = [name for name in dir(ModelConformance) if name.startswith("test_")]
        for name, reason in self.skips.items():
            assert name in suite, f"skips names {name}, which is no test of ModelConformance"
            assert len(reason.split()) >= 4, f"skips[{name!r}] needs a reason that a stranger understands"
        overridden = [n for n in suite if getattr(type(self), n) is not getattr(ModelConformance, n)]
        assert not overridden, f"{', '.join(overridden)}: overridden; put it in skips with the reason"

    # --- What comes out ---

    def test_shapes(self, model: PretrainedModel) -> None:
        images = _images(model)
        logits, score_maps = _localize(model, images)
        assert logits.ndim == 2
        assert logits.shape[0] == len(images)
        assert logits.shape[1] == len(model.labels) or not model.labels
        assert score_maps.ndim == 3
        assert score_maps.shape[0] == len(images)
        assert torch.isfinite(logits).all()
        assert torch.isfinite(score_maps).all()

    def test_same_result_twice_in_eval(self, model: PretrainedModel) -> None:
        images = _images(model)
        _assert_same(_localize(model, images), _localize(model, images))

    def test_images_do_not_influence_each_other(self, model: PretrainedModel) -> None:
        images = _images(model)
        together, alone = _localize(model, images), _localize(model, images[1:2])
        for whole, part in zip(together, alone):
            torch.testing.assert_close(whole[1:2], part, rtol=1e-3, atol=1e-5)

    def test_float64(self, model: PretrainedModel) -> None:
        images = _images(model)
        single, double = _localize(model, images), _localize(model.double(), images.double())
        for a, b in zip(single, double):
            assert b.dtype == torch.float64
            torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-3)

    def test_autocast_bfloat16(self, model: PretrainedModel) -> None:
        images, labels = _images(model), _labels(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.training_loss(model.train(), images, labels)
            logits, score_maps = _localize(model, images)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits).all()
        assert torch.isfinite(score_maps).all()
        for name, weight in model.named_parameters():
            assert weight.grad is None or torch.isfinite(weight.grad).all(), f"{name}: gradient is not finite"

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_any_device(self, model: PretrainedModel) -> None:
        images = _images(model)
        expected = _localize(model, images)
        for a, b in zip(expected, _localize(model.to("cuda"), images.to("cuda"))):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-2, atol=1e-3)

    # --- Training ---

    def test_gradient_reaches_every_trainable_weight(self, model: PretrainedModel) -> None:
        loss = self.training_loss(model.train(), _images(model), _labels(model))
        assert loss.ndim == 0
        loss.backward()
        dead = [
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad and (weight.grad is None or not weight.grad.any())
        ]
        unexplained = [name for name in dead if name not in self.without_gradient]
        assert not unexplained, f"no gradient reaches {', '.join(unexplained)}"
        stale = [name for name in self.without_gradient if name not in dead]
        assert not stale, f"without_gradient names {', '.join(stale)}, which a gradient reaches"

    def test_a_tiny_training_lowers_the_loss(self, model: PretrainedModel) -> None:
        images, labels = _images(model, 6), _labels(model, 6)
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=self.learning_rate)
        losses: list[float] = []
        for _ in range(self.steps):
            loss = self.training_loss(model, images, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert np.isfinite(losses).all()
        assert min(losses[-3:]) < 0.9 * losses[0], f"the loss went {losses[0]:.4f} -> {losses[-1]:.4f}"

    def test_hooks_and_graphs_do_not_leak(self, model: PretrainedModel) -> None:
        hooks, labels = _count_hooks(model), _labels(model)
        model.predict(Image.new("RGB", (20, 20), "orange"))
        self.training_loss(model.train(), _images(model), labels).backward()
        images = _images(model)
        alive = weakref.ref(images)  # as long as anything keeps it, or a graph that starts from it
        _localize(model, images)
        self.training_loss(model.train(), images, labels)
        del images
        gc.collect()
        assert alive() is None, "the model keeps the input or the graph of a pass that is over"
        assert _count_hooks(model) == hooks, "a pass leaves hooks behind"

    def test_deepcopy_is_equal_and_apart(self, model: PretrainedModel) -> None:
        images = _images(model)
        before = _localize(model, images)
        copied = copy.deepcopy(model)
        _assert_same(before, _localize(copied, images))
        with torch.no_grad():
            for weight in copied.parameters():
                weight.add_(torch.randn_like(weight))
        _assert_same(before, _localize(model, images))
        changed = _localize(copied, images)
        assert not torch.equal(changed[0], before[0])
        assert not torch.equal(changed[1], before[1]), "the copy's score maps come from the original"

    # --- Saving and loading ---

    def test_saved_and_loaded_bit_for_bit(self, model: PretrainedModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path / "model")
        torch.manual_seed(123)  # a weight that is not loaded would differ
        loaded = type(model).from_pretrained(tmp_path / "model")
        expected, found = model.state_dict(), loaded.state_dict()
        assert list(expected) == list(found)
        for name, tensor in expected.items():
            assert tensor.dtype == found[name].dtype, name
            assert torch.equal(tensor, found[name]), name
        assert loaded.preprocessing == model.preprocessing
        assert loaded.labels == model.labels
        assert loaded.threshold == model.threshold
        assert not any(module.training for module in loaded.modules())
        _assert_same(_localize(model, _images(model)), _localize(loaded, _images(model)))

    def test_loading_is_strict(self, model: PretrainedModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        weights = {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS_FILE).items()}
        name = next(name for name, tensor in weights.items() if tensor.ndim > 1)
        tensor = weights.pop(name)
        save_file({**weights, "renamed.weight": tensor}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(InputError, match=r"missing.*unexpected: renamed\.weight") as failure:
            type(model).from_pretrained(tmp_path)
        assert name in str(failure.value)
        save_file({**weights, name: tensor[:, :-1].contiguous()}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(InputError, match="other shape") as failure:
            type(model).from_pretrained(tmp_path)
        assert name in str(failure.value)

    def test_pickles_are_refused(self, model: PretrainedModel, tmp_path: Path) -> None:
        folder, trap = tmp_path / "model", tmp_path / "trap"
        model.save_pretrained(folder)
        (folder / WEIGHTS_FILE).unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(str(trap))))
        with pytest.raises(InputError, match=r"pytorch_model\.bin"):
            type(model).from_pretrained(folder)
        assert not trap.exists(), "the pickle was opened"

    def test_config_is_plain_json(self, model: PretrainedModel, tmp_path: Path) -> None:
        model.save_pretrained(tmp_path)
        text = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8")
        config = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
        assert config["class"] == type(model).__name__
        assert config["package"] == type(model).__module__.partition(".")[0]
        assert isinstance(config["model"], dict)
        assert not {"pretrained", "weights"} & set(config["model"])
        assert {"mean", "std", "size", "interpolation"} <= set(config["preprocessing"])

    # --- Photos ---

    @pytest.mark.parametrize(
        "kind", ["one pixel", "wide", "tall", "CMYK", "16-bit", "palette", "gray", "alpha"]
    )
    def test_predict_takes_any_photo(self, model: PretrainedModel, kind: str, tmp_path: Path) -> None:
        image = _photo(kind)
        path = tmp_path / ("photo.jpg" if image.mode == "CMYK" else "photo.png")
        image.save(path)
        _check_prediction(model, model.predict(path), image.width, image.height)

    def test_predict_turns_photos_upright(self, model: PretrainedModel, tmp_path: Path) -> None:
        stored = _photo("wide").resize((60, 20))
        stored.save(tmp_path / "plain.png")
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by a quarter for display
        stored.save(tmp_path / "turned.png", exif=exif)
        stored.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
        # Each alone: the last bit of a matrix product may depend on the row, so two rows of a batch may differ.
        turned, upright = (model.predict(tmp_path / name) for name in ("turned.png", "upright.png"))
        _check_prediction(model, turned, 20, 60)
        np.testing.assert_array_equal(turned.score_map, upright.score_map)
        np.testing.assert_array_equal(turned.boxes_xyxy, upright.boxes_xyxy)

    def test_predict_twice_is_the_same(self, model: PretrainedModel) -> None:
        photos = [_photo("wide"), _photo("gray"), _photo("alpha")]
        model.train()
        for first, second in zip(model.predict(photos), model.predict(photos)):
            assert first.top == second.top
            np.testing.assert_array_equal(first.score_map, second.score_map)
            np.testing.assert_array_equal(first.boxes_xyxy, second.boxes_xyxy)
        assert all(module.training for module in model.modules()), "predict changed the model's mode"

    # --- The package ---

    def test_import_is_quick_and_silent(self, model: PretrainedModel) -> None:
        package = type(model).__module__.partition(".")[0]
        loaded = f"[name for name in {SLOW_MODULES + EXTRAS!r} if name in sys.modules]"
        _run_python(f"import {package}, sys\nloaded = {loaded}\nassert not loaded, loaded")

    def test_inference_needs_no_extra(self, model: PretrainedModel, tmp_path: Path) -> None:
        kind = type(model)
        model.save_pretrained(tmp_path / "model")
        _photo("wide").save(tmp_path / "photo.png")
        _run_python(
            f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"  # None makes an import fail
            f"from {kind.__module__} import {kind.__qualname__}\n"
            f"model = {kind.__qualname__}.from_pretrained({str(tmp_path / 'model')!r})\n"
            f"assert model.predict({str(tmp_path / 'photo.png')!r}).score_map.size"
        )


class _Trap:
    """Unpickling it writes a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def _images(model: PretrainedModel, count: int = 3) -> Tensor:
    return torch.randn(count, 3, *model.preprocessing.size, generator=torch.Generator().manual_seed(1))


def _labels(model: PretrainedModel, count: int = 3) -> Tensor:
    with torch.no_grad(), evaluating(model):
        classes = model.localize(_images(model, 1)).logits.shape[1]
    return torch.arange(count) % classes


def _localize(model: PretrainedModel, images: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), evaluating(model):
        logits, score_maps = model.localize(images)
    return logits, score_maps


def _assert_same(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(a[0], b[0]), "logits differ"
    assert torch.equal(a[1], b[1]), "score maps differ"


def _count_hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def _photo(kind: str) -> Image.Image:
    size = {"one pixel": (1, 1), "wide": (2000, 3), "tall": (3, 2000)}.get(kind, (50, 30))
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    if kind == "16-bit":
        return Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    modes = {"CMYK": "CMYK", "palette": "P", "gray": "L", "alpha": "RGBA"}
    return image.convert(modes[kind]) if kind in modes else image


def _check_prediction(model: PretrainedModel, prediction: Any, width: int, height: int) -> None:
    assert isinstance(prediction, Prediction)
    assert (prediction.width, prediction.height) == (width, height)
    assert prediction.score_map.dtype == np.float32
    assert prediction.score_map.ndim == 2
    assert prediction.score_map.min() >= 0
    assert prediction.score_map.max() <= 1
    boxes = prediction.boxes_xyxy
    assert boxes.shape == (len(prediction.box_scores), 4)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] < boxes[:, 2:]).all()
    assert (boxes[:, 2:] <= np.array([width, height]) + 1e-9).all()
    assert prediction.label == prediction.top[0][0]
    assert 0 <= prediction.probability <= 1
    if model.labels:
        assert prediction.label_name == model.labels[prediction.label]


@functools.cache
def _run_python(code: str) -> None:
    """Run ``code`` in a fresh interpreter, which must end well and print nothing (seconds: each once)."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", f"importing printed {done.stdout}{done.stderr}"
