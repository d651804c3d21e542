"""A fitted prior with its frozen transformer in fewer bits, and how far its answers are from the exact one's.

    "bf16"  weights and arithmetic
    "int8"  rows of weights and of inputs, each with its own scale; bitsandbytes
    "nf4"   4-bit weights in blocks of 64 (QLoRA, arXiv 2305.14314); bitsandbytes
    "fp8"   rows as of int8, on the tensor cores of compute capability 8.9 and later; torchao

Of int8 the outliers are not kept apart (arXiv 2208.07339): which columns they are depends on the whole batch, and
the answer to a state would depend on its neighbours. Test: pytest tests/priors/test_quantize.py
"""

import copy
import importlib.util
import logging
import math
from typing import TYPE_CHECKING, Any, Literal

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lago_fast.errors import DeviceUnavailable, MissingExtra, UnsupportedArgument
from lago_fast.priors.base import PriorOutput, prior_kl
from lago_fast.priors.folder import check_choice
from lago_fast.priors.rows import perturbation
from lago_fast.priors.trust import encode_again

if TYPE_CHECKING:
    from lago_fast.priors.latent_action import LatentActionPrior

logger = logging.getLogger(__name__)

Quantization = Literal["none", "bf16", "int8", "nf4", "fp8"]
QUANTIZATIONS: tuple[Quantization, ...] = ("none", "bf16", "int8", "nf4", "fp8")
MAX_KL_NATS = 0.05  # of a quantized prior that trainers take unasked
AGREEMENT = 0.05  # largest difference of a mean component that counts as the same
RIDGE = 1e-2  # of the calibrated head, relative to the mean square of its inputs
CALIBRATION_ROWS = 4096  # at most
CALIBRATION_COPIES = 3  # perturbed, of each row: demonstrations alone lie too close together
FP8_CAPABILITY = (8, 9)


def quantize_prior(
    prior: "LatentActionPrior",
    quantization: Quantization,
    heldout_states: ArrayLike,
    heldout_ids: ArrayLike,
    *,
    calibration_states: ArrayLike | None = None,
    calibration_ids: ArrayLike | None = None,
    max_quantization_kl: float = MAX_KL_NATS,
) -> "LatentActionPrior":
    """Return a quantized copy of a fitted prior, with memory and fidelity in its `.metrics["quantization"]`.

    The copy answers where `prior` is now; an int8 one cannot be moved afterwards.

    Args:
        prior: frozen; it stays as it is.
        quantization: "bf16", "int8", "nf4" or "fp8".
        heldout_states: [n, S], raw, that neither the prior was fitted on nor the head is calibrated on.
        heldout_ids: [n] integers, instruction ids.
        calibration_states: [m, S]; given, the head's last layer is fitted anew, so that from the quantized latents
            of these states and of perturbed copies it says what the exact prior says (ridge regression, at most
            4096 states), and the demonstrated states by which trust is reckoned are encoded anew, of which these are
            taken to be some. None: the head stays, and answers have no trust.
        calibration_ids: [m] integers.
        max_quantization_kl: nats; what trainers are to take, kept with the prior.

    Raises:
        UnsupportedArgument: no such quantization, quantized already, every weight tuned, or no held-out states.
        MissingExtra, DeviceUnavailable: the package or the device for it is not there.
    """
    check_choice("quantization", quantization, QUANTIZATIONS[1:])
    check_quantizable(prior)
    if (calibration_states is None) != (calibration_ids is None):
        raise UnsupportedArgument("calibration_states, calibration_ids: give both, or neither")
    states, ids = _rows(prior, heldout_states, heldout_ids)
    if not len(states):
        raise UnsupportedArgument("heldout_states: empty; fidelity is measured on them, give at least one")
    rows = None
    if calibration_states is not None and calibration_ids is not None:
        rows = _rows(prior, calibration_states, calibration_ids)
        if not len(rows[0]):
            raise UnsupportedArgument("calibration_states: empty; give at least one, or None")
        every = math.ceil(len(rows[0]) / CALIBRATION_ROWS)
        rows = rows[0][::every], rows[1][::every]
    quantized = copy.deepcopy(prior, uncopied(prior.transformer) if quantization in ("int8", "nf4") else None)
    quantized.become_quantized(quantization, max_quantization_kl)
    if rows is not None:
        _calibrate(quantized, prior, *rows)
    if prior.demonstrated is not None and rows is not None and len(rows[0]) > 1:
        exact, latents = prior.query(*rows).latent, quantized.query(*rows).latent
        assert exact is not None
        assert latents is not None
        quantized.demonstrated = encode_again(prior.demonstrated, exact, latents)
    if prior.demonstrated is not None and quantized.demonstrated is None:
        say_without_trust("give calibration_states")
    figures: dict[str, Any] = {
        "calibration_states": 0 if rows is None else len(rows[0]),
        "trust_states": 0 if quantized.demonstrated is None else len(quantized.demonstrated.latents),
    }
    quantized.metrics = {
        **prior.metrics,
        "quantization": {
            "name": quantization,
            **fidelity(prior.query(states, ids), quantized.query(states, ids)),
            **figures,
            "std_floor": prior.config.std_floor,
            "weights_bytes": weights_bytes(quantized.transformer),
            "exact_weights_bytes": weights_bytes(prior.transformer),
        },
    }
    return quantized


def say_without_trust(remedy: str) -> None:
    """Warn that a quantized prior's answers have none, though the exact prior's have."""
    logger.warning(
        "the quantized prior's answers have no trust: demonstrated states are known by their exact latents alone, from "
        "which those of the quantized transformer are far; %s",
        remedy,
    )


def fidelity(exact: PriorOutput, quantized: PriorOutput) -> dict[str, float]:
    """Return what a quantized prior's answers [n] have in common with the exact ones.

    kl_nats is the mean KL(exact || quantized), at the std with which the priors answer. agreement is the share of
    states with the same most likely action, or with every component of the mean within 0.05.
    """
    if exact.log_probs is not None and quantized.log_probs is not None:
        same = exact.log_probs.argmax(-1) == quantized.log_probs.argmax(-1)
    else:
        assert exact.mean is not None
        assert quantized.mean is not None
        same = ((exact.mean - quantized.mean).abs() <= AGREEMENT).all(dim=-1)
    kl = float(prior_kl(exact, quantized).mean())
    return {"kl_nats": kl, "agreement": float(same.float().mean()), "states": len(same)}


def quantize_transformer(transformer: Any, quantization: Quantization, device: torch.device | None = None) -> None:
    """Quantize a transformer's linear layers in place; adapters stay as they are.

    Args:
        transformer: in float32.
        quantization: of its weights.
        device: where the quantized layers are to be, one full layer at a time; None: where they are.

    Raises MissingExtra or DeviceUnavailable when the package or the device for it is not there.
    """
    check_choice("quantization", quantization, QUANTIZATIONS[1:])
    device, layers = device or next(transformer.parameters()).device, replaceable_layers(transformer)
    if quantization in ("bf16", "fp8"):
        if quantization == "fp8":
            check_fp8(device)
        exact = [layer for name, layer in linear_layers(transformer).items() if name not in layers]
        kept = {id(parameter) for layer in exact for parameter in layer.parameters()}
        for name, parameter in transformer.named_parameters():  # buffers, such as RoPE's frequencies, need float32
            if not _is_adapter(name) and id(parameter) not in kept:
                parameter.data = parameter.data.to(torch.bfloat16)
        if quantization == "fp8":
            _fp8(transformer.to(device), layers)
        return
    make = _linear_maker(quantization)
    for name, module in layers.items():
        parent = transformer.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], make(module, device))


def compute_dtype(quantization: Quantization) -> torch.dtype:
    """Return the dtype of the tokens that a quantized transformer reads."""
    return torch.bfloat16 if quantization in ("bf16", "fp8") else torch.float32


def checked_bound(max_quantization_kl: float) -> float:
    """Return a bound in nats; raises UnsupportedArgument for one that nothing can be held against."""
    if not max_quantization_kl >= 0:
        raise UnsupportedArgument(f"max_quantization_kl={max_quantization_kl}: give nats, 0 or more, or inf")
    return max_quantization_kl


def check_fp8(device: torch.device) -> None:
    """Raise DeviceUnavailable or MissingExtra where "fp8" cannot run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise DeviceUnavailable(
            f"quantization: 'fp8' needs a CUDA device of compute capability 8.9 or later, the prior is on {device}; "
            "use 'bf16'"
        )
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra("quantization: 'fp8' needs torchao; pip install torchao")


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers of a transformer by name, without adapters."""
    return {name: m for name, m in model.named_modules() if _is_linear(m) and not _is_adapter(name)}


def replaceable_layers(model: nn.Module) -> dict[str, Any]:
    """Return the linear layers that a quantization replaces: all but those that the model wants in float32."""
    kept = {name for m in model.modules() for name in getattr(m, "_keep_in_fp32_modules", None) or ()}
    return {name: m for name, m in linear_layers(model).items() if not kept & set(name.split("."))}


def uncopied(model: nn.Module) -> dict[int, Any]:
    """Return a memo for deepcopy under which weights that are to be replaced are shared until they are."""
    return {id(layer.weight): layer.weight for layer in replaceable_layers(model).values()}


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's weights, with the scales of quantized ones."""
    return sum(t.untyped_storage().nbytes() for t in {t.data_ptr(): t for t in _stored(model)}.values())


def _stored(model: nn.Module) -> list[Tensor]:
    tensors = [*model.parameters(), *model.buffers()]
    wrappers = [t for t in tensors if hasattr(t, "__tensor_flatten__")]  # numbers and scales in one, as torchao's
    tensors = [t for t in tensors if not hasattr(t, "__tensor_flatten__")]
    tensors += [getattr(t, name) for t in wrappers for name in t.__tensor_flatten__()[0]]
    for module in model.modules():
        scale = getattr(getattr(module, "state", None), "SCB", None)
        blocks: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        tensors += [t for t in (scale, getattr(blocks, "absmax", None)) if t is not None]
        if getattr(blocks, "state2", None) is not None:
            tensors.append(blocks.state2.absmax)
    return tensors


def check_quantizable(prior: "LatentActionPrior") -> None:
    """Raise UnsupportedArgument when a prior's transformer cannot be quantized and kept by reference."""
    if prior.quantization != "none" or prior.config.finetune == "qlora":
        raise UnsupportedArgument("prior: its transformer is quantized already; give the exact prior")
    if prior.config.finetune == "full":
        raise UnsupportedArgument(
            'prior: finetune="full" keeps its own weights, which a quantized prior would lose; fit it with "lora"'
        )


def _rows(prior: "LatentActionPrior", states: ArrayLike, ids: ArrayLike) -> tuple[Tensor, Tensor]:
    device = prior.table.device
    return torch.as_tensor(states).float().to(device), torch.as_tensor(ids).long().to(device)


@torch.no_grad()
def _calibrate(quantized: "LatentActionPrior", exact: "LatentActionPrior", states: Tensor, ids: Tensor) -> None:
    """Fit the last layer of the quantized prior's head to the exact one's outputs, near what it was."""
    generator, copies = torch.Generator().manual_seed(0), [states]
    for _ in range(CALIBRATION_COPIES):
        copies.append(states + exact.std_state * perturbation(states, generator))
    states, ids = torch.cat(copies), ids.repeat(len(copies))
    wanted, latent = exact.query(states, ids).latent, quantized.query(states, ids).latent
    assert wanted is not None
    assert latent is not None
    head = quantized.head
    last = head[-1] if isinstance(head, nn.Sequential) else head
    inputs = head[:-1](latent) if isinstance(head, nn.Sequential) else latent
    left = (exact.head(wanted) - head(latent)).double()
    inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1).double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    change = torch.linalg.solve(gram, inputs.T @ left).float()
    last.weight += change[:-1].T
    last.bias += change[-1]


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer, its weight transposed

    return isinstance(module, nn.Linear | Conv1D)


def _is_adapter(name: str) -> bool:
    return "lora_" in name


def _linear_maker(quantization: Quantization) -> Any:
    """Return what makes a quantized layer of a linear one."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra(
            f"quantization: {quantization!r} needs bitsandbytes; pip install 'lago_fast[llm]', or use 'bf16'"
        )
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = log.level
    log.setLevel(logging.ERROR)  # it complains that a faster kernel, fetched from the hub, is not there
    try:
        import bitsandbytes as bnb
    finally:
        log.setLevel(level)

    class Int8Linear(bnb.nn.Linear8bitLt):
        """Half precision in and out, which bitsandbytes else casts to by itself and reports at every call."""

        def forward(self, x: Tensor) -> Tensor:
            """Return the product for x [..., in] in the dtype of x."""
            return super().forward(x.half()).to(x.dtype)

    class Nf4Linear(bnb.nn.Linear4bit):
        """Computes in what suits the device that its input is on, wherever it was quantized."""

        def forward(self, x: Tensor) -> Tensor:
            """Return the product for x [..., in] in the dtype of x."""
            self.compute_dtype = torch.bfloat16 if x.is_cuda else torch.float32
            return super().forward(x)

    def weight_and_bias(linear: Any, device: torch.device) -> tuple[Tensor, Tensor | None]:
        weight = linear.weight.detach() if isinstance(linear, nn.Linear) else linear.weight.detach().T.contiguous()
        return weight, None if linear.bias is None else linear.bias.detach().to(device, copy=True)

    def int8(linear: Any, device: torch.device) -> Any:
        weight, bias = weight_and_bias(linear, device)
        made = Int8Linear(weight.shape[1], weight.shape[0], bias is not None, has_fp16_weights=False, device="meta")
        # which quantizes on its way from the CPU
        stored: Any = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        made.weight = stored.to(device)
        made.init_8bit_state()  # which the first call would do, while other threads are calling too
        if bias is not None:
            made.bias = nn.Parameter(bias.half(), requires_grad=False)
        return made.eval()

    def nf4(linear: Any, device: torch.device) -> Any:
        weight, bias = weight_and_bias(linear, device)
        made = Nf4Linear(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            compute_dtype=torch.float32,
            quant_type="nf4",
            device="meta",
        )
        stored: Any = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
        made.weight = stored.to(device)
        # the layout for AVX-512 BF16 is made at the first call, while other threads are calling too, and computes
        # in bfloat16: answers would depend on the machine
        made.support_avx512bf16_for_cpu = False
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made.eval()

    return int8 if quantization == "int8" else nf4


def _fp8(transformer: Any, layers: dict[str, Any]) -> None:
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

    def wanted(module: nn.Module, name: str) -> bool:
        # the tensor cores read 16 numbers at a time
        return name in layers and isinstance(module, nn.Linear) and not any(n % 16 for n in module.weight.shape)

    quantize_(transformer, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()), filter_fn=wanted)


def kl_of(metrics: dict[str, Any]) -> float:
    """Return the measured KL of a quantized prior in nats; NaN where none was measured."""
    return float(metrics.get("quantization", {}).get("kl_nats", math.nan))
