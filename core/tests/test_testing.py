"""The conformance suite passes on a sound model, and each of its tests fails on one broken in that way."""

from __future__ import annotations

import dataclasses
import importlib
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization
from attnmap_core.testing import ModelConformance
from PIL import Image
from torch import Tensor
from torch.nn.functional import cross_entropy

# A package of its own, so that a fresh interpreter can import it.
SOURCE = '''
import torch
from attnmap_core.backbones import AttentionTap, create_backbone
from attnmap_core.hub import Localization, PretrainedModel

class Toy(PretrainedModel):
    """TS-CAM in six lines."""

    def __init__(self, num_classes=3, labels=None, img_size=16):
        super().__init__()
        self.backbone = create_backbone(
            "vit", img_size=img_size, patch_size=4, embed_dim=16, depth=2, num_heads=2
        )
        self.tap = AttentionTap(self.backbone).attach()
        self.head = torch.nn.Conv2d(16, num_classes, 1)

    def maps(self, images):
        with self.tap.recording() as record:
            semantic = self.head(self.backbone(images).map)
        rows = record.rows()[..., 1:].mean(2).sum(1)
        return semantic, rows.view(len(images), *semantic.shape[2:])

    def forward(self, images):
        return self.maps(images)[0].mean((2, 3))

    def localize(self, images):
        semantic, attention = self.maps(images)
        logits = semantic.mean((2, 3))
        best = semantic[torch.arange(len(images)), logits.argmax(1)]
        return Localization(logits, best * attention)
'''


@pytest.fixture(autouse=True, scope="module")
def _package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site")
    (folder / "toy_conformance").mkdir()
    (folder / "toy_conformance" / "__init__.py").write_text(SOURCE)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))
    sys.modules.pop("toy_conformance", None)


def toy() -> Any:
    return importlib.import_module("toy_conformance").Toy


class OfToy(ModelConformance):
    __test__ = False

    def make_model(self) -> Any:
        return toy()(labels=["a", "b", "c"])

    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model(images), labels)


class TestSoundModel(OfToy):
    __test__ = True
    skips: ClassVar[dict[str, str]] = {"test_float64": "Here to see it skipped; called by name below."}


# --- Each test can fail -----------------------------------------------------------------------------------


def broken(module: str = "toy_conformance", **members: Any) -> Any:
    """A model of a subclass of Toy with some members replaced."""
    torch.manual_seed(0)
    kind = type("Toy", (toy(),), {"__module__": module, **members})
    return kind(labels=["a", "b", "c"])


def must_fail(test: str, model: Any, *arguments: Any, suite: type[ModelConformance] = OfToy) -> None:
    torch.manual_seed(0)
    with pytest.raises((AssertionError, pytest.fail.Exception, KeyError)):
        getattr(suite(), test)(model, *arguments)


def localizing(change: Any) -> dict[str, Any]:
    def localize(self: Any, images: Tensor) -> Any:
        logits, score_maps = toy().localize(self, images)
        return change(self, images, logits, score_maps)

    return {"localize": lambda self, images: Localization(*localize(self, images))}


def noisy(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    return logits, maps + torch.rand_like(maps)


def of_the_batch(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    return logits - logits.mean(0), maps


def single(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    return logits.float(), maps


def nan(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    return logits, maps / 0


def too_few(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    return logits[:, :2], maps


def keeping(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    self.kept = images
    return logits, maps


def hooking(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    self.head.register_forward_hook(lambda *_: None)
    return logits, maps


def counting(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    self.calls = getattr(self, "calls", 0) + 1
    return logits + self.calls, maps * torch.linspace(1, self.calls, maps.shape[-1])


def switching(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
    for module in self.modules():
        module.training = False
    return logits, maps


class Unlearnable(OfToy):
    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return 0 * model(images).sum() + 1


class Detached(OfToy):
    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(model.head(model.backbone(images).map.detach()).mean((2, 3)), labels)


class Overflowing(OfToy):
    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        return model(images).square().sum() * 1e39


class Keeping(OfToy):
    def training_loss(self, model: Any, images: Tensor, labels: Tensor) -> Tensor:
        model.kept = model(images)
        return cross_entropy(model.kept, labels)


class Excusing(OfToy):
    without_gradient: ClassVar[dict[str, str]] = {"head.weight": "because"}


@pytest.mark.parametrize(
    ("test", "change"),
    [
        ("test_shapes", nan),
        ("test_shapes", too_few),
        ("test_same_result_twice_in_eval", noisy),
        ("test_images_do_not_influence_each_other", of_the_batch),
        ("test_float64", single),
        ("test_autocast_bfloat16", nan),
        ("test_hooks_and_graphs_do_not_leak", keeping),
        ("test_hooks_and_graphs_do_not_leak", hooking),
        ("test_predict_twice_is_the_same", counting),
    ],
)
def test_wrong_localization_is_found(test: str, change: Any) -> None:
    must_fail(test, broken(**localizing(change)))


@pytest.mark.parametrize(
    ("test", "suite"),
    [
        ("test_autocast_bfloat16", Overflowing),
        ("test_gradient_reaches_every_trainable_weight", Detached),
        ("test_gradient_reaches_every_trainable_weight", Excusing),
        ("test_a_tiny_training_lowers_the_loss", Unlearnable),
        ("test_hooks_and_graphs_do_not_leak", Keeping),
    ],
)
def test_wrong_training_is_found(test: str, suite: type[ModelConformance]) -> None:
    must_fail(test, broken(), suite=suite)


def test_shared_copies_are_found() -> None:
    must_fail("test_deepcopy_is_equal_and_apart", broken(__deepcopy__=lambda self, memo: self))


def test_unsaved_state_is_found(tmp_path: Path) -> None:
    def init(self: Any, labels: Any = None) -> None:
        toy().__init__(self, labels=labels)
        self.secret = torch.randn(())

    def secretive(self: Any, images: Tensor, logits: Tensor, maps: Tensor) -> Any:
        return logits * self.secret, maps

    must_fail("test_saved_and_loaded_bit_for_bit", broken(__init__=init, **localizing(secretive)), tmp_path)


def test_lenient_loading_is_found(tmp_path: Path) -> None:
    def lenient(cls: Any, folder: Any) -> Any:
        return super(cls, cls).from_pretrained(folder, strict=False)

    must_fail("test_loading_is_strict", broken(from_pretrained=classmethod(lenient)), tmp_path)


def test_unpickling_is_found(tmp_path: Path) -> None:
    def unpickle(cls: Any, folder: Path) -> Any:
        pickle.loads((folder / "pytorch_model.bin").read_bytes())
        raise InputError("pytorch_model.bin: too late")

    must_fail("test_pickles_are_refused", broken(from_pretrained=classmethod(unpickle)), tmp_path)


def test_a_config_with_weight_sources_is_found(tmp_path: Path) -> None:
    model = broken()
    model._config["weights"] = "vit.pth"
    must_fail("test_config_is_plain_json", model, tmp_path)


def test_wrong_predictions_are_found(tmp_path: Path) -> None:
    def as_stored(self: Any, photos: Any, **options: Any) -> Any:
        several = isinstance(photos, list)
        stored = [Image.open(photo).convert("RGB") for photo in (photos if several else [photos])]
        for image in stored:
            image.info.clear()
            image.getexif().clear()
        found = toy().predict(self, stored, **options)
        return found if several else dataclasses.replace(found[0], width=7)

    model = broken(predict=as_stored)
    must_fail("test_predict_turns_photos_upright", model, tmp_path)
    must_fail("test_predict_takes_any_photo", model, "CMYK", tmp_path)
    must_fail("test_predict_twice_is_the_same", broken(**localizing(switching), predict=_without_restoring))


def _without_restoring(self: Any, photos: Any, **options: Any) -> Any:
    found = toy().predict(self, photos, **options)
    self.eval()
    return found


@pytest.mark.parametrize(
    ("test", "line"),
    [
        ("test_import_is_quick_and_silent", "print('hello')"),
        ("test_import_is_quick_and_silent", "import matplotlib"),
        ("test_inference_needs_no_extra", "import accelerate"),
    ],
)
def test_heavy_packages_are_found(test: str, line: str, tmp_path: Path) -> None:
    name = f"heavy_{abs(hash((test, line)))}"
    (Path(sys.path[0]) / f"{name}.py").write_text(f"{line}\n{SOURCE}")
    model = broken(name)
    must_fail(test, model, *([tmp_path] if "extra" in test else []))


def test_skips_need_reasons() -> None:
    class Wordless(OfToy):
        skips: ClassVar[dict[str, str]] = {"test_float64": "later"}

    class Misspelt(OfToy):
        skips: ClassVar[dict[str, str]] = {"test_flaot64": "This toy refuses double precision."}

    class Overriding(OfToy):
        def test_float64(self, model: Any) -> None:
            pass

    for suite in (Wordless, Misspelt, Overriding):
        with pytest.raises(AssertionError):
            suite().test_nothing_is_skipped_without_a_reason()
    OfToy().test_nothing_is_skipped_without_a_reason()


def test_skipped_test_would_have_run() -> None:
    OfToy().test_float64(broken())
