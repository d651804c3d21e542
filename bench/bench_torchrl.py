"""An outside peer of the losses: TorchRL's ClipPPOLoss with the exact KL to a prior added, eagerly, beside ours.

TorchRL has no KL to a prior; torch.distributions adds it, as a user would. Both are checked against our reference.
Run: pip install torchrl tensordict; pytest bench/bench_torchrl.py --benchmark-only
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import cases
from bench.bench_ppo_kl import Loss, loss, time_autograd

pytest.importorskip("torchrl", reason="the peer is not installed: pip install torchrl tensordict")
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torchrl.objectives import ClipPPOLoss

CASES = [(kind, rows, width) for kind, width in (("categorical", 40), ("gaussian", 4)) for rows in (64, 2048, 65536)]


class Std(nn.Module):
    """A Gaussian's std from its log, one for all rows."""

    def forward(self, mean: Tensor, log_std: Tensor) -> tuple[Tensor, Tensor]:
        return mean, log_std.exp().expand_as(mean)


def peer(kind: str, case: Loss) -> tuple[Callable[[], None], list[Tensor]]:
    """Return TorchRL's loss with the KL, forward and backward, and the leaves that it differentiates by."""
    x, c = case.inputs, cases.COEFFICIENTS
    leaves = [getattr(x, name).clone().requires_grad_() for name in case.differentiated]
    seen = dict(zip(case.differentiated, leaves, strict=True))
    if kind == "categorical":
        body: Any = TensorDictModule(nn.Identity(), ["logits_in"], ["logits"])
        family: Any = torch.distributions.Categorical
        keys, prior = ["logits"], family(logits=x.prior_log_probs)
        given = {"logits_in": seen["logits"]}
    else:
        body = TensorDictModule(Std(), ["mean", "log_std"], ["loc", "scale"])
        family = gaussian
        keys, prior = ["loc", "scale"], gaussian(x.prior_mean, x.prior_log_std.exp())
        given = {"mean": seen["mean"], "log_std": seen["log_std"].expand_as(seen["mean"])}
    actor = ProbabilisticTensorDictSequential(
        body, ProbabilisticTensorDictModule(keys, ["action"], distribution_class=family, return_log_prob=True)
    )
    critic = TensorDictModule(nn.Identity(), ["values_in"], ["state_value"])
    objective = ClipPPOLoss(
        actor,
        critic,
        clip_epsilon=c["clip_range"],
        entropy_coeff=c["ent_coef"],
        critic_coeff=c["vf_coef"],
        loss_critic_type="l2",
        normalize_advantage=True,
    )
    rows = {
        **given,
        "values_in": seen["values"].unsqueeze(1),
        "action": x.actions,
        "action_log_prob": x.old_log_prob,
        "advantage": x.advantages.unsqueeze(1),
        "value_target": x.returns.unsqueeze(1),
    }
    data = TensorDict(rows, batch_size=[len(x.values)])

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        parts = objective(data)
        kl = torch.distributions.kl_divergence(actor.get_dist(data), prior).mean()
        (parts["loss_objective"] + parts["loss_critic"] + parts["loss_entropy"] + c["kl_coef"] * kl).backward()

    return step, leaves


def gaussian(loc: Tensor, scale: Tensor) -> torch.distributions.Distribution:
    """Return a diagonal Gaussian."""
    return torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1)


@pytest.mark.parametrize(("kind", "rows", "width"), CASES)
def test_torchrl(benchmark, kind, rows, width):
    case = loss(kind, rows, width)
    step, leaves = peer(kind, case)
    step()
    expected = case.loss_and_grads(case.inputs, case.coefficients, impl="reference")[1]
    cases.check([leaf.grad for leaf in leaves], expected)
    cases.run(
        benchmark, step, case.least_bytes(), impl="torchrl", entry="autograd", shape=[rows, width], dtype="float32"
    )


@pytest.mark.parametrize(("kind", "rows", "width"), CASES)
def test_ours(benchmark, kind, rows, width):
    time_autograd(benchmark, loss(kind, rows, width), "auto", shape=[rows, width], dtype="float32")
