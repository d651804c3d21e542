"""Actions with log-probability, entropy and KL to a prior, drawn from a counter-based generator: the definition.

Philox4x32-10 (Salmon et al., SC 2011, "Parallel random numbers: as easy as 1, 2, 3"): the numbers of a row depend on
(seed, step, row) alone, never on the batch, the device or the implementation.
Test: pytest tests/kernels/test_sample.py
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Direction = Literal["policy_prior", "prior_policy"]
HALF_TYPES = (torch.float16, torch.bfloat16)
LOW_32 = 0xFFFFFFFF


class CategoricalInputs(NamedTuple):
    logits: Tensor  # [B, A], need not be normalised
    prior_log_probs: Tensor | None = None  # [B, A], need not be normalised
    action_mask: Tensor | None = None  # [B, A] bool, True where allowed, at least one per row; None: all are


class GaussianInputs(NamedTuple):
    mean: Tensor  # [B, D]
    log_std: Tensor  # [D] or [B, D]
    prior_mean: Tensor | None = None  # [B, D]
    prior_log_std: Tensor | None = None  # [D] or [B, D]


class Outputs(NamedTuple):
    actions: Tensor  # [B] int64, or [B, D]
    log_prob: Tensor  # [B], of the actions
    entropy: Tensor  # [B]
    prior_kl: Tensor | None  # [B] in nats; None without a prior


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in HALF_TYPES else t


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a * b, for numbers below 2^32 in int64 tensors."""
    # in halves of 16 bits: int64 would overflow
    low, high = (b & 0xFFFF) * a, (b >> 16) * a
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(row: Tensor, block: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four random 32-bit words for each counter, as int64 of the shape of `row` and `block`.

    Args:
        row, block: int64 in [0, 2^32), of shapes that broadcast; which row, which four of its numbers.
        state: [2] int64: seed and step.
    """
    row, block = torch.broadcast_tensors(row, block)
    seed, step = state.unbind()
    c0, c1 = row, block
    c2, c3 = ((step >> shift & LOW_32).expand_as(row) for shift in (0, 32))
    k0, k1 = seed & LOW_32, seed >> 32 & LOW_32
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = k0 + 0x9E3779B9 & LOW_32, k1 + 0xBB67AE85 & LOW_32
    return c0, c1, c2, c3


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the 32-bit words as numbers in (0, 1), exact in float32."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def normal(rows: int, dims: int, state: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [rows, dims] standard normal numbers, by Box and Muller, four from each block of four words."""
    row = torch.arange(rows, device=state.device)[:, None]
    block = torch.arange((dims + 3) // 4, device=state.device)
    u0, u1, u2, u3 = (uniform(word, dtype) for word in philox(row, block, state))  # [rows, blocks]
    pairs = []
    for radius, turn in ((u0, u1), (u2, u3)):
        r, angle = (-2 * radius.log()).sqrt(), 2 * math.pi * turn
        pairs += [r * angle.cos(), r * angle.sin()]
    return torch.stack(pairs, dim=-1).flatten(1)[:, :dims]


@torch.no_grad()
def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row by inverting the cumulative distribution at the row's uniform number."""
    logits, mask = _wide(inputs.logits), inputs.action_mask
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    row = torch.arange(len(logits), device=logits.device)
    u = uniform(philox(row, torch.zeros_like(row), state)[0], probs.dtype)
    weight = (logits - logits.amax(dim=-1, keepdim=True)).exp()
    reached = weight.cumsum(dim=-1) <= (u * weight.sum(dim=-1))[:, None]
    # rounding may leave the last sum below u: then the last action that can be taken
    last = logits.shape[-1] - 1 - (weight > 0).flip(-1).to(torch.int8).argmax(dim=-1)
    actions = torch.minimum(reached.sum(dim=-1), last)
    entropy = -(probs * log_probs.masked_fill(probs == 0, 0.0)).sum(dim=-1)
    kl = None
    if inputs.prior_log_probs is not None:
        prior = _wide(inputs.prior_log_probs) / prior_temperature
        prior = (prior if mask is None else prior.masked_fill(~mask, -torch.inf)).log_softmax(dim=-1)
        left, right = (log_probs, prior) if direction == "policy_prior" else (prior, log_probs)
        kl = (left.exp() * (left - right).masked_fill(left.exp() == 0, 0.0)).sum(dim=-1)
    return Outputs(actions, log_probs.gather(-1, actions[:, None]).squeeze(-1), entropy, kl)


@torch.no_grad()
def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, state: Tensor, direction: Direction) -> Outputs:
    """Draw an action per row: mean + std * z, with z of `normal`."""
    mean, log_std = _wide(inputs.mean), _wide(inputs.log_std)
    z = normal(len(mean), mean.shape[1], state, mean.dtype)
    half_log_2pi = 0.5 * math.log(2 * math.pi)
    log_prob = (-0.5 * z.square() - log_std - half_log_2pi).sum(dim=-1)
    entropy = (log_std + 0.5 + half_log_2pi).expand_as(mean).sum(dim=-1)
    kl = None
    if inputs.prior_mean is not None and inputs.prior_log_std is not None:
        m1, s1 = mean, log_std
        m2, s2 = _wide(inputs.prior_mean), _wide(inputs.prior_log_std) + 0.5 * prior_temperature.log()
        if direction == "prior_policy":
            m1, s1, m2, s2 = m2, s2, m1, s1
        kl = (s2 - s1 + 0.5 * ((2 * s1).exp() + (m1 - m2).square()) * (-2 * s2).exp() - 0.5).sum(dim=-1)
    return Outputs(mean + log_std.exp() * z, log_prob, entropy, kl)
