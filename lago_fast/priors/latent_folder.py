"""The folder of a latent-action prior: its own weights, what was tuned, and a reference to its backbone.

Test: pytest tests/priors/test_latent_action.py
"""

import json
import logging
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lago_fast.errors import HashMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import folder as folders
from lago_fast.priors import quantize, tuning
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.hashes import hash_tensors
from lago_fast.priors.quantize import Quantization
from lago_fast.priors.trust import Demonstrated

logger = logging.getLogger(__name__)

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


def digest_of(prior: Any, quantization: Quantization) -> str:
    """Return the SHA-256 over a prior's backbone, configuration, weights and instructions, and so many bits."""
    # as it was before there were these, so that the priors of then keep their digests
    since = {("state_path", "token"), ("attention", "own")}
    config = {k: v for k, v in asdict(prior.config).items() if (k, v) not in since}
    about = {
        "backbone": prior.reference["sha256"],
        "config": config,
        "texts": prior.instructions,
    }
    if quantization != "none":
        about["quantization"] = quantization
    tensors = {**prior.own_tensors(), **_tuned_tensors(prior)}
    tensors["about"] = torch.tensor(list(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
    return hash_tensors(tensors)


def _tuned_tensors(prior: Any) -> dict[str, Tensor]:
    if prior.config.finetune == "frozen":
        return {}
    state = {f"transformer.{name}": t for name, t in prior.transformer.state_dict().items()}
    return {n: t for n, t in state.items() if prior.config.finetune == "full" or "lora_" in n}


def _check_trust(prior: Any, folder: Path, recorded: Quantization) -> None:
    """Warn of a quantized prior that was saved with the exact prior's latents: its digest holds, and so does it."""
    if recorded == "none" or prior.demonstrated is None or "trust_states" in prior.metrics.get("quantization", {}):
        return
    logger.warning(
        "the trust of the %s prior in %s is reckoned by the exact prior's latents, and may be too low; quantize the "
        "exact prior again, with calibration_states",
        recorded,
        folder,
    )


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
    _check_trust(prior, folder, recorded)
    wanted = quantization or recorded
    if recorded not in ("none", wanted):
        raise UnsupportedArgument(
            f"quantization: {folder} holds a prior made for {recorded!r}, not {wanted!r}; give the exact prior"
        )
    if max_quantization_kl is None:
        bound = saved.get("max_quantization_kl", quantize.MAX_KL_NATS)
        max_quantization_kl = math.inf if bound is None else bound
    if wanted != "none":
        demonstrated = prior.demonstrated
        prior.become_quantized(wanted, max_quantization_kl, torch.device(device))
        if recorded != "none":
            prior.demonstrated = demonstrated  # as the quantized transformer has them
        elif demonstrated is not None:
            quantize.say_without_trust("quantize it with quantize_prior and calibration_states")
    return prior.to(device)
