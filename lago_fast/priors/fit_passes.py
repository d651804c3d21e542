"""The passes of stage 1's fit over its rows, and what is measured of the prior afterwards.

Test: pytest tests/priors/test_finetune.py
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError
from lago_fast.priors.base import PriorOutput
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.rows import Rows, shuffle_across_tasks

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_STD_LR_FACTOR = 10.0
TRAIN_SAMPLE = 2000  # fitted rows on which train_nll is measured
WARM_UP = 0.1  # share of the fit in which the learning rate rises


def nll(out: PriorOutput, action: Tensor) -> Tensor:
    """Return -log p(action) [B] in nats."""
    if out.log_probs is not None:
        return -out.log_probs.gather(1, action[:, None]).squeeze(1)
    assert out.mean is not None
    assert out.log_std is not None
    z = (action - out.mean) * (-out.log_std).exp()
    return (0.5 * z.square() + out.log_std + HALF_LOG_2PI).sum(dim=-1)


class Recipe(NamedTuple):
    loss: str
    epochs: int
    batch_size: int
    parts: int  # of a batch
    lr: float
    weight_decay: float
    input_noise: float
    wording_noise: float
    patience: int
    max_seconds: float | None


class Fit:
    """One behaviour-cloning run on one prior."""

    def __init__(
        self, prior: LatentActionPrior, train: Rows, val: Rows, recipe: Recipe, generator: torch.Generator
    ) -> None:
        self.prior, self.train, self.val, self.recipe = prior, train, val, recipe
        self.generator = generator
        self.epochs = self.best_epoch = self.steps = 0
        self.started = time.perf_counter()
        self.trained = {name: p for name, p in prior.named_parameters() if p.requires_grad}
        # a single vector must travel as far as whole layers do, in as few steps
        groups = [{"params": [p for name, p in self.trained.items() if name != "log_std"], "factor": 1.0}]
        if "log_std" in self.trained:
            log_std = [self.trained["log_std"]]
            groups.append({"params": log_std, "weight_decay": 0.0, "factor": LOG_STD_LR_FACTOR})
        self.optimiser = torch.optim.AdamW(groups, lr=recipe.lr, weight_decay=recipe.weight_decay)

    def run(self, progress: Callable[[dict[str, float]], None] | None) -> None:
        """Fit, and leave the prior at its best epoch."""
        best, kept = math.inf, dict[str, Tensor]()
        while self.epochs < self.recipe.epochs and self._done() < 1:
            train_loss = self._pass()
            self.epochs += 1
            val_loss = self._validate()
            if progress is not None:
                figures = {"train_loss": train_loss, "val_loss": val_loss, "seconds": self._elapsed()}
                progress({"epoch": self.epochs, "epochs": self.recipe.epochs, **figures})
            if val_loss < best or math.isnan(val_loss):
                best, self.best_epoch = val_loss, self.epochs
                kept = {name: p.detach().clone() for name, p in self.trained.items()}
            if self.epochs - self.best_epoch >= self.recipe.patience:
                break
        with torch.no_grad():
            for name, value in kept.items():
                self.trained[name].copy_(value)
            if self.recipe.loss == "mse" and self.prior.config.std == "state_independent":
                self._take_std_from_residuals()

    def _pass(self) -> float:
        """Take one pass over the fitted rows, or what the time allows of it; return its mean loss."""
        self.prior.train()
        total, seen = 0.0, 0
        order = torch.randperm(len(self.train.state), generator=self.generator).to(self.train.state.device)
        for index in order.split(self.recipe.batch_size):
            done = self._done()
            if done >= 1:
                break
            for group in self.optimiser.param_groups:
                group["lr"] = self.recipe.lr * group["factor"] * one_cycle(done)
            self.optimiser.zero_grad()
            for part in index.split(math.ceil(len(index) / self.recipe.parts)):
                batch = self.train.take(part).reworded(self.generator)
                noise = self.recipe.input_noise, self.recipe.wording_noise
                out = self.prior(batch.state, batch.instruction_id, *noise, kept=self.prior.is_text_fixed)
                loss = self._loss(out, batch.action).mean() * (len(part) / len(index))
                loss.backward()
                total += float(loss.detach()) * len(index)
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            self.optimiser.step()
            self.steps += 1
            seen += len(index)
            if not math.isfinite(total):
                raise NonFiniteError("loss: the fit diverged; lower lr, or look for outliers in states")
        return total / max(1, seen)

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _done(self) -> float:
        """Return the share of the fit that is done, by steps or by the clock, whichever is further."""
        per_epoch = math.ceil(len(self.train.state) / self.recipe.batch_size)
        by_steps = self.steps / (self.recipe.epochs * per_epoch)
        limit = self.recipe.max_seconds
        return by_steps if limit is None else max(by_steps, self._elapsed() / limit)

    def _take_std_from_residuals(self) -> None:
        out = self._predict(self.train)
        assert out.mean is not None
        assert self.prior.log_std is not None
        self.prior.log_std.copy_((out.mean - self.train.action).square().mean(0).sqrt().clamp(min=1e-3).log())

    def metrics(self, seed: int) -> dict[str, Any]:
        """Return how the prior does on fitted and held-out rows, in nats; None: not measured."""
        n = len(self.train.state)
        sample = torch.randperm(n, generator=self.generator)[:TRAIN_SAMPLE]
        some = self.train.take(sample.to(self.train.state.device))
        found: dict[str, Any] = {"train_nll": float(nll(self._predict(some), some.action).mean())}
        found.update(val_nll=None, val_nll_queried=None, val_nll_shuffled_instructions=None, val_mse=None)
        if len(self.val.state):
            out = self._predict(self.val)
            found["val_nll"] = float(nll(out, self.val.action).mean())
            found["val_nll_queried"] = float(nll(self.prior.bounded(out), self.val.action).mean())
            if out.mean is not None:
                found["val_mse"] = float((self.prior.bounded(out).mean - self.val.action).square().mean())  # type: ignore[operator]
            other = shuffle_across_tasks(self.val.instruction_id, self.val.task_id, seed)
            if other is not None:
                wrong = self._predict(self.val._replace(instruction_id=other))
                found["val_nll_shuffled_instructions"] = float(nll(wrong, self.val.action).mean())
        if self.prior.log_std is not None:
            found["std"] = [float(x) for x in self.prior.log_std.detach().exp()]
        return {**found, "epochs": self.epochs, "best_epoch": self.best_epoch}

    def _loss(self, out: PriorOutput, action: Tensor) -> Tensor:
        if self.recipe.loss == "mse":
            assert out.mean is not None
            return (out.mean - action).square().sum(dim=-1)
        return nll(out, action)

    def _validate(self) -> float:
        """Return the held-out loss of the distribution as trained; NaN where nothing is held out."""
        if not len(self.val.state):
            return math.nan
        # neither clamped nor floored: a floor hides differences that rollouts show
        return float(self._loss(self._predict(self.val), self.val.action).mean())

    @torch.no_grad()
    def _predict(self, rows: Rows) -> PriorOutput:
        self.prior.eval()
        size = self.prior.query_batch_size
        batches = zip(rows.state.split(size), rows.instruction_id.split(size), strict=True)
        parts = [self.prior(state, ids, kept=self.prior.is_text_fixed) for state, ids in batches]
        return PriorOutput(*(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)))


def one_cycle(done: float) -> float:
    """Return the learning rate's factor when a share `done` is done: a linear rise, a cosine to 0."""
    if done < WARM_UP:
        return (done + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
