"""The folder of a latent-action prior: its own weights, what was tuned, and a reference to its backbone.

Test: pytest tests/priors/test_latent_action.py
"""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from lago_fast.errors import HashMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import folder as folders
from lago_fast.priors import quantize, tuning
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.quantize import Quantization
from lago_fast.priors.trust import Demonstrated

CLASS = "LatentActionPrior"


def write(prior: Any, folder: str | Path, *, overwrite: bool) -> Path:
    """Write the folder of a prior, as its `save` says."""

    def fill(place: Path) -> None:
        folders.write_tensors(place / "prior.safetensors", prior.own_tensors())
        if prior.config.finetune == "full":
            folders.write_tensors(place / "backbone.safetensors", dict(prior.transformer.state_dict()))
        if prior.config.finetune in tuning.ADAPTERS:
            prior.transformer.save_pretrained(place / "adapter", save_embedding_layers=False)

    about = {
        "class": CLASS,
        "digest": prior.digest,
        "backbone": prior.reference,
        "prior": asdict(prior.config),
        "query_batch_size": prior.query_batch_size,
        "prefix_kv": prior.prefix_kv,
        "quantization": prior.quantization,
        "max_quantization_kl": prior.max_quantization_kl if math.isfinite(prior.max_quantization_kl) else None,
        "instructions": prior.instructions,
    }
    return folders.write_folder(folder, about, prior.metrics, fill, overwrite=overwrite)


@folders.typed_errors
def read(
    kind: Any,
    folder: str | Path,
    device: str | torch.device,
    *,
    backbone: str,
    prefix_kv: bool | None,
    quantization: Quantization | None,
    max_quantization_kl: float | None,
) -> Any:
    """Return the prior, of class `kind`, that a folder holds, as its `load` says."""
    folder, saved, metrics = folders.read_folder(folder, CLASS)
    entries: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["prior"].items()}
    config = PriorConfig(**entries)
    tensors = folders.read_tensors(folder / "prior.safetensors")
    found = backbones.find_reference(saved["backbone"], name=backbone)
    prior = kind(
        replace(config, finetune="frozen"),
        found,
        saved["instructions"],
        query_batch_size=saved["query_batch_size"],
        table=tensors["table"],
        prefix_kv=saved.get("prefix_kv") if prefix_kv is None else prefix_kv,
    )
    prior.config, prior.reference, prior.metrics = config, saved["backbone"], metrics
    if "demonstrated.scale" in tensors:
        prior.demonstrated = Demonstrated(tensors["demonstrated.latents"], tensors["demonstrated.scale"])
    own = {name: tensors[name] for name in prior.own_tensors()}
    prior.load_state_dict(own, strict=False)
    if config.finetune == "full":
        prior.transformer.load_state_dict(folders.read_tensors(folder / "backbone.safetensors"))
    if config.finetune in tuning.ADAPTERS:
        prior.transformer = tuning.with_saved_adapters(prior.transformer, config, folder / "adapter")
    recorded: Quantization = saved.get("quantization", "none")
    if prior.digest_as(recorded) != saved["digest"]:
        raise HashMismatch(f"folder: {folder} does not have the digest in its config.json; fit it again")
    prior.freeze()
    wanted = quantization or recorded
    if recorded not in ("none", wanted):
        raise UnsupportedArgument(
            f"quantization: {folder} holds a prior made for {recorded!r}, not {wanted!r}; give the exact prior"
        )
    if max_quantization_kl is None:
        bound = saved.get("max_quantization_kl", quantize.MAX_KL_NATS)
        max_quantization_kl = math.inf if bound is None else bound
    if wanted != "none":
        prior.become_quantized(wanted, max_quantization_kl, torch.device(device))
    return prior.to(device)
