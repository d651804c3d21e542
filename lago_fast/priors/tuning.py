"""Which of the transformer's weights stage 1 fits: none, LoRA adapters (on float or on NF4 weights), or all.

LoRA: arXiv 2106.09685. QLoRA: arXiv 2305.14314. Test: pytest tests/priors/test_latent_action.py
"""

import copy
from pathlib import Path
from typing import Any

from lago_fast.priors import backbone as backbones
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.quantize import linear_layers, quantize_transformer, uncopied

ADAPTERS = ("lora", "qlora")  # kinds of finetune whose tuned weights are peft's adapters


def tunable(model: Any, config: PriorConfig) -> Any:
    """Return the transformer, cut to its layers, with gradients where `finetune` wants them.

    The model that is handed over stays as it is; where nothing of it changes, it is shared.
    """
    if config.layers is not None or config.finetune != "frozen":
        model = copy.deepcopy(model, uncopied(model) if config.finetune == "qlora" else None)
    if config.layers is not None:
        backbones.keep_layers(model, config.layers)
    if config.finetune in ADAPTERS:
        return _with_adapters(model, config)
    return model.requires_grad_(config.finetune == "full")


def with_saved_adapters(model: Any, config: PriorConfig, folder: Path) -> Any:
    """Return a transformer with the adapters that were saved in `folder`; its NF4 weights are made in place."""
    from peft import PeftModel

    return PeftModel.from_pretrained(_base(model, config), folder)


def checkpoint_layers(transformer: Any, on: bool) -> None:
    """Let the backward pass keep only the layers' inputs and compute the rest again, or no longer."""
    verb = "enable" if on else "disable"
    # its name in later versions of transformers 5, and before
    switch = getattr(transformer, f"activation_checkpointing_{verb}", None)
    switch = switch or getattr(transformer, f"gradient_checkpointing_{verb}")
    switch(*([{"use_reentrant": False}] if on else []))


def _base(model: Any, config: PriorConfig) -> Any:
    if config.finetune == "qlora":
        quantize_transformer(model, "nf4")
        model.is_loaded_in_4bit = True  # peft looks here
    return model


def _with_adapters(model: Any, config: PriorConfig) -> Any:
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers.pytorch_utils import Conv1D

    model = _base(model, config)
    if config.finetune == "qlora":
        # checkpointing is a choice of the fit
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    transposed = all(isinstance(layer, Conv1D) for layer in linear_layers(model).values())  # GPT-2's are
    lora = LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules="all-linear", fan_in_fan_out=transposed
    )
    return get_peft_model(model, lora)
