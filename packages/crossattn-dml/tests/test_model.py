"""EmbeddingModel: what its vectors and maps are, batch norm in training, encoding and searching photos."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from attnmap_core.errors import InputError
from crossattn_dml import EmbeddingModel
from PIL import Image
from torch import nn

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def tiny(**options) -> EmbeddingModel:
    torch.manual_seed(0)
    return EmbeddingModel(
        "vit", **{"embedding_dim": 6, "img_size": (32, 48), "backbone_options": TINY} | options
    )


def images(b: int = 2, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    return torch.randn(b, 3, *size, generator=torch.Generator().manual_seed(1))


def photos(n: int = 5) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)) for k in range(n)]


@pytest.mark.parametrize("pool", ["avg", "avg+max"])
def test_embedding_is_the_head_of_the_pooled_locations(pool):
    model = tiny(pool=pool).eval()
    with torch.no_grad():
        found, features = model(images()), model.backbone(images())
    torch.testing.assert_close(found.tokens, features.tokens)
    assert found.grid == (4, 6)
    flat = features.map.flatten(2)
    pooled = flat.mean(2) + (flat.amax(2) if pool == "avg+max" else 0)
    torch.testing.assert_close(found.embeddings, pooled @ model.head.weight.T + model.head.bias)


def test_tokens_of_a_cnn_are_row_major():
    model = EmbeddingModel("resnet10t", 6, (64, 96)).eval()
    with torch.no_grad():
        found, feature_map = model(images(size=(64, 96))), model.backbone(images(size=(64, 96))).map
    h, w = found.grid
    assert (h, w) == (2, 3)
    for r in range(h):
        for c in range(w):
            assert torch.equal(found.tokens[:, r * w + c], feature_map[:, :, r, c])


@pytest.mark.parametrize("fc_norm", [False, True])
def test_tokens_before_the_final_norm(fc_norm, tmp_path):
    """For the stack alone: embeddings and score maps are those of the same network that gives normed tokens."""
    options = {"backbone_options": TINY | {"fc_norm": fc_norm, "final_norm": True}}
    model, normed = tiny(memory="pre_norm", **options), tiny(**options)
    with torch.no_grad():  # other than what it starts with
        model.norm.weight.uniform_(0.5, 2)
        model.norm.bias.uniform_(-1, 1)
    net = normed.backbone.model
    ending = net.fc_norm if fc_norm else net.norm
    ending.load_state_dict(model.norm.state_dict())
    seen = []
    ending.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][:, 1:]))
    model.save_pretrained(tmp_path)
    for one in (model.eval(), EmbeddingModel.from_pretrained(tmp_path).eval()):
        with torch.no_grad():
            ours, theirs = one(images()), normed.eval()(images())
            torch.testing.assert_close(ours.tokens, seen[-1])
            assert not torch.allclose(ours.tokens, theirs.tokens, atol=0.1)
            torch.testing.assert_close(ours.embeddings, theirs.embeddings)
            torch.testing.assert_close(one.localize(images())[1], normed.localize(images())[1])


def test_score_map_tells_the_embedding_apart_by_location():
    model = tiny().eval()
    with torch.no_grad():
        z, maps = model.localize(images())
        u = model(images()).embeddings
    torch.testing.assert_close(maps.mean((1, 2)), u.norm(dim=1))
    torch.testing.assert_close(z, u / u.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("batch_norm", ["frozen", "fixed", "trained"])
def test_batch_norm(batch_norm):
    model = EmbeddingModel("resnet10t", 6, 64, batch_norm=batch_norm)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval().train()
    model(images(4, (64, 64))).embeddings.square().sum().backward()
    changed = any(not torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert changed == (batch_norm == "trained")
    assert all(norm.weight.requires_grad == (batch_norm != "fixed") for norm in norms)
    assert model.training
    assert model.backbone.training


def test_encode_gives_unit_rows_in_order_whatever_the_batch():
    model = tiny().train()
    whole, single = model.encode(photos(), batch_size=5), model.encode(photos(), batch_size=2)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(single, whole, atol=1e-5)
    np.testing.assert_allclose(model.encode(photos()[3]), whole[3:4], atol=1e-5)
    assert model.training
    assert model.encode([]).shape == (0, 6)
    with pytest.raises(InputError, match="batch_size 0"):
        model.encode(photos(), batch_size=0)


def test_encode_and_unreadable_photos(tmp_path):
    model, missed = tiny(), []
    (tmp_path / "broken.jpg").write_bytes(b"no photo")
    given = [photos()[0], tmp_path / "broken.jpg", photos()[1]]
    with pytest.raises(InputError, match=r"broken\.jpg"):
        model.encode(given)
    found = model.encode(given, on_unreadable=lambda name, why: missed.append(name))
    np.testing.assert_allclose(found, model.encode(photos()[:2]), atol=1e-6)
    assert missed == [str(tmp_path / "broken.jpg")]


def test_damaged_weights_are_told():
    model = tiny()
    model.head.bias.data[0] = torch.nan
    with pytest.raises(InputError, match="photo 1 or a photo just after it: the embedding is not finite"):
        model.encode(photos())


def test_search():
    model = tiny()
    z = model.encode(photos())
    of_itself = model.search(photos(), k=4)
    assert of_itself.indices.shape == (5, 4)
    assert not (of_itself.indices == np.arange(5)[:, None]).any()
    cosines = z.astype(np.float64) @ z.T.astype(np.float64)
    np.fill_diagonal(cosines, -2)
    np.testing.assert_array_equal(of_itself.indices[:, 0], cosines.argmax(1))
    np.testing.assert_allclose(of_itself.similarities[:, 0], cosines.max(1), atol=1e-6)
    assert model.search(photos()[2:3], z, k=1).indices.tolist() == [[2]]
    assert model.search(torch.from_numpy(z[:2]), photos(), k=1).indices.tolist() == [[0], [1]]
    with pytest.raises(InputError, match="k 9: expected 1 to 5"):
        model.search(z, z, k=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embedding_dim": 0}, "embedding_dim 0: expected 1 or more"),
        ({"pool": "max"}, "pool max: expected avg"),
        ({"batch_norm": "off"}, "batch_norm off: expected frozen"),
        ({"memory": "all"}, "memory all: expected normed"),
        (
            {"memory": "pre_norm", "backbone": "resnet10t", "backbone_options": {}},
            "memory pre_norm: .* got resnet10t",
        ),
        ({"backbone_options": {}, "backbone": "resnt50"}, "resnt50"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        EmbeddingModel(**{"backbone": "vit", "img_size": 32, "backbone_options": TINY} | options)


def test_inference_never_imports_the_stack():
    code = (
        "import sys, crossattn_dml; crossattn_dml.EmbeddingModel;"
        "print([m for m in sys.modules if m.startswith(('crossattn_dml.', 'pytorch_metric_learning'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['crossattn_dml.model']"
