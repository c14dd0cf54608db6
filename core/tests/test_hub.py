"""Model folders: strict, plain, never half-written, never unpickled; photos in, predictions out."""

from __future__ import annotations

import copy
import errno
import json
import logging
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attnmap_core.backbones import create_backbone
from attnmap_core.data.transforms import Preprocessing
from attnmap_core.errors import InputError
from attnmap_core.hub import Localization, PretrainedModel, read_config
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


class Blobs(PretrainedModel, license="apache-2.0", tags=["toy"], paper_url="https://example.org/paper"):
    """Scores a cell by how red it is, in one convolution whose weights are known; red makes class 1."""

    def __init__(
        self,
        num_classes: int = 2,
        cell: int | tuple[int, int] = 4,
        *,
        labels: list[str] | None = None,
        preprocessing: dict[str, Any] | None = None,
        threshold: float = 0.5,
        pretrained: bool = False,
        weights: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if pretrained or weights:
            self.seen = (pretrained, weights)
        self.cell = cell
        self.options = options
        self.head = nn.Conv2d(3, num_classes, cell, stride=cell)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.head.weight.zero_()
            self.head.weight[1, 0] = 1.0
            self.head.bias.zero_()

    def localize(self, images: Tensor) -> Localization:
        maps = self.dropout(self.head(images))
        return Localization(maps.mean((2, 3)), maps[:, 1])


PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0], "size": [16, 24]}


@pytest.fixture
def model() -> Blobs:
    return Blobs(labels=["grass", "fox"], preprocessing=PLAIN)


@pytest.fixture
def folder(model: Blobs, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def photo_with_red(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.paste((255, 0, 0), box)
    return image


# --- config.json ------------------------------------------------------------------------------------------


def test_config_tells_all(model: Blobs, tmp_path: Path) -> None:
    model = Blobs(3, (2, 4), labels=["a", "b", "c"], preprocessing=PLAIN, depth=[1, None], note={"k": 1.5})
    model.threshold = 0.25
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["class"] == "Blobs"
    assert config["model"] == {"num_classes": 3, "cell": [2, 4], "depth": [1, None], "note": {"k": 1.5}}
    assert config["labels"] == ["a", "b", "c"]
    assert config["threshold"] == 0.25
    assert config["preprocessing"]["size"] == [16, 24]
    assert "provenance" not in config
    loaded = Blobs.from_pretrained(tmp_path / "m")
    assert loaded.cell == (2, 4)  # a tuple again
    assert loaded.options == {"depth": (1, None), "note": {"k": 1.5}}
    assert loaded.threshold == 0.25


@pytest.mark.parametrize(
    "value", [torch.zeros(1), np.int64(3), float("nan"), {1: 2}, Path("a"), [object()], nn.ReLU]
)
def test_only_plain_constructor_values(value: Any) -> None:
    with pytest.raises(TypeError, match=r"Blobs\(extra=...\).*finite numbers, strings"):
        Blobs(extra=value)


def test_missing_argument_is_the_constructors_own_complaint() -> None:
    class Needs(Blobs):
        def __init__(self, size: int) -> None:
            super().__init__(size)

    with pytest.raises(TypeError, match="size"):
        Needs()  # type: ignore[call-arg]
    assert Needs(3)._config == {"size": 3}
    assert copy.deepcopy(Needs(3))._config == {"size": 3}


def test_weight_sources_are_provenance_only(tmp_path: Path) -> None:
    model = Blobs(pretrained=True, weights=tmp_path / "private" / "vit.safetensors")  # type: ignore[arg-type]
    assert model.seen[0]
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["provenance"] == {"pretrained": True, "weights": "vit.safetensors"}
    assert "private" not in json.dumps(config)
    loaded = Blobs.from_pretrained(tmp_path / "m")
    assert not hasattr(loaded, "seen")  # neither downloads nor reads
    loaded.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["provenance"] == config["provenance"]


def test_sources_that_are_on_by_default_are_off_in_loading(tmp_path: Path) -> None:
    class Eager(Blobs):
        def __init__(self, pretrained: bool = True, weights: str | None = "backbone.pth") -> None:
            super().__init__(pretrained=pretrained, weights=weights)

    Eager().save_pretrained(tmp_path)
    assert not hasattr(Eager.from_pretrained(tmp_path), "seen")


def test_preprocessing_of_the_backbone_is_the_default(tmp_path: Path) -> None:
    model = Blobs()
    with pytest.raises(RuntimeError, match="preprocessing is not set"):
        _ = model.preprocessing
    model.backbone = create_backbone(
        "vit", img_size=(16, 32), patch_size=8, embed_dim=8, depth=1, num_heads=1
    )
    assert model.preprocessing == Preprocessing(size=(16, 32), interpolation="bicubic")
    model.preprocessing = Preprocessing(size=(8, 8))
    assert model.preprocessing.size == (8, 8)


# --- Loading ----------------------------------------------------------------------------------------------


def test_bit_for_bit_in_any_precision(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = Blobs().to(dtype)
        nn.init.normal_(model.head.weight)
        model.save_pretrained(tmp_path / "m")
        loaded = Blobs.from_pretrained(tmp_path / "m")
        assert loaded.head.weight.dtype == dtype
        assert torch.equal(loaded.head.weight, model.head.weight)
        assert loaded.head.weight.requires_grad
        assert not loaded.training


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(Blobs):
        def __init__(self) -> None:
            super().__init__()
            self.twin = nn.Conv2d(3, 2, 4)
            self.twin.weight = self.head.weight

    model = Tied()
    nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    loaded = Tied.from_pretrained(tmp_path)
    assert loaded.twin.weight is loaded.head.weight
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_not_strict_loads_what_fits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    weight = load_file(folder / "model.safetensors")["head.weight"] + 1
    save_file(
        {"head.weight": weight, "head.bias": torch.ones(5), "more": torch.ones(1)},
        folder / "model.safetensors",
    )
    with pytest.raises(
        InputError, match=r"unexpected: more; other shape: head.bias is \(5,\), expected \(2,\)"
    ):
        Blobs.from_pretrained(folder)
    with caplog.at_level(logging.WARNING):
        loaded = Blobs.from_pretrained(folder, strict=False)
    assert "head.bias" in caplog.text
    assert torch.equal(loaded.head.weight, weight)


def rewrite(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_wrong_configurations(folder: Path) -> None:
    class Other(Blobs):
        pass

    with pytest.raises(
        InputError, match=r"config\.json: describes a Blobs, expected Other; call Blobs\.from"
    ):
        Other.from_pretrained(folder)
    rewrite(folder, model={"num_classes": 5})
    with pytest.raises(InputError, match=r"head\.weight is \(2, 3, 4, 4\), expected \(5, 3, 4, 4\)"):
        Blobs.from_pretrained(folder)
    rewrite(folder, model={"cell": "wide"})
    with pytest.raises(InputError, match=r"config\.json: Blobs cannot be made from it"):
        Blobs.from_pretrained(folder)
    rewrite(folder, model={}, preprocessing={"sise": 3})
    with pytest.raises(InputError, match="sise"):
        Blobs.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: not valid JSON"):
        Blobs.from_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected what save_pretrained writes"):
        Blobs.from_pretrained(folder)
    with pytest.raises(InputError, match="expected what save_pretrained writes"):
        read_config(folder)


def test_the_class_can_be_read_before_loading(folder: Path) -> None:
    assert read_config(folder)["class"] == "Blobs"
    with pytest.raises(InputError, match="no such folder"):
        read_config(folder / "a" / "b")


def test_arguments_are_those_of_the_folder(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"num_classes: .* config\.json"):
        Blobs.from_pretrained(folder, num_classes=3)


def test_incomplete_folders(folder: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        Blobs.from_pretrained(folder / "deeper" / "still")
    with pytest.raises(InputError, match="no such folder"):
        Blobs.from_pretrained("nowhere")
    config = (folder / "config.json").read_text()
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        Blobs.from_pretrained(folder)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(b"truncated")
    with pytest.raises(InputError, match=r"model\.safetensors: damaged"):
        Blobs.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        Blobs.from_pretrained(folder)
    (folder / "weights.pth").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match=r"pickled weights \(weights\.pth\).*save_pretrained"):
        Blobs.from_pretrained(folder)


def test_hub_repositories(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str, Any]] = []

    def download(repo_id: str, filename: str, **options: Any) -> str:
        asked.append((repo_id, filename, options["revision"]))
        return str(folder / filename)

    monkeypatch.setattr("attnmap_core.hub.hf_hub_download", download)
    loaded = Blobs.from_pretrained("someone/blobs", revision="v1")
    assert loaded.labels == ["grass", "fox"]
    assert asked == [("someone/blobs", "config.json", "v1"), ("someone/blobs", "model.safetensors", "v1")]

    def fail(*_: object, **__: object) -> str:
        raise FileNotFoundError("404 Client Error.\nEntry Not Found")

    monkeypatch.setattr("attnmap_core.hub.hf_hub_download", fail)
    with pytest.raises(
        InputError, match=r"someone/blobs: no such folder, and the Hub gave no .*404"
    ) as failure:
        Blobs.from_pretrained("someone/blobs")
    assert "\n" not in str(failure.value)
    monkeypatch.chdir(folder.parent)
    (folder.parent / "runs").mkdir()
    with pytest.raises(InputError, match="runs/typo: no such folder, expected"):  # not looked up on the Hub
        Blobs.from_pretrained("runs/typo")


# --- Saving -----------------------------------------------------------------------------------------------


def test_saving_again_keeps_other_files(folder: Path, model: Blobs) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "README.md").write_text("card of the run")
    nn.init.normal_(model.head.weight)
    model.save_pretrained(folder)
    assert torch.equal(Blobs.from_pretrained(folder).head.weight, model.head.weight)
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "README.md").read_text() == "card of the run"
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize("exists", [True, False])
def test_full_disk_leaves_no_half_model(
    exists: bool, model: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    if exists:
        model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.glob("*")}

    def full(_: nn.Module, path: str, **__: Any) -> None:
        from safetensors import SafetensorError

        Path(path).write_bytes(b"half")
        raise SafetensorError(f"Error while serializing: I/O error: no space (os error {errno.ENOSPC})")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    nn.init.normal_(model.head.weight)
    with pytest.raises(InputError, match="no space left"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.glob("*")} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model"] if exists else [])


def test_card_of_a_saved_model_runs(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    text = (folder / "README.md").read_text()
    assert "license: apache-2.0" in text
    assert "https://example.org/paper" in text
    code = text.split("```python\n")[1].split("```")[0].splitlines()
    assert code[0].endswith("import Blobs")
    monkeypatch.chdir(folder.parent)
    photo_with_red(48, 32, (8, 8, 40, 24)).save("photo.jpg")
    exec("\n".join(code[1:]), {"Blobs": Blobs})
    assert capsys.readouterr().out.startswith("fox 0.9")


def test_push_to_hub_sends_the_whole_folder(model: Blobs, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: dict[str, Any] = {}

    class Api:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
            sent["private"] = private
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str, **_: Any) -> str:
            sent.update(repo_id=repo_id, files=sorted(os.listdir(folder_path)), message=commit_message)
            sent["card"] = (folder_path / "README.md").read_text()
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    url = model.push_to_hub("me/blobs", private=True, token="t", model_card_kwargs={"summary": "Red things."})
    assert url == "https://hub/me/blobs/commit/1"
    assert (sent["repo_id"], sent["private"], sent["token"]) == ("me/blobs", True, "t")
    assert sent["files"] == ["README.md", "config.json", "model.safetensors"]
    assert 'Blobs.from_pretrained("me/blobs")' in sent["card"]
    assert "Red things." in sent["card"]


def test_config_argument_is_refused(model: Blobs, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave config out"):
        model.save_pretrained(tmp_path, config={"num_classes": 9})


# --- Prediction -------------------------------------------------------------------------------------------


def test_boxes_are_in_photo_pixels(model: Blobs) -> None:
    # Input 16x24, cells of 4: the photo is 10 times as large, the red part is cells (1..2, 3..5).
    prediction = model.predict(photo_with_red(240, 160, (120, 40, 240, 120)), threshold=0.5)
    assert prediction.boxes_xyxy.shape == (1, 4)
    np.testing.assert_allclose(prediction.boxes_xyxy[0], [120, 40, 240, 120], atol=10)  # one input pixel
    assert prediction.boxes_xyxy[0, 2] == 240  # up to the border, end exclusive
    assert prediction.box_scores[0] > 0.7
    assert prediction.score_map.shape == (16, 24)
    assert prediction.score_map[8, 20] > 0.9
    assert (prediction.label, prediction.label_name) == (1, "fox")
    assert prediction.top[0] == (1, "fox", prediction.probability)
    assert sum(p for _, _, p in prediction.top) == pytest.approx(1)


def test_crop_is_undone(model: Blobs) -> None:
    model.preprocessing = Preprocessing(mean=(0, 0, 0), std=(1, 1, 1), size=(16, 16), crop="center")
    # The middle 160x160 of the photo is seen: x from 80 to 240.
    prediction = model.predict(photo_with_red(320, 160, (80, 0, 160, 80)))
    np.testing.assert_allclose(prediction.boxes_xyxy, [[80, 0, 160, 80]], atol=10)
    assert prediction.score_map.shape == (16, 32)  # over the whole photo
    assert not prediction.score_map[:, :7].any()
    assert prediction.score_map[3, 10] > 0.8


def test_all_contours_come_best_first(model: Blobs) -> None:
    image = photo_with_red(240, 160, (0, 0, 40, 40))
    image.paste((180, 0, 0), (120, 80, 240, 160))
    both = model.predict(image, threshold=0.3, contours="all")
    assert len(both.boxes_xyxy) == 2
    assert list(both.box_scores) == sorted(both.box_scores, reverse=True)
    largest = model.predict(image, threshold=0.3)
    assert len(largest.boxes_xyxy) == 1
    assert largest.boxes_xyxy[0].tolist() in both.boxes_xyxy.tolist()
    assert largest.boxes_xyxy[0, 0] > 100


def test_a_flat_map_has_no_box(model: Blobs) -> None:
    prediction = model.predict(Image.new("RGB", (30, 30)))
    assert prediction.boxes_xyxy.shape == (0, 4)
    assert prediction.box_scores.shape == (0,)
    assert not prediction.score_map.any()


def test_one_photo_or_many(model: Blobs, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    photo_with_red(48, 32, (8, 8, 24, 24)).save(path)
    same = [path, str(path), path.read_bytes(), Image.open(path), path.open("rb")]
    singles = [model.predict(photo) for photo in same[:4]]
    several = model.predict(same, batch_size=2)
    assert len(several) == 5
    for prediction in [*singles, *several]:
        np.testing.assert_array_equal(prediction.boxes_xyxy, singles[0].boxes_xyxy)
    assert [p.source for p in several] == [str(path), str(path), "photo 3", str(path), str(path)]
    assert model.predict([]) == []


def test_batches_do_not_change_results(model: Blobs) -> None:
    photos = [photo_with_red(48, 32, (x, 8, x + 16, 24)) for x in range(0, 32, 4)]
    one, many = model.predict(photos, batch_size=1), model.predict(photos, batch_size=5)
    for a, b in zip(one, many):
        np.testing.assert_array_equal(a.boxes_xyxy, b.boxes_xyxy)


def test_photos_stream(model: Blobs) -> None:
    opened: list[int] = []

    def photos() -> Any:
        for index in range(100):
            opened.append(index)
            yield Image.new("RGB", (8, 8))

    predictions = model.predict_iter(photos(), batch_size=4)
    assert opened == []
    next(predictions)
    assert len(opened) == 4


def test_unreadable_photos(model: Blobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    photos = [tmp_path / "bad.jpg", tmp_path / "good.png", tmp_path / "gone.png"]
    with pytest.raises(InputError, match=r"bad\.jpg: 0 bytes"):
        model.predict(photos)
    with caplog.at_level(logging.WARNING):
        assert [Path(p.source).name for p in model.predict(photos, on_unreadable="skip")] == ["good.png"]
    assert "bad.jpg" in caplog.text
    told: list[str] = []
    model.predict(photos, on_unreadable=lambda source, reason: told.append(f"{Path(source).name} {reason}"))
    assert [line.split()[0] for line in told] == ["bad.jpg", "gone.png"]
    with pytest.raises(InputError, match="0 bytes"):
        model.predict(photos[0], on_unreadable="skip")  # there is nothing else to return


def test_modes_are_restored(model: Blobs) -> None:
    model.train()
    model.head.eval()  # frozen, say
    photo = photo_with_red(48, 32, (8, 8, 24, 24))
    first = model.predict(photo)  # dropout would change it
    np.testing.assert_array_equal(first.score_map, model.predict(photo).score_map)
    assert model.training
    assert model.dropout.training
    assert not model.head.training


def test_values_that_are_not_finite(model: Blobs) -> None:
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(InputError, match=r"photo 1 .*not finite"):
        model.predict(Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(("option", "value"), [("threshold", 1.0), ("threshold", -0.1), ("batch_size", 0)])
def test_wrong_options(model: Blobs, option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} must be"):
        model.predict(Image.new("RGB", (8, 8)), **{option: value})


def test_localize_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match="PretrainedModel must define localize"):
        PretrainedModel().localize(torch.zeros(1, 3, 8, 8))
