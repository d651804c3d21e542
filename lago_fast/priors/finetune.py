"""Stage 1: fit a latent-action prior to demonstrations by behaviour cloning.

Cross-entropy for discrete actions; Gaussian negative log-likelihood or mean squared error for continuous ones
(KALM, arXiv 2404.09248, trains with cross-entropy and mean squared error; LaGO's own loss is not published).
Validation is by whole episodes, and the best epoch's weights are kept.
Test: pytest tests/priors/test_finetune.py
"""

import inspect
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from numpy.typing import ArrayLike

from lago_fast.errors import UnsupportedArgument, check_seed
from lago_fast.priors.backbone import Backbone, find_backbone
from lago_fast.priors.base import Kind
from lago_fast.priors.config import Attention, Finetune, Form, PriorConfig, StatePath, Std
from lago_fast.priors.fit_passes import Fit, Recipe
from lago_fast.priors.folder import check_choice
from lago_fast.priors.latent_action import QUERY_ROWS, LatentActionPrior
from lago_fast.priors.locate import DEFAULT_BACKBONE
from lago_fast.priors.memory_plan import plan_fit
from lago_fast.priors.quantize import MAX_KL_NATS, QUANTIZATIONS, Quantization, check_fp8, checked_bound, quantize_prior
from lago_fast.priors.rows import Rows, action_space, check_rows, split_episodes
from lago_fast.priors.trust import remember
from lago_fast.priors.tuning import checkpoint_layers

logger = logging.getLogger(__name__)

TRUST_ROWS = 512


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
    attention: Attention = "own",
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
    wording_noise: float = 0.0,
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
    before_weights: Callable[[], object] | None = None,
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
        attention: "own": as the backbone was pretrained; "prefix": an encoder's text does not see the state, so that a
            query reads one token per state.
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
        wording_noise: likewise on the instruction latents as the adapter reads them, of a mean square of about 1: what
            tells wordings apart by little is not relied upon, and carries over to wordings that were not fitted.
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
        before_weights: called when every argument was checked, before weights are fetched or read. What it raises ends
            the fit.

    Raises:
        DemonstrationError: empty, not finite, of differing lengths, or outside of the spaces.
        UnsupportedArgument: a value or a combination that cannot be honoured.
        BackboneUnavailable, HashMismatch: as `find_backbone`.
        InsufficientMemory: the device has less free memory than the fit will need.
        MissingExtra, DeviceUnavailable: the package or the device of a quantization is not there.
    """
    started = time.perf_counter()
    check_choice("loss", loss, ("nll", "mse"))
    checked_bound(max_quantization_kl)
    _check_savings(finetune, gradient_checkpointing, quantization, val_fraction, torch.device(device))
    recipe = Recipe(
        loss=loss,
        epochs=epochs,
        batch_size=batch_size,
        parts=gradient_accumulation_steps,
        lr=lr,
        weight_decay=weight_decay,
        input_noise=input_noise,
        wording_noise=wording_noise,
        patience=patience,
        max_seconds=max_seconds,
    )
    _check_recipe(recipe, val_fraction, trust_rows)
    check_seed("seed", seed)
    rows, kind = check_rows(states, actions, instruction_id, episode_id, task_id, kind, len(instructions))
    _check_unset(kind, std=std, std_init=std_init, std_floor=std_floor, action_low=action_low, action_high=action_high)
    if loss == "mse" and (kind == "categorical" or std == "state_dependent"):
        raise UnsupportedArgument('loss: "mse" fits a Gaussian with "state_independent" or "fixed" std; use "nll"')
    width, low, high = action_space(rows.action, kind, action_low, action_high, num_actions)
    train, val = split_episodes(rows, val_fraction, seed)

    def config_for(backbone: Backbone) -> PriorConfig:
        chosen = form or ("pooled" if backbone.kind == "encoder" else "prompt")
        if wording_noise and chosen != "pooled":
            raise UnsupportedArgument(f'wording_noise: form="{chosen}" has no instruction latents; give 0')
        return PriorConfig(
            kind, rows.state.shape[1], width, low, high, form=chosen, finetune=finetune, layers=layers, std=std,
            std_init=std_init, std_floor=std_floor, head_hidden=head_hidden, state_path=state_path, attention=attention,
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
        if before_weights is not None:
            before_weights()

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
        fit = Fit(prior, data.take(train.to(device)), data.take(val.to(device)), recipe, generator)
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


def _check_unset(kind: Kind, **gaussian: object) -> None:
    """Refuse a setting of a Gaussian, which is not fit_prior's default, for a categorical."""
    if kind == "gaussian":
        return
    for name, value in gaussian.items():
        if not isinstance(value, str | float | int) or value != inspect.signature(fit_prior).parameters[name].default:
            raise UnsupportedArgument(f"{name}: {value!r}; the actions are categorical, which have none: leave it out")


def _check_recipe(recipe: Recipe, val_fraction: float, trust_rows: int) -> None:
    """Refuse a recipe by which nothing would be learnt, and amounts that are none."""
    counts = recipe.epochs, recipe.batch_size, recipe.patience, recipe.parts
    seconds = math.inf if recipe.max_seconds is None else recipe.max_seconds
    if min(counts) < 1 or not 0 < recipe.lr < math.inf or not seconds > 0:
        names = "epochs, batch_size, patience, gradient_accumulation_steps, lr, max_seconds"
        raise UnsupportedArgument(f"{names}: must be positive, and lr finite")
    amounts = recipe.weight_decay, recipe.input_noise, recipe.wording_noise, trust_rows
    if not 0 <= val_fraction < 1 or not all(0 <= amount < math.inf for amount in amounts):
        names = "weight_decay, input_noise, wording_noise, trust_rows"
        raise UnsupportedArgument(f"val_fraction: 0 <= f < 1; {names}: finite and not negative")


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
