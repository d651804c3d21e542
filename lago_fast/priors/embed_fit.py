"""Fitting a prior by likeness to a few walkthroughs: its temperature alone, or a small head and the temperature.

By likelihood; whole walkthroughs are held out, the best epoch's weights are kept, and the temperature is then the one
under which the held-out choices are likeliest, if that is less sure. Test: pytest tests/priors/test_embed_prior.py
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors.embed_prior import ZERO_SHOT_TEMPERATURE, EmbedPrior, Head, ids_of, scores_of
from lago_fast.priors.folder import check_choice
from lago_fast.priors.text_embedder import TextEmbedder
from lago_fast.priors.walkthroughs import Walkthroughs, numbers_of

SCORED_ROWS = 64  # whose vectors are gathered at a time
TEMPERATURES = [ZERO_SHOT_TEMPERATURE * 2 ** (step / 4) for step in range(-20, 25)]
# of a fitted head: a few held-out steps may make it less sure of itself, and never more
HEAD_TEMPERATURES = [temperature for temperature in TEMPERATURES if temperature >= ZERO_SHOT_TEMPERATURE]


class Rows(NamedTuple):
    """Steps as ids: their vectors, of which all steps together have too many, are gathered when they are read."""

    embedder: TextEmbedder
    instruction: Tensor  # [n] int64
    observation: Tensor  # [n] int64
    actions: Tensor  # [n, A] int64
    mask: Tensor  # [n, A] bool, False where padded
    choice: Tensor  # [n] int64

    def take(self, index: Tensor) -> "Rows":
        """Return the rows at `index`, no wider than they need to be."""
        mask = self.mask[index]
        widest = int(mask.sum(dim=1).max()) if len(mask) else 0
        return Rows(
            self.embedder,
            self.instruction[index],
            self.observation[index],
            self.actions[index, :widest],
            mask[:, :widest],
            self.choice[index],
        )

    def scores(self, head: Head | None) -> Tensor:
        """Return scores [n, A] before the temperature, -inf where padded."""
        vectors = (self.embedder.rows(ids) for ids in (self.instruction, self.observation, self.actions))
        return scores_of(head, *vectors).masked_fill(~self.mask, -torch.inf)


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
        NonFiniteError: the fit diverges.
    """
    check_choice("fit", fit, ("temperature", "head"))
    if (
        min(hidden, epochs, batch_size, patience) < 1
        or not 0 <= val_fraction < 1
        or not (0 < lr < math.inf and 0 <= weight_decay < math.inf)
    ):
        raise UnsupportedArgument(
            f"hidden, epochs, batch_size, patience: {hidden}, {epochs}, {batch_size}, {patience} must be 1 or more; "
            f"val_fraction {val_fraction} in 0..1, lr {lr} above 0, weight_decay {weight_decay} 0 or more"
        )
    choice, episode = numbers_of(walkthroughs)
    count = int(episode.max()) + 1
    EmbedPrior(embedder, uniform_share=uniform_share)  # which refuses a share that is none
    columns = ids_of(embedder, walkthroughs.instruction, walkthroughs.observation, walkthroughs.admissible)
    rows = Rows(embedder, *columns, torch.from_numpy(choice))
    metrics: dict[str, Any] = {"fitted": fit, "walkthroughs": count, "steps": len(choice), "seed": seed}
    if fit == "temperature":
        temperature = _likeliest(rows, _all_scores(None, rows), TEMPERATURES)
        metrics |= _measured("", None, temperature, rows)
        return _made(embedder, None, temperature, uniform_share, metrics)

    generator = torch.Generator().manual_seed(seed)
    held = _held_out(count, val_fraction, generator)
    inside = torch.from_numpy(np.isin(episode, held.numpy()))
    train, val = rows.take(~inside), rows.take(inside)
    metrics["held_out_walkthroughs"] = len(held)
    metrics |= _measured("zero_shot_", None, ZERO_SHOT_TEMPERATURE, val if len(held) else train)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = Head(embedder.width, hidden)
    head.fit_normaliser(
        [_counted(embedder, ids) for ids in (train.instruction, train.observation, train.actions[train.mask])]
    )
    metrics["epochs"] = _descend(head, train, val, epochs, batch_size, lr, weight_decay, patience, generator)
    temperature = ZERO_SHOT_TEMPERATURE
    if len(held):
        temperature = _likeliest(val, _all_scores(head, val), HEAD_TEMPERATURES)
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


def _counted(embedder: TextEmbedder, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector of each different id [u, Z], and how often it occurs [u]."""
    different, counts = ids.unique(return_counts=True)
    return embedder.rows(different), counts.float()


@torch.no_grad()
def _all_scores(head: Head | None, rows: Rows) -> Tensor:
    """Return scores [n, A] as `Rows.scores`, a few rows at a time."""
    scores = torch.full(rows.mask.shape, -torch.inf)
    for part in torch.arange(len(rows.choice)).split(SCORED_ROWS):
        found = rows.take(part).scores(head)
        scores[part, : found.shape[1]] = found
    return scores


def _nll(scores: Tensor, temperature: float, choice: Tensor) -> Tensor:
    """Return the mean negative log-likelihood of the choices in nats."""
    return nn.functional.cross_entropy(scores / temperature, choice)


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
    if len(val.choice):
        # the head as it starts is the zero-shot prior, and may be the best
        best, best_epoch = _held_out_nll(head, val), 0
        kept = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    for epoch in range(1, epochs + 1):
        for part in torch.randperm(len(train.choice), generator=generator).split(batch_size):
            batch = train.take(part)
            optimiser.zero_grad()
            loss = _nll(batch.scores(head), ZERO_SHOT_TEMPERATURE, batch.choice)
            if not loss.isfinite():
                raise NonFiniteError(f"loss: {loss.item()} in epoch {epoch} of the head's fit: lower lr")
            loss.backward()
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


def _held_out_nll(head: Head, val: Rows) -> float:
    return float(_nll(_all_scores(head, val), ZERO_SHOT_TEMPERATURE, val.choice))


def _likeliest(rows: Rows, scores: Tensor, temperatures: Sequence[float]) -> float:
    return min(temperatures, key=lambda temperature: float(_nll(scores, temperature, rows.choice)))


def _measured(prefix: str, head: Head | None, temperature: float, rows: Rows) -> dict[str, float]:
    scores = _all_scores(head, rows)
    return {
        f"{prefix}nll": float(_nll(scores, temperature, rows.choice)),
        f"{prefix}accuracy": float((scores.argmax(dim=1) == rows.choice).float().mean()),
    }
