"""A causal language model with its head, found and checked as a backbone is: a folder, the hub's cache, the hub.

Only safetensors are read and no remote code is run. Test: pytest tests/priors/test_causal_lm.py
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lago_fast.errors import BackboneUnavailable, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import hashes
from lago_fast.priors.folder import check_choice
from lago_fast.priors.locate import locate

ABOUT = "lago_training.json"  # in the folder of a model that this package trained
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class CausalLM:
    """A frozen model that continues texts, with what is needed to name it again."""

    name: str  # as it was asked for
    source: str  # "local" or "hub"
    revision: str  # commit on the hub, "" of a local folder
    sha256: str  # of the weights
    digest: str  # SHA-256 of weights, configuration, tokenizer, what ends a text, and dtype
    max_tokens: int | None  # longest sequence that it reads; None: any length
    about: dict[str, Any]  # how this package trained it; empty of any other model
    model: Any
    tokenizer: Any


def find_causal_lm(
    name: str,
    *,
    revision: str = "",
    expected_sha256: str = "",
    dtype: Dtype = "float32",
    device: str | torch.device = "cpu",
) -> CausalLM:
    """Load a causal language model and its tokenizer, with the weights checked.

    Args:
        name: a local folder or a hub id.
        revision: hub commit or branch; "" takes the default branch.
        expected_sha256: refuse other weights; "" accepts any.
        dtype: of the weights in memory.
        device: where they are put.

    Raises:
        BackboneUnavailable: neither folder nor hub has it, or its record of training is damaged.
        HashMismatch: the weights are not the expected ones.
        UnsupportedArgument: no causal decoder.
    """
    check_choice("dtype", dtype, ("float32", "bfloat16", "float16"))
    folder, source, found_revision = locate(name, revision, weights=True)
    sha256 = hashes.hash_weights(folder)
    hashes.check_hash(str(folder), sha256, expected_sha256 or sha256)
    model, tokenizer = _load(folder, dtype, device)
    about = {
        "weights": sha256,
        "config": hashes.hash_config(folder),
        "tokenizer": hashes.hash_tokenizer(tokenizer),
        "eos": model.generation_config.eos_token_id,
        "dtype": dtype,
    }
    return CausalLM(
        name=name,
        source=source,
        revision=found_revision,
        sha256=sha256,
        digest=hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest(),
        max_tokens=_context(model, tokenizer),
        about=_training(folder),
        model=model,
        tokenizer=tokenizer,
    )


def _load(folder: Path, dtype: Dtype, device: str | torch.device) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with backbones.reading(folder, "lm"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        if backbones.kind_of(config) != "decoder":
            raise UnsupportedArgument(f"lm: {folder} is a {config.model_type}, no causal decoder; give one")
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # a checkpoint's own temperature or penalty would change what is sampled unasked
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id)
    return model.eval().requires_grad_(False).to(device), tokenizer


def _context(model: Any, tokenizer: Any) -> int | None:
    """Return the longest sequence that is read whole: where attention is windowed no longer one than the window."""
    limits = (backbones.max_tokens_of(model, tokenizer), getattr(model.config, "sliding_window", None))
    return min((int(limit) for limit in limits if limit), default=None)


def _training(folder: Path) -> dict[str, Any]:
    record = folder / ABOUT
    if not record.is_file():
        return {}
    try:
        about = json.loads(record.read_text())
    except ValueError as error:
        raise BackboneUnavailable(f"lm: {record} is damaged ({error}); train the model again") from error
    if not isinstance(about, dict):
        raise BackboneUnavailable(f"lm: {record} is damaged; train the model again")
    return about
