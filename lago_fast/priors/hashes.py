"""What names a pretrained model again: SHA-256 of its weights, its tokenizer and its configuration.

Test: pytest tests/priors/test_hashes.py tests/priors/test_backbone.py
"""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, uint8

from lago_fast.errors import BackboneUnavailable, HashMismatch

# of a config.json, what no answer of a model in evaluation mode reads: copies of one model differ in it
UNREAD = {"architectures", "dtype", "gradient_checkpointing", "id2label", "initializer_range", "label2id"}
UNREAD |= {"torch_dtype", "transformers_version", "use_cache"}


def hash_weights(folder: Path) -> str:
    """Return the SHA-256 of a folder's safetensors: of the file, or of the list of hashes of several."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BackboneUnavailable(
            f"backbone: {folder} has no *.safetensors; only safetensors are read, convert the weights with "
            "model.save_pretrained(folder, safe_serialization=True)"
        )
    hashes = [hash_file(file) for file in files]
    if len(files) == 1:
        return hashes[0]
    listing = "".join(f"{file.name} {digest}\n" for file, digest in zip(files, hashes, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


def hash_config(folder: Path) -> str:
    """Return the SHA-256 of everything in a folder's config.json that can change an answer, in hex."""
    config = json.loads((folder / "config.json").read_text())
    read = {name: value for name, value in config.items() if name not in UNREAD and name[0] != "_"}
    read = {name: value for name, value in read.items() if "drop" not in name}
    return _hash_json(read)


def hash_tokenizer(tokenizer: Any) -> str:
    """Return the SHA-256 of everything that decides which tokens a text has, in hex.

    How its last call was asked to cut and pad is left out: a tokenizer keeps that, and every call says it anew.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _hash_json(tokenizer.get_vocab())
    content = json.loads(backend.to_str())
    return _hash_json({name: part for name, part in content.items() if name not in ("truncation", "padding")})


def hash_as_it_is(tokenizer: Any) -> str:
    """Return the SHA-256 of a tokenizer with what it was last asked to cut and pad, in hex."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _hash_json(tokenizer.get_vocab()) if backend is None else _hash_text(backend.to_str())


def hashes_after_use(tokenizer: Any, limit: int | None) -> list[str]:
    """Return what `hash_as_it_is` is of a tokenizer whose last call cut nothing, and at `limit` tokens where there is
    one; the tokenizer stays as it is."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    backend = copy.deepcopy(backend)
    backend.no_truncation()
    backend.no_padding()
    found = [_hash_text(backend.to_str())]
    if limit is not None:
        backend.enable_truncation(max_length=limit, direction=tokenizer.truncation_side)
        found.append(_hash_text(backend.to_str()))
    return found


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: dict[str, Tensor]) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of tensors, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(uint8).numpy().tobytes())
    return digest.hexdigest()


def check_hash(what: str, found: str, expected: str) -> None:
    """Raise HashMismatch when the SHA-256 of `what` is not the expected one."""
    if found != expected:
        raise HashMismatch(
            f"backbone: {what} has SHA-256 {found}, expected {expected}; the weights were altered or are of "
            "another revision: fetch them again, or name the revision that the prior was fitted on"
        )


def _hash_json(content: Any) -> str:
    return _hash_text(json.dumps(content, sort_keys=True))


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
