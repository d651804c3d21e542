"""A learner of Q over text actions as one file: safetensors with JSON in its header, read without running code.

Test: pytest tests/algorithms/test_text_saving.py
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from lago_fast.algorithms.checkpoint import Checkpoint, read_tensors, write_tensors
from lago_fast.errors import CorruptFile, EncoderMismatch, LagoError, PriorMismatch, UnsupportedArgument
from lago_fast.priors.text_base import TextActionPrior, TextEncoder

if TYPE_CHECKING:
    from lago_fast.algorithms.text_learner import TextLearner

Model = TypeVar("Model")
SUFFIX = ".safetensors"


def file_of(path: str | Path) -> Path:
    """Return the path with the suffix of a model, where it has none."""
    path = Path(path)
    return path if path.suffix else path.with_suffix(SUFFIX)


def write_model(model: "TextLearner", path: str | Path) -> None:
    """Write all that a learner is; see `TextLearner.save`."""
    tensors: dict[str, Tensor] = {}
    for part in ("network", "target"):
        tensors |= {f"{part}.{name}": tensor for name, tensor in getattr(model, part).state_dict().items()}
    for i, moments in model.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
    figures = {
        "class": type(model).__name__,
        "arguments": model.arguments,
        "encoder": model.encoder.digest,
        "prior": None if model.prior is None else model.prior.digest,
        "num_timesteps": model.num_timesteps,
        "n_updates": model.n_updates,
    }
    write_tensors(file_of(path), tensors, figures)


def read_model(
    path: str | Path, name: str, encoder: TextEncoder, prior: TextActionPrior | None
) -> tuple[Checkpoint, dict[str, Any]]:
    """Return a model's file and its constructor's arguments, once encoder and prior are known to be the model's.

    Raises:
        NoCheckpoint, CorruptFile, HashMismatch: there is no such file, or it is damaged.
        UnsupportedArgument: it holds a model of another class.
        EncoderMismatch, PriorMismatch: another encoder, or another prior.
    """
    kept = read_tensors(file_of(path))
    try:
        found, arguments = kept.figures["class"], dict(kept.figures["arguments"])
        digests = kept.figures["encoder"], kept.figures["prior"]
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"path: {path} holds no model of text actions ({error!r}); name another file") from error
    if found != name:
        raise UnsupportedArgument(f"path: {path} holds a {found}; load it with {found}.load")
    if digests[0] != encoder.digest:
        raise EncoderMismatch(
            f"encoder: this model reads the vectors of encoder {digests[0]} and got {encoder.digest}; pass the same one"
        )
    own = None if prior is None else prior.digest
    if digests[1] != own:
        raise PriorMismatch(f"prior: this model was trained with prior {digests[1]} and got {own}; pass the same one")
    return kept, arguments


def built(build: Callable[..., Model], kept: Checkpoint, arguments: dict[str, Any], path: str | Path) -> Model:
    """Return what `build` makes of a file's arguments.

    Raises:
        CorruptFile: they are not what a constructor takes, or ask for a network that the file does not hold.
    """
    try:
        widths = list(arguments["net_arch"])
        held = sum(tensor.numel() for tensor in kept.tensors.values())
        if min(widths, default=1) < 1 or sum(widths) + sum(a * b for a, b in pairwise(widths)) > held:
            raise ValueError("a network of another size than its weights")
        return build(**arguments)
    except LagoError:
        raise
    except (LookupError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CorruptFile(f"path: the arguments in {path} are of no model ({error}); name another file") from error


def put_back(model: "TextLearner", kept: Checkpoint, path: str | Path) -> None:
    """Make a learner, built with the file's arguments, what it was when it was saved.

    Raises:
        CorruptFile: something is missing in the file, or has another shape.
    """
    try:
        for part in ("network", "target"):
            getattr(model, part).load_state_dict(_below(f"{part}.", kept.tensors))
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below("optimizer.", kept.tensors).items():
            place, what = name.split(".", 1)
            moments.setdefault(int(place), {})[what] = tensor
        parameters = list(model.network.parameters())
        for i, state in moments.items():
            if any(value.ndim and value.shape != parameters[i].shape for value in state.values()):
                raise ValueError("moments of other shapes")
        groups = model.optimizer.state_dict()["param_groups"]
        model.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        model.num_timesteps, model.n_updates = int(kept.figures["num_timesteps"]), int(kept.figures["n_updates"])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, LagoError):
            raise
        raise CorruptFile(f"path: {path} lacks something, or holds another thing ({error!r})") from error


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
