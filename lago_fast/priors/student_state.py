"""What an amortised prior has become while it answered, as tensors and plain figures, and back.

With it a training run that was stopped goes on bit for bit: the student is refitted by what the run visits.
Test: pytest tests/priors/test_student_state.py
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from lago_fast.errors import PriorMismatch
from lago_fast.priors.memory import Memory

if TYPE_CHECKING:
    from lago_fast.priors.amortised import AmortisedPrior

MEMORIES = ("taught", "live", "_pending")
FIGURES = ("heldout_kl_nats", "audit_kl_nats", "audited_rows", "audited_kl_sum", "_audit_due", "_refresh_due", "_log")
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def learnt(prior: "AmortisedPrior") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the student, its optimiser, generator, audits and memories."""
    tensors = {f"student.{name}": tensor for name, tensor in prior.student.state_dict().items()}
    tensors["generator"] = prior._generator.get_state()
    tensors |= prior.held_out.tensors()
    for name in MEMORIES:
        tensors |= getattr(prior, name).raw(name)
    if prior._optimiser is not None:
        for i, state in prior._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": state[name] for name in MOMENTS}
    figures: dict[str, Any] = {name: getattr(prior, name) for name in FIGURES}
    figures["memories"] = {name: getattr(prior, name).place for name in MEMORIES}
    return tensors, {**figures, "digest": prior.digest}


def take_back(prior: "AmortisedPrior", tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
    """Make the prior what `learnt` was asked of.

    Raises:
        PriorMismatch: that was another prior, or a student of another shape.
    """
    if figures["digest"] != prior.digest:
        raise PriorMismatch(f"prior: the run's had the digest {figures['digest']}, this has {prior.digest}")
    try:
        prior.student.take(_below("student.", tensors))
        prior._generator.set_state(tensors["generator"].cpu())
    except RuntimeError as error:
        raise PriorMismatch(f"prior: the run's student has another shape ({error}); pass the same prior") from error
    taught = len(tensors["taught.state"]) if "taught.state" in tensors else 0
    for name, capacity in zip(MEMORIES, (taught, prior.config.live_rows, prior.config.audit_window), strict=True):
        rows = {key: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        setattr(prior, name, Memory.from_raw(name, rows, capacity, int(figures["memories"][name]), prior.device))
    prior.held_out.restore(tensors)
    for name in FIGURES:
        setattr(prior, name, {**prior._log, **figures[name]} if name == "_log" else figures[name])
    moments = _below("optimiser.", tensors)
    prior._optimiser = prior.new_optimiser() if moments else None
    if prior._optimiser is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in moments.items():
            i, name = key.split(".", 1)
            state.setdefault(int(i), {})[name] = tensor.clone()
        prior._optimiser.load_state_dict({**prior._optimiser.state_dict(), "state": state})


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
