"""The stack against a loop over pairs, written from the equations: values, gradients, tiles, chosen pairs."""

from __future__ import annotations

import math

import pytest
import torch
from attnmap_core.errors import InputError
from crossattn_dml import CrossAttentionStack
from crossattn_dml.cross_attention import CrossAttentionBlock, _share, closed
from torch import Tensor

D, C = 8, 12
EXACT = {"rtol": 0, "atol": 1e-10}


# --- The reference: one pair, one block, one head at a time ---------------------------------------------------


def norm(x: Tensor, layer: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * layer.weight + layer.bias


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    return x @ layer.weight.T + layer.bias


def one_block(block: CrossAttentionBlock, own: Tensor, query: Tensor, X: Tensor, code: Tensor | None = None):
    """Streams ``(d,)``, tokens ``(n, C)``; gives the new stream and the weights ``(heads, n)``."""
    q = linear(norm(query, block.norm_query), block.query)
    memory = norm(X, block.norm_memory)
    k, v = linear(memory, block.key), linear(memory, block.value)
    k = k if code is None else k + code
    e = len(q) // block.heads
    read, weights = [], []
    for h in range(block.heads):
        part = slice(h * e, (h + 1) * e)
        logits = torch.stack([q[part] @ key[part] / math.sqrt(e) for key in k])
        a = (logits - logits.max()).exp()
        a = a / a.sum()
        weights.append(a)
        read.append(sum(a[t] * v[t, part] for t in range(len(v))))
    found = linear(torch.cat(read), block.out)
    if block.mode == "block":
        s = own + found
        hidden = linear(norm(s, block.norm), block.expand)
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        found = s + linear(hidden, block.contract)
    elif block.mode == "no_ffn":
        found = own + found
    return found, torch.stack(weights)


def loop(stack: CrossAttentionStack, u: Tensor, X: Tensor, i: int, j: int, code: Tensor | None = None):
    """``p^n[i|j]`` and ``p^n[j|i]`` for n = 0..N, and the weights on the tokens of i."""
    width = stack.width
    enter = (lambda x: x) if width == D else (lambda x: linear(x, stack.enter))
    leave = (lambda x: x) if width == D else (lambda x: linear(x, stack.leave))
    a, b = enter(u[i]), enter(u[j])
    levels, weights = [(u[i], u[j])], []
    for n in range(1, stack.depth + 1):
        block = stack.block(n)
        if stack.hierarchy == "mutual":
            (a, w), (b, _) = one_block(block, a, b, X[i], code), one_block(block, b, a, X[j], code)
        else:  # the stream that reads X_i is an embedding of j
            (b, w), (a, _) = one_block(block, b, b, X[i], code), one_block(block, a, a, X[j], code)
        levels.append((leave(a), leave(b)))
        weights.append(w)
    return levels, weights


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def loop_similarity(
    stack: CrossAttentionStack, u: Tensor, X: Tensor, code: Tensor | None = None
) -> dict[int, Tensor]:
    b = len(u)
    S = {n: torch.zeros(b, b, dtype=u.dtype) for n in range(stack.depth + 1)}
    for a in range(b):
        self_levels, _ = loop(stack, u, X, a, a, code)
        for j in range(b):
            levels, _ = loop(stack, u, X, a, j, code)
            for n, (p_a, p_j) in enumerate(levels):
                first = {"mutual": p_a, "target": u[a], "anchor": self_levels[n][0]}[stack.similarity]
                S[n][a, j] = unit(first) @ unit(p_j)
    return S


def make(seed: int = 0, b: int = 5, n: int = 6, **options) -> tuple[CrossAttentionStack, Tensor, Tensor]:
    torch.manual_seed(seed)
    stack = CrossAttentionStack(D, C, **{"blocks": 3, "heads": 2, "init": "xavier"} | options).double()
    for parameter in stack.parameters():  # biases and norms too
        torch.nn.init.normal_(parameter, std=0.4)
    return stack, torch.randn(b, D, dtype=torch.float64), torch.randn(b, n, C, dtype=torch.float64)


OFF_DIAGONAL = ~torch.eye(5, dtype=torch.bool)


@pytest.mark.parametrize("tile", [None, 2])
@pytest.mark.parametrize("mode", ["block", "no_ffn", "ca_only"])
@pytest.mark.parametrize("similarity", ["mutual", "target", "anchor"])
@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_all_pairs_equal_the_loop(hierarchy, similarity, mode, tile):
    stack, u, X = make(hierarchy=hierarchy, similarity=similarity, mode=mode, tile=tile)
    with torch.no_grad():
        found, expected = stack(u, X, levels=range(4)), loop_similarity(stack, u, X)
    for n in range(4):
        torch.testing.assert_close(found[n][OFF_DIAGONAL], expected[n][OFF_DIAGONAL], **EXACT)


@pytest.mark.parametrize(
    "options",
    [
        {"width": 12},
        {"share_blocks": True},
        {"positions": "sincos2d_keys"},
        {"width": 4, "hierarchy": "running"},
    ],
    ids=str,
)
def test_options_equal_the_loop(options):
    stack, u, X = make(**options)
    code = None
    if "positions" in options:  # sines of row and column, then their cosines
        bands = 1 / 10000 ** (torch.arange(D // 4) / (D // 4))
        cells = [(r, c) for r in range(2) for c in range(3)]
        code = torch.stack(
            [torch.cat([f(x * bands) for f in (torch.sin, torch.cos) for x in cell]) for cell in cells]
        )
        code = code.double()
    with torch.no_grad():
        found, expected = stack(u, X, levels=(1, 3), grid=(2, 3)), loop_similarity(stack, u, X, code)
    tolerance = {"rtol": 0, "atol": 1e-6} if code is not None else EXACT
    for n in (1, 3):
        torch.testing.assert_close(found[n][OFF_DIAGONAL], expected[n][OFF_DIAGONAL], **tolerance)


def gradients(stack, u, X, value) -> list[Tensor]:
    return list(torch.autograd.grad(value, [u, X, *stack.parameters()]))


def weighted(S: dict[int, Tensor], seed: int = 3) -> Tensor:
    """A sum that tells every pair and level apart, the diagonal aside."""
    total = torch.zeros((), dtype=torch.float64)
    for n, values in S.items():
        weight = torch.randn(
            values.shape, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64
        )
        total = total + (weight.fill_diagonal_(0) * values).sum()
    return total


@pytest.mark.parametrize("similarity", ["mutual", "anchor"])
@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_gradients_equal_the_loop(hierarchy, similarity):
    stack, u, X = make(b=4, n=3, blocks=2, hierarchy=hierarchy, similarity=similarity)
    u, X = u.requires_grad_(), X.requires_grad_()
    expected = loop_similarity(stack, u, X)
    expected = gradients(stack, u, X, weighted({n: expected[n] for n in (1, 2)}))
    for tile in (None, 3):
        stack.tile = tile
        found = gradients(stack, u, X, weighted(stack(u, X, levels=(1, 2))))
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("b", [1, 2, 7, 9])
@pytest.mark.parametrize("tile", [1, 3, 4, 100])
def test_tiles_do_not_change_values_nor_gradients(tile, b):
    stack, u, X = make(seed=tile, b=b)
    u, X = u.requires_grad_(), X.requires_grad_()
    levels = (0, 1, 3)
    whole = stack(u, X, levels=levels)
    stack.tile = tile
    tiled = stack(u, X, levels=levels)
    for n in levels:
        torch.testing.assert_close(tiled[n], whole[n], **EXACT)
    for x, y in zip(gradients(stack, u, X, weighted(tiled)), gradients(stack, u, X, weighted(whole))):
        torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("tile", [None, 2, 3])
@pytest.mark.parametrize("similarity", ["mutual", "target", "anchor"])
@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_chosen_pairs_are_those_of_all(hierarchy, similarity, tile):
    stack, u, X = make(b=6, hierarchy=hierarchy, similarity=similarity, tile=tile)
    u, X = u.requires_grad_(), X.requires_grad_()
    whole = stack(u, X, levels=(0, 2, 3))
    for density in (0.0, 0.1, 0.4, 1.0):
        pairs = torch.rand(6, 6, generator=torch.Generator().manual_seed(int(10 * density))) < density
        found, wanted = stack(u, X, levels=(0, 2, 3), pairs=pairs), closed(pairs)
        assert not wanted.diagonal().any()
        for n in (0, 2, 3):
            assert found[n][~wanted].isnan().all()
            torch.testing.assert_close(found[n][wanted], whole[n][wanted], **EXACT)
        total = sum(torch.where(wanted, found[n], 0).sum() for n in (0, 2, 3))
        expected = sum(torch.where(wanted, whole[n], 0).sum() for n in (0, 2, 3))
        for x, y in zip(
            torch.autograd.grad(total, [u, X, *stack.parameters()], materialize_grads=True),
            torch.autograd.grad(
                expected, [u, X, *stack.parameters()], retain_graph=True, materialize_grads=True
            ),
        ):
            torch.testing.assert_close(x, y, **EXACT)


@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_conditional_embeddings_and_weights_equal_the_loop(hierarchy):
    stack, u, X = make(hierarchy=hierarchy)
    partners = torch.tensor([3, 0])
    with torch.no_grad():
        P = stack.conditional(u, X, levels=range(4))
        some = stack.conditional(u, X, partners=partners, levels=range(4))
        A = stack.attention_maps(u, X, levels=(1, 3))
        for i in range(5):
            for j in range(5):
                levels, weights = loop(stack, u, X, i, j)
                for n in range(4):
                    torch.testing.assert_close(P[n][i, j], levels[n][0], **EXACT)
                for n in (1, 3):
                    torch.testing.assert_close(A[n][i, j], weights[n - 1], **EXACT)
    for n in range(4):
        torch.testing.assert_close(some[n], P[n][:, partners], **EXACT)
    torch.testing.assert_close(
        A[3].sum(-1), torch.ones(5, 5, 2, dtype=torch.float64)
    )  # over tokens, not partners


# --- Properties -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_equivariance(hierarchy):
    stack, u, X = make(b=6, hierarchy=hierarchy)
    order, tokens = torch.randperm(6), torch.randperm(6)
    with torch.no_grad():
        S = stack(u, X)[3]
        torch.testing.assert_close(stack(u[order], X[order])[3], S[order][:, order], **EXACT)
        torch.testing.assert_close(stack(u, X[:, tokens])[3], S, **EXACT)  # the memory is a set
        torch.testing.assert_close(S, S.T, **EXACT)
        P = stack.conditional(u, X)[3]
        torch.testing.assert_close(stack.conditional(u, X[:, tokens])[3], P, **EXACT)


def test_only_own_tokens_enter_as_values():
    stack, u, X = make(blocks=1)
    constant = X.clone()
    constant[1] = constant[1, :1]  # all tokens of image 1 alike: attention over them cannot matter
    with torch.no_grad():
        P = stack.conditional(u, constant)[1]
    torch.testing.assert_close(P[1], P[1, :1].expand(5, -1), **EXACT)
    assert (P[0, 1:] - P[0, :1]).abs().max() > 1e-3


@pytest.mark.parametrize("options", [{}, {"width": 12}, {"share_blocks": True}, {"mode": "no_ffn"}], ids=str)
def test_zero_out_starts_at_the_baseline(options):
    torch.manual_seed(0)
    stack = CrossAttentionStack(D, C, blocks=2, heads=2, **options).double()
    u, X = torch.randn(4, D, dtype=torch.float64), torch.randn(4, 6, C, dtype=torch.float64)
    S = stack(u, X, levels=(0, 1, 2))
    for n in (1, 2):
        # The orthogonal maps to another width are drawn in float32.
        torch.testing.assert_close(S[n], S[0], rtol=0, atol=1e-6 if "width" in options else 1e-10)
    optimizer = torch.optim.SGD(stack.parameters(), lr=0.1)
    for step in range(2):
        optimizer.zero_grad()
        weighted({2: stack(u, X)[2]}).backward()
        for name in ("query", "key", "value"):
            gradient = getattr(stack.block(1), name).weight.grad
            assert bool(gradient.any()) == bool(step), (step, name)
        optimizer.step()


def test_one_block_of_attention_alone_is_the_same_in_both_hierarchies():
    mutual, u, X = make(blocks=1, mode="ca_only")
    running, _, _ = make(blocks=1, mode="ca_only", hierarchy="running")
    with torch.no_grad():
        P, c = mutual.conditional(u, X)[1], running.conditional(u, X)[1]
    torch.testing.assert_close(P, c.transpose(0, 1), **EXACT)


def test_running_target_is_informative_at_the_start():
    """``<z_a, c[a,j]>`` is the unconditional similarity there; the literal index would give 1."""
    stack = CrossAttentionStack(D, C, blocks=1, heads=2, hierarchy="running", similarity="target").double()
    u, X = make()[1:]
    S = stack(u, X, levels=(0, 1))
    torch.testing.assert_close(S[1], S[0], **EXACT)


def saved_bytes(stack: CrossAttentionStack, u: Tensor, X: Tensor) -> int:
    """Held for the backward pass when the forward pass is over, each storage once."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = stack(u, X)[stack.depth].sum()
    assert loss.requires_grad
    return sum(held.values())


def test_memory_follows_the_tile_and_not_the_pairs():
    stack = CrossAttentionStack(32, 32, blocks=2, heads=2)
    u, X = torch.randn(64, 32), torch.randn(64, 4, 32)
    whole = saved_bytes(stack, u, X)
    stack.tile = 8
    tiled, half = saved_bytes(stack, u, X), saved_bytes(stack, u[:32], X[:32])
    assert whole > 2 * 64 * 64 * 12 * 32  # some 12 d floats for each pair and block
    assert tiled < whole / 20
    assert tiled < 2.2 * half  # linear in the images


def test_dropout_is_the_same_when_a_tile_is_computed_again():
    stack, u, X = make(dropout=0.3, tile=2)
    u = u.requires_grad_()
    torch.manual_seed(5)
    value = weighted(stack(u, X))
    [gradient] = torch.autograd.grad(value, u)
    step, direction = 1e-6, torch.randn_like(u)
    moved = []
    for sign in (1, -1):
        torch.manual_seed(5)
        moved.append(weighted(stack(u + sign * step * direction, X)))
    slope = (moved[0] - moved[1]) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-6)


def test_autocast_keeps_streams_and_similarities_in_float32():
    stack, u, X = make()
    stack, u, X = stack.float(), u.float(), X.float()
    exact = stack(u, X, levels=(0, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = stack(u.bfloat16(), X.bfloat16(), levels=(0, 3))
    for n in (0, 3):
        assert found[n].dtype == torch.float32
        assert (found[n] - exact[n]).abs().max() < 0.1


@pytest.mark.parametrize("number", [1, 2, 3, 7])
@pytest.mark.parametrize("parts", [1, 2, 5, 8])
def test_shares_hold_every_tile_once(parts, number):
    shares = _share(parts, number)
    assert sorted(tile for share in shares for tile in share) == [
        (i, j) for i in range(parts) for j in range(i, parts)
    ]
    loads = [sum(1 + (i != j) for i, j in share) for share in shares]
    assert max(loads) - min(loads) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 3}, "heads 3: expected a divisor of the width 8"),
        ({"blocks": 0}, "blocks 0: expected 1 or more"),
        ({"tile": 0}, "tile 0: expected"),
        ({"dropout": 1.0}, "dropout 1.0: expected 0 to below 1"),
        ({"hierarchy": "both"}, "hierarchy both: expected mutual or running"),
        ({"mode": "ca_only"}, 'no direction; use "xavier"'),
        ({"width": 6, "positions": "sincos2d_keys"}, "multiple of 4"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        CrossAttentionStack(D, C, **{"heads": 2} | options)


def test_bad_input():
    stack, u, X = make()
    with pytest.raises(ValueError, match=r"expected embeddings \(b, 8\)"):
        stack(u[:, :4], X)
    with pytest.raises(ValueError, match=r"levels must be in 0\.\.3"):
        stack(u, X, levels=(4,))
    stack.positions = "sincos2d_keys"
    with pytest.raises(ValueError, match="grid of 6 tokens, got None"):
        stack(u, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tile", [None, 3])
@pytest.mark.parametrize("hierarchy", ["mutual", "running"])
def test_cuda_agrees_with_the_cpu(hierarchy, tile):
    torch.manual_seed(0)
    stack = CrossAttentionStack(
        D, C, blocks=2, heads=2, hierarchy=hierarchy, init="xavier", tile=tile
    ).double()
    u, X = torch.randn(7, D).double(), torch.randn(7, 6, C).double()
    found = []
    for device in ("cpu", "cuda"):
        here, tokens = stack.to(device), X.to(device).requires_grad_()
        S = here(u.to(device), tokens)[2]
        (grad,) = torch.autograd.grad(S.tril(-1).square().sum(), tokens)
        found.append((S.detach().cpu(), grad.cpu()))
    for expected, ours in zip(*found):
        torch.testing.assert_close(ours, expected, **EXACT)
