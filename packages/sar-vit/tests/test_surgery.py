"""The four forms of the last block against a plain restatement, and the collector in every kind of training."""

from __future__ import annotations

import copy
import gc
import io
import weakref
from typing import Any

import pytest
import timm
import torch
from attnmap_core.backbones import create_backbone
from sar_vit import SpatialEntropyLoss, apply_sar, spatial_entropy, spatial_entropy_loss
from sar_vit.architectures import create_architecture
from sar_vit.surgery import ABLATION, collectors
from timm.layers import DropPath
from torch import Tensor, nn

FORMS = {name: dict(row.switches) for name, row in ABLATION.items() if name in "ABCD"}
each_form = pytest.mark.parametrize("switches", FORMS.values(), ids=FORMS.keys())


class Case:
    """A small network: how it is made, which query it has, images, and the name of its last block."""

    def __init__(
        self, name: str, size: tuple[int, int], block: str, query: str = "cls", **options: Any
    ) -> None:
        self.name, self.size, self.block, self.query, self.options = name, size, block, query, options

    def make(self, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
        torch.manual_seed(0)
        options = {"num_classes": 3} | self.options | more
        own = self.name in ("t2t_vit_14", "pvt_small", "cvt_13")
        net = (create_architecture if own else timm.create_model)(self.name, **options).to(dtype)
        with torch.no_grad():
            for parameter in net.parameters():  # norms and scales that are nowhere 1
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return net

    def images(self, dtype: torch.dtype = torch.float64, b: int = 2) -> Tensor:
        return torch.randn(b, 3, *self.size, generator=torch.Generator().manual_seed(1)).to(dtype)


TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
PYRAMID = {"embed_dims": (4, 4, 8, 12), "num_heads": (1, 1, 2, 3)}
CASES = {
    "ViT": Case("vit_tiny_patch16_224", (32, 32), "blocks.1", img_size=32, **TINY),
    "distilled": Case("deit_tiny_distilled_patch16_224", (32, 48), "blocks.1", img_size=(32, 48), **TINY),
    "DINOv2": Case("vit_small_patch14_reg4_dinov2", (32, 32), "blocks.1", img_size=32, **TINY),
    "DINOv3": Case("vit_small_patch16_dinov3", (32, 48), "blocks.1", img_size=32, **TINY),
    "no class token": Case(
        "vit_betwixt_patch16_reg4_gap_256", (32, 32), "blocks.1", "avg", img_size=32, **TINY
    ),
    "average": Case("vit_tiny_patch16_224", (32, 32), "blocks.1", "avg", img_size=32, **TINY),
    "Swin": Case(
        "swin_tiny_patch4_window7_224", (64, 64), "layers.1.blocks.1", "avg", img_size=64, window_size=3,
        embed_dim=12, depths=(1, 2), num_heads=(2, 3), drop_path_rate=0.0,
    ),
    "PVT-v2": Case("pvt_v2_b0", (64, 96), "stages.3.blocks.1", "avg", **PYRAMID),
    "PVT-v2 linear": Case("pvt_v2_b2_li", (64, 64), "stages.3.blocks.2", "avg", **PYRAMID),
    "T2T-ViT": Case(
        "t2t_vit_14", (64, 96), "blocks.2", img_size=64, embed_dim=12, depth=3, num_heads=3, token_dim=4,
        token_dropout=0.0,
    ),
    "PVT": Case(
        "pvt_small", (64, 96), "block4.1", img_size=64, embed_dims=(4, 6, 8, 12), depths=(1, 1, 1, 2),
        num_heads=(1, 2, 2, 3),
    ),
    "CvT": Case(
        "cvt_13", (64, 64), "stage2.blocks.2", img_size=64, embed_dims=(4, 6, 12), depths=(1, 1, 3),
        num_heads=(1, 2, 3),
    ),
}  # fmt: skip
GRIDS = {"distilled": (4, 6), "DINOv3": (4, 6), "Swin": (8, 8), "PVT-v2": (2, 3), "PVT-v2 linear": (7, 7)}
GRIDS |= {"T2T-ViT": (4, 6), "PVT": (2, 3), "CvT": (2, 2)}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def run_last_block(net: Any, name: str, images: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """What the last block gets in a forward pass, and what it gives."""
    seen: list[Any] = []

    def note(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        seen.extend((args, kwargs, output))

    handle = net.get_submodule(name).register_forward_hook(note, with_kwargs=True)
    net(images)
    handle.remove()
    args, kwargs, output = seen
    return args, kwargs, output


def restated(block: Any, args: Any, kwargs: Any, switches: dict[str, bool]) -> Tensor:
    """Eq. 1 and 2, 10 and 11, in the plainest way, of the untouched block's own parts."""
    x, *rest = args
    attention = getattr(block, "_attn", block.attn)  # Swin cuts its windows in between
    attended = attention(block.norm1(x), *rest, **kwargs)
    first = getattr(block, "ls1", nn.Identity())(attended)
    first = first if getattr(block, "gamma_1", None) is None else block.gamma_1 * first
    z = first + x if switches["msa_skip"] else first
    normed = block.norm2(z) if switches["mlp_norm"] else z
    hidden = block.mlp(normed, rest[0]) if hasattr(block.mlp, "dwconv") else block.mlp(normed)
    second = getattr(block, "ls2", nn.Identity())(hidden)
    second = second if getattr(block, "gamma_2", None) is None else block.gamma_2 * second
    return second + z if switches["mlp_skip"] else second


# --- the last block


@each_case
@each_form
def test_forms_of_the_last_block(case, switches):
    plain = case.make().eval()
    changed = apply_sar(copy.deepcopy(plain), **switches, query=case.query)
    images = case.images()
    with torch.no_grad():
        args, kwargs, output = run_last_block(changed, case.block, images)
        torch.testing.assert_close(output, restated(plain.get_submodule(case.block), args, kwargs, switches))
        if all(switches.values()):
            torch.testing.assert_close(changed(images), plain(images), rtol=0, atol=0)
        else:
            assert not torch.allclose(changed(images), plain(images))


@each_case
@each_form
def test_state_dict_loses_the_second_norm_and_nothing_else(case, switches):
    net = case.make()
    before = dict(net.state_dict())
    count = sum(parameter.numel() for parameter in net.parameters())
    changed = apply_sar(net, **switches, query=case.query)
    assert changed is net
    gone = set() if switches["mlp_norm"] else {f"{case.block}.norm2.{part}" for part in ("weight", "bias")}
    assert list(net.state_dict()) == [name for name in before if name not in gone]
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())
    lost = sum(before[name].numel() for name in gone)
    assert sum(parameter.numel() for parameter in net.parameters()) == count - lost


def test_parameters_of_the_published_models():
    for name, expected in (("deit_tiny_patch16_224", 5_717_032), ("deit_small_patch16_224", 22_049_896)):
        net = apply_sar(timm.create_model(name))
        assert sum(parameter.numel() for parameter in net.parameters()) == expected


@pytest.mark.parametrize("name", ["ViT", "DINOv3", "Swin", "PVT-v2", "PVT"])
@each_form
def test_stochastic_depth_goes_with_its_skip(name, switches):
    case = CASES[name]
    net = apply_sar(case.make(drop_path_rate=0.5), **switches, query=case.query).train()
    block = net.get_submodule(case.block)
    assert isinstance(block.drop_path1, DropPath) == switches["msa_skip"]
    assert isinstance(block.drop_path2, DropPath) == switches["mlp_skip"]
    torch.manual_seed(0)
    for _ in range(20):
        *_, output = run_last_block(net, case.block, case.images(b=4))
        assert output.abs().flatten(1).amax(1).min() > 0  # no sample is all zeros
        net.sar.clear()


def test_layer_scale_stays_on_its_branch():
    net = apply_sar(CASES["DINOv2"].make())
    assert {"blocks.1.ls1.gamma", "blocks.1.ls2.gamma"} <= set(net.state_dict())


def test_ablation_rows():
    assert list(ABLATION) == list("ABCDEF")
    assert [row.weight for row in ABLATION.values()] == [0, 0, 0, 0, 0.01, 0.01]
    assert ABLATION["E"].switches == ABLATION["A"].switches
    assert ABLATION["F"].switches == ABLATION["C"].switches
    assert ABLATION["F"].switches == {"msa_skip": False, "mlp_norm": False, "mlp_skip": True}
    with pytest.raises(TypeError):
        ABLATION["F"].switches["msa_skip"] = True


# --- similarity maps


def queries_and_keys(net: Any, case: Case, images: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of all tokens in the last block, by calling its linear layers once more."""
    block = net.get_submodule(case.block)
    args, kwargs, _ = run_last_block(net, case.block, images)
    x, attention = block.norm1(args[0]), block.attn
    heads = attention.num_heads
    if hasattr(block, "_attn"):  # Swin: to its linear layers windows do not matter
        weight, bias, x = attention.qkv.weight, attention.qkv.bias, x.flatten(1, 2)
    elif case.name in ("pvt_small", "cvt_13"):
        return *attention.queries_and_keys(x, args[1]), attention.scale
    elif hasattr(attention, "kv"):  # PVT-v2
        q = attention.q(x).unflatten(2, (heads, -1)).transpose(1, 2)
        if attention.pool is not None:
            x = (
                attention.sr(attention.pool(x.transpose(1, 2).unflatten(2, args[1])))
                .flatten(2)
                .transpose(1, 2)
            )
            x = attention.act(attention.norm(x))
        return q, attention.kv(x).unflatten(2, (2, heads, -1))[:, :, 0].transpose(1, 2), attention.scale
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:  # EVA keeps them apart
            bias = torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
    qkv = nn.functional.linear(x, weight, bias)
    q, k, _ = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if kwargs.get("rope") is not None:
        from timm.layers.pos_embed_sincos import apply_rot_embed_cat

        half = {"half": True} if getattr(attention, "rotate_half", False) else {}
        p = attention.num_prefix_tokens
        q, k = (
            torch.cat([t[:, :, :p], apply_rot_embed_cat(t[:, :, p:], kwargs["rope"], **half)], 2)
            for t in (q, k)
        )
    return q, k, attention.scale


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("similarity", ["dot", "cosine", "softmax"])
def test_maps_of_the_last_block(name, similarity):
    case, (h, w) = CASES[name], GRIDS.get(name, (4, 4))
    net = apply_sar(case.make(), query=case.query).train()
    images = case.images()
    net(images)
    [S] = net.sar.take(similarity)
    q, k, scale = queries_and_keys(net, case, images)
    prefix = k.shape[2] - h * w
    assert prefix == getattr(net, "num_prefix_tokens", 0)
    one = q[:, :, 0] if case.query == "cls" else q[:, :, prefix:].mean(2)
    logits = torch.einsum("bhd,bhnd->bhn", one, k) * scale
    if similarity == "cosine":
        logits = nn.functional.cosine_similarity(k, one.unsqueeze(2), dim=-1)
    expected = logits.softmax(-1) if similarity == "softmax" else logits
    torch.testing.assert_close(S, expected[..., prefix:].unflatten(2, (h, w)))


def test_swin_of_the_tests_has_shifted_and_padded_windows():
    block = CASES["Swin"].make().get_submodule("layers.1.blocks.1")
    assert (block.window_size, block.shift_size) == ((3, 3), (1, 1))  # on a map of 8x8


@each_case
def test_two_lines(case):
    net = apply_sar(case.make(), query=case.query).train()
    loss = net(case.images()).square().mean() + 0.01 * spatial_entropy_loss(net)
    loss.backward()
    without = [
        name for name, weight in net.named_parameters() if weight.requires_grad and weight.grad is None
    ]
    assert not without
    assert len(net.sar) == 0


def test_gradient_of_the_loss_through_the_network():
    case = CASES["ViT"]
    net = apply_sar(case.make())
    images = case.images()
    net(images)
    found = torch.autograd.grad(spatial_entropy_loss(net), net.blocks[1].attn.qkv.weight)
    q, k, scale = queries_and_keys(net, case, images)
    S = (torch.einsum("bhd,bhnd->bhn", q[:, :, 0], k) * scale)[..., 1:].reshape(2, 3, 4, 4)
    expected = torch.autograd.grad(spatial_entropy(S, reduction="mean"), net.blocks[1].attn.qkv.weight)
    torch.testing.assert_close(found, expected)


# --- the collector


@pytest.fixture
def net() -> Any:
    return apply_sar(CASES["ViT"].make(torch.float32)).train()


@pytest.fixture
def images() -> Tensor:
    return CASES["ViT"].images(torch.float32)


def test_several_forwards_are_one_batch(net, images):
    first, second = images, torch.randn(3, 3, 32, 32)
    net(first)
    net(second)
    assert len(net.sar) == 2
    apart = spatial_entropy_loss(net)
    net(torch.cat([first, second]))
    torch.testing.assert_close(apart, spatial_entropy_loss(net))
    net(first)
    net(second)
    assert spatial_entropy_loss(net, reduction="none").shape == (5, 3)


def test_forwards_of_several_sizes_have_their_own_grids():
    net = apply_sar(CASES["ViT"].make(dynamic_img_size=True))
    sizes = [(32, 32), (16, 24), (24, 16), (48, 32)]
    for size in sizes:
        net(torch.randn(2, 3, *size).double())
    assert [tuple(S.shape[2:]) for S in net.sar.take()] == [(h // 8, w // 8) for h, w in sizes]
    net.forward_features(torch.randn(2, 3, 16, 24).double())  # past the network's own call
    assert net.sar.take()[0].shape == (2, 3, 2, 3)


def test_nothing_is_collected_in_evaluation_or_without_gradient(net, images):
    with torch.no_grad():
        net(images)
    net.eval()(images)
    assert len(net.sar) == 0
    with torch.no_grad(), net.sar.collecting():
        net(images)
    net(images)
    assert len(net.sar) == 1
    net.sar.clear()
    for similarity in ("dot", "cosine", "softmax"):
        with torch.no_grad(), net.sar.collecting():
            net(images)
        assert spatial_entropy_loss(net, similarity=similarity).ndim == 0


def test_looking_on_does_not_disturb_what_waits_for_the_loss(net, images):
    net(images)
    with torch.no_grad(), net.sar.recording() as record:
        net(torch.zeros(1, 3, 32, 32))
    assert net.sar.maps(record, "softmax").shape == (1, 3, 4, 4)
    [S] = net.sar.take()
    assert S.shape == (2, 3, 4, 4)
    assert S.requires_grad


def test_reading_without_a_forward_is_an_error(net, images):
    with pytest.raises(RuntimeError, match="no forward pass was collected"):
        spatial_entropy_loss(net)
    net(images)
    spatial_entropy_loss(net)
    with pytest.raises(RuntimeError, match="no forward pass was collected") as error:
        spatial_entropy_loss(net)
    assert "\n" not in str(error.value)


def test_forwards_that_nobody_reads_do_not_pile_up(net, images):
    for _ in range(32):
        net(images[:1])
    with pytest.raises(RuntimeError, match="none was taken"):
        net(images[:1])
    net.sar.clear()
    net(images)
    assert len(net.sar) == 1


def test_without_collector(images):
    net = apply_sar(CASES["ViT"].make(torch.float32), collect=False).train()
    net(images)
    assert len(net.sar) == 0


def test_graph_is_freed(net):
    images = torch.randn(2, 3, 32, 32)
    alive = weakref.ref(images)
    loss = net(images).mean() + spatial_entropy_loss(net)
    loss.backward()
    del images, loss
    gc.collect()
    assert alive() is None
    images = torch.randn(2, 3, 32, 32)
    alive = weakref.ref(images)
    net(images)
    del images
    gc.collect()
    assert alive() is not None  # it waits for the loss
    net.sar.clear()
    gc.collect()
    assert alive() is None


def test_a_copy_has_its_own_collector(net, images):
    net(images)
    with net.sar.collecting():
        net(images)
    average = copy.deepcopy(net)
    assert (len(net.sar), len(average.sar)) == (2, 0)
    net.sar.take()
    net(images)
    assert average.sar is not net.sar
    assert average.sar.block is average.blocks[-1]
    average(images)
    assert (len(net.sar), len(average.sar)) == (1, 1)
    torch.testing.assert_close(spatial_entropy_loss(average), spatial_entropy_loss(net))
    with torch.no_grad():
        for parameter in average.parameters():
            parameter.add_(torch.randn_like(parameter))
    average(images)
    net(images)
    assert not torch.equal(spatial_entropy_loss(average), spatial_entropy_loss(net))


@pytest.mark.parametrize("name", ["ViT", "Swin", "PVT-v2", "PVT"])
def test_copies_and_pickles_of_every_kind(name):
    case = CASES[name]
    net = apply_sar(case.make(), query=case.query)
    stream = io.BytesIO()
    torch.save(net, stream)
    stream.seek(0)
    for other in (copy.deepcopy(net), torch.load(stream, weights_only=False)):
        other(case.images())
        assert (len(net.sar), len(other.sar)) == (0, 1)


def step(net: nn.Module, images: Tensor) -> Tensor:
    return net(images).square().mean() + 0.1 * spatial_entropy_loss(net)


def gradients(net: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [weight for weight in net.parameters() if weight.requires_grad]))


@pytest.mark.parametrize("name", ["ViT", "DINOv3", "Swin", "PVT-v2", "T2T-ViT", "PVT", "CvT"])
def test_gradient_checkpointing(name):
    case = CASES[name]
    net = apply_sar(case.make(), query=case.query).train()
    expected = gradients(net, step(net, case.images()))
    net.set_grad_checkpointing(True)
    torch.testing.assert_close(gradients(net, step(net, case.images())), expected)
    assert len(net.sar) == 0


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="PyTorch 2.6 breaks the graph")
@pytest.mark.parametrize(
    ("name", "whole"), [("ViT", True), ("ViT", False), ("DINOv3", False), ("Swin", True), ("PVT-v2", False)]
)
def test_compiled_in_one_graph(name, whole):
    torch._dynamo.reset()
    case = CASES[name]
    net = apply_sar(case.make(), query=case.query).train()
    images = case.images()
    expected = gradients(net, step(net, images))
    one_graph: dict[str, Any] = {"fullgraph": True, "backend": "aot_eager"}
    compiled_step, compiled_net = torch.compile(step, **one_graph), torch.compile(net, **one_graph)
    for _ in range(2):
        loss = compiled_step(net, images) if whole else step(compiled_net, images)
        torch.testing.assert_close(gradients(net, loss), expected)
        assert len(net.sar) == 0


def test_distributed_wrapper(net, images, tmp_path):
    expected = gradients(net, step(net, images))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(net)
        for _ in range(2):
            wrapped.zero_grad()
            step(wrapped, images).backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close([weight.grad for weight in net.parameters()], expected)


def test_autocast(net, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(images)
        loss = spatial_entropy_loss(net)
    assert loss.dtype == torch.float32
    loss.backward()


def test_attention_stays_fused_and_one_row_is_computed(net, images):
    assert net.blocks[-1].attn.fused_attn
    net(images)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.bmm.default:
                sizes.append(result.numel())
            return result

    with Watch():
        spatial_entropy_loss(net)
    assert sizes == [2 * 3 * 17]  # images, heads, keys


def test_a_part_of_a_larger_model(net, images):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.momentum = net, copy.deepcopy(net)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            with torch.no_grad():
                self.momentum(a)
            return self.base(a).mean() + self.base(b).mean()

    pair = Pair()
    pair(images, images)
    assert [len(collector) for collector in collectors(pair)] == [2, 0]
    assert SpatialEntropyLoss()(pair).requires_grad


def test_backbone_of_core(images):
    backbone = apply_sar(create_backbone("vit", img_size=32, **TINY))
    backbone(images)
    assert backbone.model.sar.take()[0].shape == (2, 3, 4, 4)
    assert "model.blocks.1.norm2.weight" not in backbone.state_dict()


# --- refusals


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: timm.create_model("resnet18"), {}, "ResNet has no transformer block .* expected a timm ViT"),
        (lambda: nn.Linear(2, 2), {}, "Linear has no transformer block"),
        (lambda: CASES["Swin"].make(), {}, "has no class token; use query='avg'"),
        (lambda: CASES["PVT-v2"].make(), {}, "has no class token; use query='avg'"),
        (lambda: CASES["no class token"].make(), {}, "has no class token; use query='avg'"),
        (lambda: CASES["ViT"].make(), {"query": "max"}, "query must be"),
        (lambda: apply_sar(CASES["ViT"].make()), {}, "went through apply_sar before"),
        (lambda: torch.compile(CASES["ViT"].make()), {}, "wraps the model already"),
        (lambda: timm.create_model("beit_base_patch16_224", depth=1), {}, "last block is a"),
        (lambda: timm.create_model("vit_relpos_small_patch16_224", depth=1), {}, "last block is a"),
    ],
)
def test_refused_models(make, options, message):
    net = make()
    before = list(net.state_dict())
    with pytest.raises(ValueError, match=message) as error:
        apply_sar(net, **options)
    assert "\n" not in str(error.value)
    assert list(net.state_dict()) == before


def test_a_model_without_collector():
    with pytest.raises(ValueError, match="has no part that went through apply_sar; call apply_sar"):
        spatial_entropy_loss(CASES["ViT"].make())


def test_keys_that_make_no_grid(images):
    net = apply_sar(CASES["ViT"].make(torch.float32, patch_drop_rate=0.5)).train()
    net(images)
    with pytest.raises(
        ValueError, match=r"8 patch keys, but images of 32x32 make a grid of 4x4; .* dropout off"
    ):
        spatial_entropy_loss(net)
    assert len(net.sar) == 0
    net.blocks(torch.randn(2, 1 + 12, 24))
    with pytest.raises(ValueError, match="12 patch keys and the size of the images is not known"):
        spatial_entropy_loss(net)
