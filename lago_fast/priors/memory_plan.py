"""What a fit will hold in memory, reckoned before anything large is made, and refused when it cannot fit.

Weights, adapters, gradients, both moments of Adam and the kept best epoch are counted; activations are estimated
from the layers' shapes, on the high side. Test: pytest tests/priors/test_memory_plan.py
"""

import copy
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lago_fast.errors import InsufficientMemory, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.backbone import Backbone
from lago_fast.priors.config import Finetune, PriorConfig
from lago_fast.priors.quantize import linear_layers, replaceable_layers

logger = logging.getLogger(__name__)

FLOAT32 = 4  # bytes
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # bytes per weight: 4 bits, an 8-bit scale per block, the scales' own scales
NORMS = 6  # tensors of hidden width that norms, residuals and rotations of a layer keep besides its linear layers'


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by purpose; a pass with and one without gradients are not held at once."""

    weights: int
    trained: int  # adapters, projector and head; with finetune="full" the weights are trained themselves
    gradients: int
    optimiser: int
    best_epoch: int
    instructions: int  # their keys and values, where a fit reads kept ones
    activations: int

    @property
    def total(self) -> int:
        """Return the bytes of all."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """Return a line for the log."""
        parts = ", ".join(f"{name.replace('_', ' ')} {gigabytes(size)}" for name, size in asdict(self).items())
        return f"memory plan: {gigabytes(self.total)} ({parts})"


def plan_fit(
    config: PriorConfig,
    backbone: Backbone,
    instructions: Sequence[str],
    *,
    rows: int,
    query_rows: int,
    gradient_checkpointing: bool,
    device: torch.device,
) -> MemoryPlan:
    """Log and return the plan of a fit, from what it is given; `plan_memory` says more of the arguments.

    The backbone is loaded, or it is the outline that `find_backbone` hands out before it reads weights: then there
    must be room for these too, on the CPU and in float32.

    Raises:
        InsufficientMemory: the device has less free memory.
        UnsupportedArgument: this backbone knows no gradient checkpointing.
    """
    if gradient_checkpointing and not backbone.model.supports_gradient_checkpointing:
        raise UnsupportedArgument(f"gradient_checkpointing: {backbone.name} has none; leave it out")
    width, prompt = backbone.hidden_size, config.form == "prompt"
    projector, adapter = width * (config.state_dim + width), 0 if prompt else width * width
    hidden = config.head_hidden or 0
    head = hidden * width + (hidden or width) * 2 * config.action_dim
    if config.state_path == "token_and_head":
        head += hidden * (config.state_dim + hidden)
    kept = prefixes.stay(config) and prefixes.is_wanted(None, config, backbone)
    plan = plan_memory(
        skeleton_of(backbone.model, config.layers),
        finetune=config.finetune,
        rows=rows,
        tokens=int(backbones.tokenise(backbone, instructions)[1].max()) + 1 if prompt else 2,
        query_rows=query_rows,
        kept_texts=len(instructions) if kept else 0,
        lora_rank=config.lora_rank,
        own_parameters=projector + adapter + head,
        gradient_checkpointing=gradient_checkpointing,
    )
    read = [p.nbytes for p in backbone.model.parameters() if p.device.type == "meta"]
    logger.info(f"{plan} on {device}, and {gigabytes(sum(read))} on cpu for the weights as they are read")
    needed = {device.type: plan.total}
    if config.finetune == "frozen" and config.layers is None and device.type == "cpu":
        needed["cpu"] -= plan.weights  # they are not copied
    needed["cpu"] = needed.get("cpu", 0) + sum(read)
    check_memory(plan, {device: needed[device.type], torch.device("cpu"): needed["cpu"]})
    return plan


def plan_memory(
    skeleton: Any,
    *,
    finetune: Finetune,
    rows: int,
    tokens: int,
    query_rows: int,
    kept_texts: int = 0,
    lora_rank: int = 8,
    own_parameters: int = 0,
    gradient_checkpointing: bool = False,
) -> MemoryPlan:
    """Return what a fit will need.

    Args:
        skeleton: the transformer, cut to its layers; on the meta device it costs nothing.
        finetune: which of its weights are trained; "qlora" holds the others in NF4.
        rows: of one backward pass.
        tokens: of the longest sequence, the state's included.
        query_rows: of one pass without gradients, as validation makes them.
        kept_texts: whose keys and values are kept, so that only the state's token is read; 0: the whole sequence is.
        lora_rank: of the adapters.
        own_parameters: of the prior besides the transformer.
        gradient_checkpointing: keep only each layer's input, and compute the rest twice.
    """
    every = sum(p.numel() for p in skeleton.parameters())
    linear = [tuple(layer.weight.shape) for layer in linear_layers(skeleton).values()]
    in_nf4 = sum(layer.weight.numel() for layer in replaceable_layers(skeleton).values()) if finetune == "qlora" else 0
    weights = FLOAT32 * (every - in_nf4) + int(NF4 * in_nf4)
    adapters = sum(lora_rank * (a + b) for a, b in linear) if finetune in ("lora", "qlora") else 0
    trained = own_parameters + adapters
    moving = trained + (every if finetune == "full" else 0)

    layers, hidden = int(skeleton.config.num_hidden_layers), int(skeleton.config.hidden_size)
    heads = int(skeleton.config.num_attention_heads)
    # numbers that one token keeps in one layer: both sides of the linear layers, as much again for activation
    # functions and dropout, and a row of attention per head
    per_token = 2 * sum(a + b for a, b in linear) // layers + NORMS * hidden + 2 * heads * tokens
    kept = layers * hidden + per_token if gradient_checkpointing else layers * per_token
    # keys and values of a sequence in one layer; of kept ones each row gathers those of its own text
    both = 2 * tokens * (hidden // heads) * int(getattr(skeleton.config, "num_key_value_heads", None) or heads)
    read, gathered = (1, both) if kept_texts else (tokens, 0)
    # without gradients a layer's tensors are dropped as it goes
    passing = 2 * max((a + b for a, b in linear), default=0) + 2 * hidden + heads * tokens
    learning, asking = rows * (read * kept + layers * gathered), query_rows * (read * passing + gathered)
    # a weight in NF4 is unpacked to be multiplied with
    unpacked = max((a * b for a, b in linear), default=0) if finetune == "qlora" else 0
    return MemoryPlan(
        weights=weights,
        trained=FLOAT32 * trained,
        gradients=FLOAT32 * moving,
        optimiser=2 * FLOAT32 * moving,
        best_epoch=FLOAT32 * moving,
        instructions=FLOAT32 * kept_texts * layers * both,
        activations=FLOAT32 * (max(learning, asking) + unpacked),
    )


def skeleton_of(model: Any, layers: int | None) -> Any:
    """Return the model without its numbers, on the meta device, cut to its first `layers` layers."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    if layers is not None:
        backbones.keep_layers(skeleton, layers)
    return skeleton


def check_memory(plan: MemoryPlan, needed: dict[torch.device, int]) -> None:
    """Raise InsufficientMemory when what a plan needs of a device, in bytes, exceeds what is free there."""
    for device, size in needed.items():
        free = free_bytes(device)
        if free is not None and size > free:
            raise InsufficientMemory(
                f"device: the fit needs about {gigabytes(size)} more on {device}, where {gigabytes(free)} are free "
                f'({plan}); take finetune="qlora", gradient_checkpointing=True, fewer layers, a smaller batch_size, '
                "more gradient_accumulation_steps or a smaller backbone"
            )


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that are free on a device; None where that cannot be known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.is_file():
        return None
    figures = dict(line.split(":", 1) for line in known.read_text().splitlines())
    return int(figures["MemAvailable"].split()[0]) * 1024


def gigabytes(size: float) -> str:
    """Return a number of bytes in GB, with three digits."""
    return f"{size / 1e9:.3g} GB"
