"""The block against the reference numbers of its four ablation forms, and the helpers."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from sar_vit.architectures.layers import Block, linear_rates, pair, strided
from sar_vit.architectures.t2t_vit import SelfAttention

ROOT = Path(__file__).resolve().parents[4]
SHARED = Path(os.environ.get("ATTNMAP_SHARED", ROOT.parent / "shared"))
FILE = Path(os.environ.get("ATTNMAP_GOLDEN", SHARED / "golden")) / "sar/last_block.npz"

FORMS = {
    "A": {},
    "B": {"msa_skip": False},
    "C": {"msa_skip": False, "mlp_norm": False},
    "D": {"msa_skip": False, "mlp_norm": False, "mlp_skip": False},
}


@pytest.mark.golden
@pytest.mark.skipif(not FILE.is_file(), reason="no sar/last_block.npz in the golden folder (ATTNMAP_GOLDEN)")
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_reference_numbers_of_the_ablation_forms(form):
    with np.load(FILE, allow_pickle=False) as file:
        golden = {key: torch.from_numpy(file[key]) for key in file.files}
    dim, heads = golden["x"].shape[2], int(golden["heads"])
    attention = SelfAttention(dim, heads, qkv_bias=True)
    block = Block(
        dim, attention, len(golden["fc1_bias"]) / dim, eps=float(golden["ln_eps"]), **FORMS[form]
    ).double()
    places = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
    state = {
        f"{places.get(name, name)}.{kind}": golden[f"{name}_{kind}"]
        for name in ("norm1", "norm2", *places)
        for kind in ("weight", "bias")
    }
    block.load_state_dict({key: value for key, value in state.items() if key in block.state_dict()})
    torch.testing.assert_close(block(golden["x"]), golden[f"out_{form}"], rtol=1e-12, atol=1e-12)
    q, k = attention.queries_and_keys(block.norm1(golden["x"]))
    S = (q[:, :, :1] @ k[:, :, 1:].transpose(-1, -2) * attention.scale).reshape(golden["S"].shape)
    torch.testing.assert_close(S, golden["S"], rtol=1e-12, atol=1e-12)


def test_one_block_has_no_stochastic_depth():
    assert linear_rates(0.3, 1) == [0.0]
    assert linear_rates(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_sizes():
    assert pair([32, 48]) == (32, 48)
    with pytest.raises(ValueError, match="too small"):
        strided((3, 3), kernel=7, stride=4, padding=1)
