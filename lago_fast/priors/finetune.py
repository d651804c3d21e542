"""Stage 1: fit a latent-action prior to demonstrations by behaviour cloning.

Cross-entropy for discrete actions; Gaussian negative log-likelihood or mean squared error for continuous ones
(KALM, arXiv 2404.09248, trains with cross-entropy and mean squared error; LaGO's own loss is not published).
Validation is by whole episodes, and the best epoch's weights are kept.
Test: pytest tests/priors/test_finetune.py
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors.backbone import Backbone, find_backbone
from lago_fast.priors.base import Kind, PriorOutput
from lago_fast.priors.config import Finetune, Form, PriorConfig, StatePath, Std
from lago_fast.priors.folder import check_choice
from lago_fast.priors.latent_action import QUERY_ROWS, LatentActionPrior
from lago_fast.priors.locate import DEFAULT_BACKBONE
from lago_fast.priors.memory_plan import plan_fit
from lago_fast.priors.quantize import MAX_KL_NATS, QUANTIZATIONS, Quantization, check_fp8, quantize_prior
from lago_fast.priors.rows import Rows, action_space, check_rows, shuffle_across_tasks, split_episodes
from lago_fast.priors.trust import remember
from lago_fast.priors.tuning import checkpoint_layers

logger = logging.getLogger(__name__)

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LOG_STD_LR_FACTOR = 10.0
TRUST_ROWS = 512
TRAIN_SAMPLE = 2000  # fitted rows on which train_nll is measured
WARM_UP = 0.1  # share of the fit in which the learning rate rises


def fit_prior(
    states: ArrayLike,
    actions: ArrayLike,
    instruction_id: ArrayLike,
    episode_id: ArrayLike,
    instructions: Sequence[str],
    *,
    task_id: ArrayLike | None = None,
    kind: Kind | None = None,
    action_low: Sequence[float] | float = -1.0,
    action_high: Sequence[float] | float = 1.0,
    num_actions: int | None = None,
    backbone: str | Backbone = DEFAULT_BACKBONE,
    random_init: bool = False,
    form: Form | None = None,
    finetune: Finetune = "frozen",
    layers: int | None = None,
    std: Std = "state_independent",
    std_init: float = 0.5,
    std_floor: float = 0.2,
    head_hidden: int | None = None,
    state_path: StatePath = "token",
    loss: Literal["nll", "mse"] = "nll",
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    input_noise: float = 0.0,
    val_fraction: float = 0.1,
    patience: int = 8,
    max_seconds: float | None = None,
    gradient_checkpointing: bool = False,
    gradient_accumulation_steps: int = 1,
    quantization: Quantization = "none",
    max_quantization_kl: float = MAX_KL_NATS,
    trust_rows: int = TRUST_ROWS,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: Callable[[dict[str, float]], None] | None = None,
) -> LatentActionPrior:
    """Return a frozen prior fitted to demonstrations, with what was measured in `.metrics`.

    Args:
        states: [n, S], raw.
        actions: [n, D] floating (Gaussian) or [n] integer (categorical).
        instruction_id: [n] integers, index into `instructions`; or [n, W], ways to say the same, of which each
            pass over the rows draws one per row, and everything else takes the first.
        episode_id: [n] integers; a whole episode is either fitted or held out.
        instructions: M texts.
        task_id: [n] integers; the split is even over tasks, and `val_nll_shuffled_instructions` gives every
            held-out row the words of another task. None: every instruction is its own task.
        kind: "gaussian" or "categorical"; None: by the dtype of `actions`.
        action_low: bounds of the action box, [D] or one number (Gaussian only).
        action_high: likewise.
        num_actions: A (categorical only); None: the largest action plus 1.
        backbone: name or path for `find_backbone`, or a loaded one.
        random_init: draw the backbone's weights afresh from `seed` (a control); needs a backbone by name.
        form: "pooled" or "prompt"; None: "pooled" for an encoder, "prompt" for a decoder.
        finetune: which of the backbone's weights are fitted: "frozen" none, "lora" adapters, "full" all; "qlora"
            adapters on weights that are held, and answered with, in NF4.
        layers: use the first layers of the backbone only; None: all.
        std: "state_independent", "state_dependent" or "fixed" at `std_init`; Gaussian only, as the next two.
        std_init: std at the start.
        std_floor: smallest std that a query answers with.
        head_hidden: width of the head's hidden layer; None: a linear head.
        state_path: "token": the head reads the transformer alone; "token_and_head": the state as well, and has two
            hidden layers.
        loss: "nll"; "mse" fits the mean of a Gaussian, and its std is the residual's unless fixed.
        epochs: passes over the fitted rows, at most.
        batch_size: rows per optimiser step.
        lr: largest learning rate of AdamW; it rises over the first tenth and falls to 0 along a cosine.
        weight_decay: of AdamW.
        input_noise: std of Gaussian noise on the normalised states.
        val_fraction: share of each task's episodes that is held out; 0: none, and no early stopping.
        patience: epochs without a better validation loss before the fit stops.
        max_seconds: wall-clock budget of the passes; the schedule ends with it, so a fit that needs it is not
            reproducible.
        gradient_checkpointing: keep only the inputs of the transformer's layers for the backward pass, and compute
            the rest twice: less memory, more time.
        gradient_accumulation_steps: parts in which a batch is read, one after the other: the same step in less memory.
        quantization: of the backbone of the prior that is returned, once it is fitted: "bf16", "int8", "nf4" or
            "fp8", its head calibrated on the fitted rows and its fidelity measured on the held-out ones.
        max_quantization_kl: nats; what trainers are to take of it.
        trust_rows: demonstrated states whose latents are kept, so that answers say how far from them they are; 0:
            none, and answers without a trust.
        seed: of split, initial weights, order and noise.
        device: where to compute; the prior stays there.
        progress: called after each epoch with {"epoch", "epochs", "train_loss", "val_loss", "seconds"}.

    Raises:
        DemonstrationError: empty, not finite, of differing lengths, or outside of the spaces.
        UnsupportedArgument: a value or a combination that cannot be honoured.
        BackboneUnavailable, HashMismatch: as `find_backbone`.
        InsufficientMemory: the device has less free memory than the fit will need.
        MissingExtra, DeviceUnavailable: the package or the device of a quantization is not there.
    """
    started = time.perf_counter()
    check_choice("loss", loss, ("nll", "mse"))
    _check_savings(finetune, gradient_checkpointing, quantization, val_fraction, torch.device(device))
    if (
        min(epochs, batch_size, patience, gradient_accumulation_steps) < 1
        or min(lr, math.inf if max_seconds is None else max_seconds) <= 0
    ):
        names = "epochs, batch_size, patience, gradient_accumulation_steps, lr, max_seconds"
        raise UnsupportedArgument(f"{names}: must be positive")
    if not 0 <= val_fraction < 1 or min(weight_decay, input_noise, trust_rows) < 0:
        raise UnsupportedArgument("val_fraction: 0 <= f < 1; weight_decay, input_noise, trust_rows: not negative")
    rows, kind = check_rows(states, actions, instruction_id, episode_id, task_id, kind, len(instructions))
    if loss == "mse" and (kind == "categorical" or std == "state_dependent"):
        raise UnsupportedArgument('loss: "mse" fits a Gaussian with "state_independent" or "fixed" std; use "nll"')
    width, low, high = action_space(rows.action, kind, action_low, action_high, num_actions)
    train, val = split_episodes(rows, val_fraction, seed)

    def config_for(backbone: Backbone) -> PriorConfig:
        chosen = form or ("pooled" if backbone.kind == "encoder" else "prompt")
        return PriorConfig(
            kind, rows.state.shape[1], width, low, high, form=chosen, finetune=finetune, layers=layers, std=std,
            std_init=std_init, std_floor=std_floor, head_hidden=head_hidden, state_path=state_path,
        )  # fmt: skip

    def plan(backbone: Backbone) -> None:
        plan_fit(
            config_for(backbone),
            backbone,
            instructions,
            rows=math.ceil(min(batch_size, len(train)) / gradient_accumulation_steps),
            query_rows=QUERY_ROWS,
            gradient_checkpointing=gradient_checkpointing,
            device=torch.device(device),
        )

    if isinstance(backbone, str):
        backbone_seed = seed if random_init else 0
        backbone = find_backbone(backbone, random_init=random_init, seed=backbone_seed, before_weights=plan)
    elif random_init:
        raise UnsupportedArgument("random_init: give the backbone by name, or find_backbone(..., random_init=True)")
    else:
        plan(backbone)

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_for(backbone)
        prior = LatentActionPrior(config, backbone, instructions)
        fitted = rows.take(train)
        prior.fit_normaliser(fitted.state, fitted.wordings)
        prior.to(device)
        if gradient_checkpointing:
            checkpoint_layers(prior.transformer, True)
        data = Rows(*(column.to(device) for column in rows))
        recipe = _Recipe(
            loss, epochs, batch_size, gradient_accumulation_steps, lr, weight_decay, input_noise, patience, max_seconds
        )
        fit = _Fit(prior, data.take(train.to(device)), data.take(val.to(device)), recipe, generator)
        fit.run(progress)
    if gradient_checkpointing:
        checkpoint_layers(prior.transformer, False)
    prior.freeze()
    if trust_rows:
        prior.demonstrated = remember(prior, data.state, data.instruction_id, data.episode_id, trust_rows)
    prior.metrics = {
        **fit.metrics(seed),
        "loss": loss,
        "rows": len(rows.state),
        "rows_val": len(val),
        "episodes": len(rows.episode_id.unique()),
        "tasks": len(rows.task_id.unique()),
        "backbone_source": backbone.source,
        "backbone_random_init": backbone.random_init,
        "seed": seed,
        "seconds": time.perf_counter() - started,
    }
    if quantization == "none":
        return prior
    held = rows.take(val)
    return quantize_prior(
        prior,
        quantization,
        held.state,
        held.instruction_id,
        calibration_states=fitted.state,
        calibration_ids=fitted.instruction_id,
        max_quantization_kl=max_quantization_kl,
    )


def _check_savings(
    finetune: Finetune, checkpointing: bool, quantization: Quantization, val_fraction: float, device: torch.device
) -> None:
    """Refuse what could not be honoured once the fit is done."""
    check_choice("quantization", quantization, QUANTIZATIONS)
    if checkpointing and finetune == "frozen":
        raise UnsupportedArgument(
            "gradient_checkpointing: a frozen backbone answers in evaluation mode, which computes nothing twice; "
            'leave it out, or take finetune="lora"'
        )
    if quantization == "none":
        return
    if finetune in ("full", "qlora"):
        raise UnsupportedArgument(
            f'quantization: finetune="{finetune}" keeps {"its own" if finetune == "full" else "NF4"} weights; '
            'leave it "none", or take finetune="lora"'
        )
    if val_fraction == 0:
        raise UnsupportedArgument("quantization: its fidelity is measured on held-out rows; take val_fraction > 0")
    if quantization == "fp8":
        check_fp8(device)


def nll(out: PriorOutput, action: Tensor) -> Tensor:
    """Return -log p(action) [B] in nats."""
    if out.log_probs is not None:
        return -out.log_probs.gather(1, action[:, None]).squeeze(1)
    assert out.mean is not None
    assert out.log_std is not None
    z = (action - out.mean) * (-out.log_std).exp()
    return (0.5 * z.square() + out.log_std + HALF_LOG_2PI).sum(dim=-1)


class _Recipe(NamedTuple):
    loss: str
    epochs: int
    batch_size: int
    parts: int  # of a batch
    lr: float
    weight_decay: float
    input_noise: float
    patience: int
    max_seconds: float | None


class _Fit:
    """One behaviour-cloning run on one prior."""

    def __init__(
        self, prior: LatentActionPrior, train: Rows, val: Rows, recipe: _Recipe, generator: torch.Generator
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
                out = self.prior(batch.state, batch.instruction_id, self.recipe.input_noise)
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
        parts = [self.prior(s, i) for s, i in zip(rows.state.split(size), rows.instruction_id.split(size), strict=True)]
        return PriorOutput(*(None if c[0] is None else torch.cat(c) for c in zip(*parts, strict=True)))


def one_cycle(done: float) -> float:
    """Return the learning rate's factor when a share `done` is done: a linear rise, a cosine to 0."""
    if done < WARM_UP:
        return (done + 0.01) / (WARM_UP + 0.01)
    return 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
