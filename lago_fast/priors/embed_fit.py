"""Fitting a prior by likeness to a few walkthroughs: its temperature alone, or a small head and the temperature.

By likelihood; whole walkthroughs are held out, the best epoch's weights are kept, and the temperature is then the one
under which the held-out choices are likeliest, if that is less sure. Test: pytest tests/priors/test_embed_prior.py
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.embed_prior import ZERO_SHOT_TEMPERATURE, EmbedPrior, Head, scores_of
from lago_fast.priors.folder import check_choice
from lago_fast.priors.text_embedder import TextEmbedder
from lago_fast.priors.walkthroughs import Walkthroughs, numbers_of

Rows = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # instructions, observations, actions, mask, choice
TEMPERATURES = [ZERO_SHOT_TEMPERATURE * 2 ** (step / 4) for step in range(-20, 25)]
# of a fitted head: a few held-out steps may make it less sure of itself, and never more
HEAD_TEMPERATURES = [temperature for temperature in TEMPERATURES if temperature >= ZERO_SHOT_TEMPERATURE]


def fit_embed_prior(
    embedder: TextEmbedder,
    walkthroughs: Walkthroughs,
    *,
    fit: Literal["temperature", "head"] = "head",
    hidden: int = 64,
    epochs: int = 200,
    batch_size: int = 64,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    val_fraction: float = 0.2,
    patience: int = 20,
    uniform_share: float = 0.05,
    seed: int = 0,
) -> EmbedPrior:
    """Return a frozen prior fitted to walkthroughs, with what was used and measured in `.metrics`.

    Args:
        embedder: texts as vectors.
        walkthroughs: all of their steps count as data.
        fit: "temperature" of the zero-shot prior alone, or a "head" and the temperature.
        hidden: width of the head.
        epochs: passes over the fitted steps, at most; exactly so many where nothing is held out.
        batch_size: steps per update of AdamW.
        lr: its learning rate.
        weight_decay: of AdamW.
        val_fraction: share of the walkthroughs that is held out, at least one of several; 0, or a single
            walkthrough: none, no early stopping, and the head keeps the zero-shot temperature.
        patience: epochs without a better held-out likelihood before the fit stops.
        uniform_share: see `EmbedPrior`; the likelihoods in `.metrics` are those without it.
        seed: of split, order and weights.

    Raises:
        DemonstrationError, UnsupportedArgument: see `numbers_of`.
        UnsupportedArgument: other arguments that cannot be honoured.
    """
    check_choice("fit", fit, ("temperature", "head"))
    if min(hidden, epochs, batch_size, patience) < 1 or not 0 <= val_fraction < 1 or lr <= 0 or weight_decay < 0:
        raise UnsupportedArgument(
            f"hidden, epochs, batch_size, patience: {hidden}, {epochs}, {batch_size}, {patience} must be 1 or more; "
            f"val_fraction {val_fraction} in 0..1, lr {lr} above 0, weight_decay {weight_decay} 0 or more"
        )
    choice, episode = numbers_of(walkthroughs)
    count = int(episode.max()) + 1
    zero_shot = EmbedPrior(embedder, uniform_share=uniform_share)  # which refuses a share that is none
    *vectors, mask = zero_shot.vectors(walkthroughs.instruction, walkthroughs.observation, walkthroughs.admissible)
    rows: Rows = (vectors[0], vectors[1], vectors[2], mask, torch.from_numpy(choice))
    metrics: dict[str, Any] = {"fitted": fit, "walkthroughs": count, "steps": len(choice), "seed": seed}
    if fit == "temperature":
        temperature = _likeliest(None, rows, TEMPERATURES)
        metrics |= _measured("", None, temperature, rows)
        return _made(embedder, None, temperature, uniform_share, metrics)

    generator = torch.Generator().manual_seed(seed)
    held = _held_out(count, val_fraction, generator)
    inside = torch.from_numpy(np.isin(episode, held.numpy()))
    train, val = _where(rows, ~inside), _where(rows, inside)
    metrics["held_out_walkthroughs"] = len(held)
    metrics |= _measured("zero_shot_", None, ZERO_SHOT_TEMPERATURE, val if len(held) else train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(embedder.width, hidden)
    head.fit_normaliser((train[0], train[1], train[2][train[3]]))
    metrics["epochs"] = _descend(head, train, val, epochs, batch_size, lr, weight_decay, patience, generator)
    temperature = _likeliest(head, val, HEAD_TEMPERATURES) if len(held) else ZERO_SHOT_TEMPERATURE
    metrics |= _measured("train_", head, temperature, train)
    if len(held):
        metrics |= _measured("val_", head, temperature, val)
    return _made(embedder, head, temperature, uniform_share, metrics)


def _made(
    embedder: TextEmbedder, head: Head | None, temperature: float, uniform_share: float, metrics: dict[str, Any]
) -> EmbedPrior:
    prior = EmbedPrior(embedder, temperature=temperature, head=head, uniform_share=uniform_share)
    prior.metrics = metrics
    return prior


def _held_out(count: int, fraction: float, generator: torch.Generator) -> Tensor:
    if count == 1 or fraction == 0:
        return torch.empty(0, dtype=torch.int64)
    return torch.randperm(count, generator=generator)[: min(max(1, round(fraction * count)), count - 1)]


def _where(rows: Rows, inside: Tensor) -> Rows:
    instruction, observation, actions, mask, choice = (column[inside] for column in rows)
    return instruction, observation, actions, mask, choice


def _nll(head: Head | None, temperature: float, rows: Rows) -> Tensor:
    """Return the mean negative log-likelihood of the choices in nats."""
    *vectors, mask, choice = rows
    scores = (scores_of(head, *vectors) / temperature).masked_fill(~mask, -torch.inf)
    return nn.functional.cross_entropy(scores, choice)


def _descend(
    head: Head,
    train: Rows,
    val: Rows,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    patience: int,
    generator: torch.Generator,
) -> int:
    """Fit the head in place; return after how many epochs its weights were the best."""
    optimiser = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=weight_decay)
    best, best_epoch, kept = math.inf, epochs, None
    if len(val[-1]):
        # the head as it starts is the zero-shot prior, and may be the best
        best, best_epoch = _held_out_nll(head, val), 0
        kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for epoch in range(1, epochs + 1):
        for part in torch.randperm(len(train[-1]), generator=generator).split(batch_size):
            optimiser.zero_grad()
            _nll(head, ZERO_SHOT_TEMPERATURE, _where(train, part)).backward()
            optimiser.step()
        if kept is None:
            continue
        found = _held_out_nll(head, val)
        if found < best:
            best, best_epoch = found, epoch
            kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
        elif epoch - best_epoch >= patience:
            break
    if kept is not None:
        head.load_state_dict(kept)
    return best_epoch


@torch.no_grad()
def _held_out_nll(head: Head, val: Rows) -> float:
    return float(_nll(head, ZERO_SHOT_TEMPERATURE, val))


@torch.no_grad()
def _likeliest(head: Head | None, rows: Rows, temperatures: Sequence[float]) -> float:
    return min(temperatures, key=lambda temperature: float(_nll(head, temperature, rows)))


@torch.no_grad()
def _measured(prefix: str, head: Head | None, temperature: float, rows: Rows) -> dict[str, float]:
    *vectors, mask, choice = rows
    best = scores_of(head, *vectors).masked_fill(~mask, -torch.inf).argmax(dim=1)
    return {
        f"{prefix}nll": float(_nll(head, temperature, rows)),
        f"{prefix}accuracy": float((best == choice).float().mean()),
    }
