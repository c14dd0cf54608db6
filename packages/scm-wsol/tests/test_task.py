"""The loss and its parts, distributed wrapping, and the step rule of the published runs."""

from __future__ import annotations

import math

import pytest
import torch
from scm_wsol import SCM, TSCAM
from scm_wsol.task import ClassificationTask, DivisibleStep
from torch import Tensor, nn

TINY = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


class Fixed(nn.Module):
    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def batch(b: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {"images": torch.randn(b, 3, 16, 16, generator=generator), "labels": torch.arange(b) % 3}


def scm(**options) -> SCM:
    torch.manual_seed(0)
    return SCM("vit", 3, 16, drop_path_rate=0.0, backbone_options=TINY, **options).train()


def test_loss_is_the_plain_cross_entropy_of_the_batch():
    model = Fixed([[0.0, 0.0], [math.log(3), 0.0]])
    parts = ClassificationTask()(model, {"images": torch.zeros(2, 1), "labels": torch.tensor([0, 1])})
    assert parts["loss"].item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert parts["accuracy"].item() == pytest.approx(0.5)  # the tie goes to the first class
    parts["loss"].backward()
    torch.testing.assert_close(model.logits.grad, torch.tensor([[-0.25, 0.25], [0.375, -0.375]]))


def test_loss_in_half_precision_is_taken_in_float32():
    parts = ClassificationTask()(
        Fixed([[20.0, 0.1]]).bfloat16(), {"images": torch.zeros(1), "labels": torch.tensor([1])}
    )
    assert parts["loss"].dtype == torch.float32


def test_parts_tell_the_scalars_and_the_reach_of_the_calibration():
    model = scm(calibration_options={"blocks": 2, "iterations": 16})
    model.calibration.blocks[1].lam.data.fill_(0.9)
    parts = ClassificationTask()(model, batch())
    names = {"lambda_0", "lambda_1", "beta_0", "beta_1", "active_share", "mean_weight"}
    assert set(parts) == {"loss", "accuracy"} | names
    assert [round(parts[name].item(), 4) for name in ("lambda_0", "lambda_1", "beta_0", "beta_1")] == [
        1,
        0.9,
        0.5,
        0.5,
    ]
    assert all(parts[name].ndim == 0 and not parts[name].requires_grad for name in names)
    T = model.calibration.last_activation
    assert T.shape == (2, 4, 4)
    assert parts["active_share"].item() == pytest.approx((T > 0.5).float().mean().item())
    assert parts["mean_weight"].item() == pytest.approx(((1 + T[0]) * (1 + T[1])).mean().item())
    parts["loss"].backward()
    with torch.no_grad():
        model.calibration.blocks[0].lam.add_(1)
    assert parts["lambda_0"].item() == 1  # a value of that step, not a view of the weight


def test_tscam_has_no_calibration_to_tell_of():
    torch.manual_seed(0)
    model = TSCAM("vit", 3, 16, backbone_options=TINY).train()
    assert set(ClassificationTask()(model, batch())) == {"loss", "accuracy"}


def test_distributed_wrapper_gathers_the_gradients(tmp_path):
    """One process shows that the wrapper's own forward runs and that no weight stays without gradient."""
    bare = scm()
    expected = ClassificationTask()(bare, batch())
    expected["loss"].backward()
    gradients = {name: parameter.grad for name, parameter in bare.named_parameters()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        reduced: list[int] = []

        def count(state, bucket):  # no annotations: torch compares them with its classes
            reduced.append(bucket.buffer().numel())
            future: torch.futures.Future[Tensor] = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        wrapped = nn.parallel.DistributedDataParallel(scm())
        wrapped.register_comm_hook(None, count)
        parts = ClassificationTask()(wrapped, batch())
        assert set(parts) == set(expected)
        parts["loss"].backward()
    finally:
        torch.distributed.destroy_process_group()
    assert sum(reduced) == sum(p.numel() for p in bare.parameters())
    for name, parameter in wrapped.module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


# --- schedule


def rates(lr: float, steps: list[int], epochs: int) -> dict[int, float]:
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = DivisibleStep(optimizer, steps)
    found = {1: optimizer.param_groups[0]["lr"]}  # before any call, as at the start of epoch 1
    for epoch in range(epochs):
        scheduler.step(epoch)
        found[epoch + 1] = optimizer.param_groups[0]["lr"]
    return found


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "steps", "drops"),
    [
        ("SCM CUB", 5e-5, 30, [30], {30}),
        ("SCM ILSVRC", 1e-6, 20, [10, 12], {10, 12, 20}),
        ("TS-CAM CUB", 5e-5, 60, [30], {30, 60}),
        ("TS-CAM ILSVRC", 5e-4, 20, [10, 12], {10, 12, 20}),
        ("CUBV2", 5e-5, 50, [30], {30}),
    ],
)
def test_published_rates(name, lr, epochs, steps, drops):
    found, expected = rates(lr, steps, epochs), lr
    for epoch in range(1, epochs + 1):
        expected = expected * 0.1 if epoch in drops else expected
        assert found[epoch] == pytest.approx(expected), f"{name}, epoch {epoch}"


def test_an_epoch_divisible_by_two_steps_drops_once():
    assert rates(1.0, [2, 3], 6)[6] == pytest.approx(1e-4)  # at 2, 3, 4 and 6


def test_a_step_of_one_lowers_the_first_epoch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    DivisibleStep(optimizer, [1])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_resuming_at_an_epoch_gives_its_rate_at_once():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    DivisibleStep(optimizer, [10, 12]).step(14)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_every_group_drops_from_its_own_rate():
    scalar, weight = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD(
        [{"params": [weight]}, {"params": [scalar], "lr": 5.0, "lr_scale": 2.0}], lr=1.0
    )
    DivisibleStep(optimizer, [1]).step(0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 1.0])
    with pytest.raises(ValueError, match="counted from 1"):
        DivisibleStep(optimizer, [0])
