"""Batches for the losses, buffers for what they return, and how close to float64 CUDA kernels must come."""

import torch
from torch import Tensor

from lago_fast.kernels.ppo_kl_categorical import eager as categorical_eager
from lago_fast.kernels.ppo_kl_categorical.reference import Coefficients
from lago_fast.kernels.ppo_kl_categorical.reference import Inputs as CategoricalInputs
from lago_fast.kernels.ppo_kl_gaussian import eager as gaussian_eager
from lago_fast.kernels.ppo_kl_gaussian.reference import Inputs as GaussianInputs

HALVES = (torch.bfloat16, torch.float16)


def coefficients(*values: float | None) -> Coefficients:
    """Build the coefficients in their order; what is left out has its default here."""
    defaults = (0.2, 0.01, 0.5, 0.3, 1.5, None)
    chosen = (*values, *defaults[len(values) :])
    return Coefficients(*(None if v is None else torch.tensor(v) for v in chosen))


def columns(log_prob: Tensor) -> dict[str, Tensor]:
    """Draw the [B] inputs, with ratios on both sides of the clip and every fifth row invalid."""
    rows = len(log_prob)
    return {
        "values": torch.randn(rows),
        "old_log_prob": log_prob + 0.3 * torch.randn(rows),
        "advantages": 3 * torch.randn(rows) + 1,
        "returns": torch.randn(rows),
        "old_values": torch.randn(rows),
        "weight": (torch.arange(rows) % 5 != 4).float(),
    }


def draw_categorical(
    rows: int, n_actions: int, *, masked: bool = False, kl_weighted: bool = False
) -> CategoricalInputs:
    logits, prior = 2 * torch.randn(rows, n_actions) + 3, 2 * torch.randn(rows, n_actions) - 5
    mask = torch.rand(rows, n_actions) < 0.6
    mask.scatter_(1, torch.randint(n_actions, (rows, 1)), True)
    mask = mask if masked else None
    allowed = logits if mask is None else logits.masked_fill(~mask, -torch.inf)
    # a column is taken by logits + Gumbel noise: an allowed one
    actions = (allowed - torch.rand(rows, n_actions).log().neg().log()).argmax(-1)
    log_prob = allowed.log_softmax(-1).gather(-1, actions[:, None]).squeeze(-1)
    return CategoricalInputs(
        logits=logits,
        actions=actions,
        prior_log_probs=prior,
        action_mask=mask,
        kl_weight=2 * torch.rand(rows) if kl_weighted else None,
        **columns(log_prob),
    )


def draw_gaussian(
    rows: int, dims: int, *, std_per_row: bool = False, prior_per_row: bool = True, kl_weighted: bool = False
) -> GaussianInputs:
    def stds(per_row: bool) -> Tensor:
        return 0.3 * torch.randn(*((rows, dims) if per_row else (dims,))) - 0.7

    mean, log_std = torch.randn(rows, dims), stds(std_per_row)
    actions = mean + log_std.exp() * torch.randn(rows, dims)
    log_prob = torch.distributions.Normal(mean, log_std.exp()).log_prob(actions).sum(-1)
    return GaussianInputs(
        mean=mean,
        log_std=log_std,
        actions=actions,
        prior_mean=torch.randn(rows, dims),
        prior_log_std=stds(prior_per_row),
        kl_weight=2 * torch.rand(rows) if kl_weighted else None,
        **columns(log_prob),
    )


def converted(named, dtype: torch.dtype):
    """Convert the floating tensors of a NamedTuple."""
    return type(named)(*(t if t is None or not t.is_floating_point() else t.to(dtype) for t in named))


def eager_of(x):
    return categorical_eager if isinstance(x, CategoricalInputs) else gaussian_eager


def poisoned(x):
    """Return outputs and gradients that hold NaN wherever a loss forgets to write."""
    eager = eager_of(x)
    outputs = torch.full((len(eager.Outputs._fields),), float("nan"), device=x.values.device)
    grads = (torch.full_like(getattr(x, name), float("nan")) for name in eager.Grads._fields)
    return eager.Outputs(*outputs.unbind()), eager.Grads(*grads)


def assert_close(names, truth, plain, got, rtol) -> None:
    """Compare with float64: at most twice eager's own error beside a tolerance.

    A gradient's tolerance is relative to its largest entry; the outputs are means of terms that may cancel, hence
    an absolute part for them.
    """
    for name, expected, other, actual in zip(names, truth, plain, got, strict=True):
        assert actual.dtype == other.dtype
        assert actual.shape == other.shape
        if expected.numel() == 0:
            continue
        scale = expected.abs().max() if expected.dim() else expected.abs() + 1
        allowed = 2 * (other - expected).abs().max() + rtol * scale
        assert (actual - expected).abs().max() <= allowed, name


def assert_same_bits(one, other) -> None:
    for part, same in zip(one, other, strict=True):
        for a, b in zip(part, same, strict=True):
            assert torch.equal(a, b)
