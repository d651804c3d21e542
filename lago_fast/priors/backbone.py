"""Loading a pretrained transformer, checking its weights, and encoding instructions with it.

Only safetensors are read and no remote code is run.
Pooling: the mean over an encoder's tokens, as in sentence-transformers (arXiv 1908.10084).
Test: pytest tests/priors/test_backbone.py
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lago_fast.errors import BackboneUnavailable, HashMismatch, LagoError, UnsupportedArgument
from lago_fast.priors.hashes import check_hash, hash_as_it_is, hash_config, hash_tensors, hash_tokenizer, hash_weights
from lago_fast.priors.locate import DEFAULT_BACKBONE, Source, locate

logger = logging.getLogger(__name__)

DEFAULT_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
BESIDE_WEIGHTS = ("config_sha256", "tokenizer_sha256")
MOST_NAMED = 3  # missing weights in an error message


@dataclass(frozen=True)
class Backbone:
    """A pretrained transformer in memory, with what is needed to name it again."""

    name: str  # as it was asked for
    source: Source
    revision: str  # commit on the hub, version of the package, "" of a local folder
    sha256: str  # of the weights; of the drawn weights when random_init
    random_init: bool
    seed: int  # of the draw; 0 when pretrained
    kind: Literal["encoder", "decoder"]
    hidden_size: int
    max_tokens: int | None  # longest sequence that it reads; None: any length
    model: Any  # of an encoder-decoder the encoder
    tokenizer: Any
    config_sha256: str = ""  # as the next two, "" of an outline
    tokenizer_sha256: str = ""
    loaded_tokenizer_sha256: str = ""  # with what its file says of cutting and padding, before any call changed that

    def reference(self) -> dict[str, Any]:
        """Return what a prior's folder records so that `find_reference` finds the same model again."""
        names = ("name", "source", "revision", "sha256", "random_init", "seed", "kind", "hidden_size", *BESIDE_WEIGHTS)
        return {name: getattr(self, name) for name in names}


def find_backbone(
    name: str = DEFAULT_BACKBONE,
    *,
    revision: str = "",
    random_init: bool = False,
    seed: int = 0,
    expected_sha256: str = "",
    before_weights: Callable[[Backbone], object] | None = None,
) -> Backbone:
    """Load a transformer and its tokenizer, with the weights checked.

    Args:
        name: a local folder or a hub id.
        revision: hub commit or branch; "" takes the default branch.
        random_init: keep architecture and tokenizer, draw the weights afresh (a control, recorded as such).
        seed: of that draw.
        expected_sha256: refuse other weights; "" accepts any, but the default backbone's hash is known.
        before_weights: called before weights are fetched or read, with the backbone's outline: its model is on the
            meta device, which has no numbers. What it raises ends the loading.

    Raises:
        BackboneUnavailable: neither folder, hub nor package has it.
        HashMismatch: the weights are not the expected ones.
        UnsupportedArgument: an architecture that reads no `inputs_embeds` of the width of its hidden states.
    """
    folder, source, found_revision = locate(name, revision, weights=before_weights is None and not random_init)
    if before_weights is not None:
        before_weights(_outline(name, folder, source, found_revision, random_init, seed))
        if source == "hub" and not random_init:
            folder, source, found_revision = locate(name, revision, weights=True)
    if not random_init:
        sha256 = hash_weights(folder)
        expected = expected_sha256 or (DEFAULT_SHA256 if name == DEFAULT_BACKBONE else sha256)
        check_hash(str(folder), sha256, expected)
    model, tokenizer = _load(folder, random_init, seed)
    if random_init:
        sha256 = hash_tensors(model.state_dict())
        check_hash(f"the weights drawn with seed {seed}", sha256, expected_sha256 or sha256)
    what = "random weights, architecture" if random_init else "weights"
    _say_once(f"backbone {name}: {what} from {source} ({folder})")
    return replace(
        _backbone(name, source, found_revision, sha256, random_init, seed, model, tokenizer),
        config_sha256=hash_config(folder),
        tokenizer_sha256=hash_tokenizer(tokenizer),
        loaded_tokenizer_sha256=hash_as_it_is(tokenizer),
    )


def _outline(name: str, folder: Path, source: Source, revision: str, random_init: bool, seed: int) -> Backbone:
    """Return a folder's backbone without its weights."""
    from transformers import AutoModel

    with reading(folder):
        config, tokenizer = _read_config(folder)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return _backbone(name, source, revision, "", random_init, seed, _asked_part(folder, model), tokenizer)


def _backbone(
    name: str, source: Source, revision: str, sha256: str, random_init: bool, seed: int, model: Any, tokenizer: Any
) -> Backbone:
    return Backbone(
        name=name,
        source=source,
        revision=revision,
        sha256=sha256,
        random_init=random_init,
        seed=seed if random_init else 0,
        kind=kind_of(model.config),
        hidden_size=int(model.config.hidden_size),
        max_tokens=max_tokens_of(model, tokenizer),
        model=model,
        tokenizer=tokenizer,
    )


def find_reference(reference: Mapping[str, Any], name: str = "") -> Backbone:
    """Load the recorded backbone, from `name` when it has moved; HashMismatch when it is another."""
    found = find_backbone(
        name or reference["name"],
        revision=reference["revision"] if reference["source"] == "hub" else "",
        random_init=reference["random_init"],
        seed=reference["seed"],
        expected_sha256=reference["sha256"],
    )
    check_beside_weights(found, reference)
    return found


def check_beside_weights(backbone: Backbone, reference: Mapping[str, Any]) -> None:
    """Raise HashMismatch when configuration or tokenizer are not the recorded ones, where they were recorded."""
    for name in BESIDE_WEIGHTS:
        if reference.get(name, "") not in ("", getattr(backbone, name)):
            what = name.removesuffix("_sha256")
            raise HashMismatch(
                f"backbone: the {what} of {backbone.name} has SHA-256 {getattr(backbone, name)}, expected "
                f"{reference[name]}; it was altered or is of another revision: fetch the model again, or fit a prior "
                f"with this {what}"
            )


def encode_instructions(
    instructions: Sequence[str], backbone: Backbone | str = DEFAULT_BACKBONE, *, batch_size: int = 64
) -> Tensor:
    """Return one latent of length 1 per instruction, float32 [M, Z].

    Args:
        instructions: M texts.
        backbone: a loaded one, or a name for `find_backbone`.
        batch_size: texts per forward pass.

    Encoder: mean of the last hidden states over the text's tokens. Decoder: the last token's hidden state.
    """
    if isinstance(backbone, str):
        backbone = find_backbone(backbone)
    if not instructions:
        raise UnsupportedArgument("instructions: empty; give at least one text")
    rows = []
    for start in range(0, len(instructions), batch_size):
        rows.append(pool(backbone, *tokenise(backbone, instructions[start : start + batch_size])))
    return torch.cat(rows)


@torch.no_grad()
def pool(backbone: Backbone, tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return one latent of length 1 per text, float32 [m, Z], of token ids [m, L] and lengths [m] of `tokenise`."""
    device = next(backbone.model.parameters()).device
    tokens, lengths = tokens.to(device), lengths.to(device)
    mask = torch.arange(tokens.shape[1], device=device) < lengths[:, None]  # [m, L]
    hidden = backbone.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    if backbone.kind == "encoder":
        pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
    else:
        pooled = hidden[torch.arange(len(hidden), device=device), lengths - 1]
    return nn.functional.normalize(pooled.float(), dim=-1)


def tokenise(backbone: Backbone, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return token ids [m, L] int64, padded with 0 on the right, and lengths [m] int64.

    Raises UnsupportedArgument for a text with no tokens, or too long to leave a place for the state token.
    """
    ids = [list(backbone.tokenizer(text)["input_ids"]) for text in texts]
    limit = backbone.max_tokens
    for text, row in zip(texts, ids, strict=True):
        if not row:
            raise UnsupportedArgument(f"instructions: {text!r} has no tokens; write a sentence")
        if limit is not None and len(row) >= limit:
            raise UnsupportedArgument(
                f"instructions: {text[:40]!r}... has {len(row)} tokens, the backbone reads at most {limit} "
                "with the state's; shorten it"
            )
    return pad_right(ids)


def pad_right(ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return rows of token ids as [m, L] int64, padded with 0 on the right, and their lengths [m] int64."""
    lengths = torch.tensor([len(row) for row in ids])
    tokens = torch.zeros(len(ids), int(lengths.max()), dtype=torch.int64)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = torch.tensor(row)
    return tokens, lengths


def keep_layers(model: Any, layers: int) -> None:
    """Cut a transformer down to its first `layers` layers, in place.

    Raises UnsupportedArgument when the model has fewer, or no recognisable stack of layers.
    """
    total = int(model.config.num_hidden_layers)
    if not 1 <= layers <= total:
        raise UnsupportedArgument(f"layers: {layers}, but the backbone has 1 to {total}")
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == total}
    # a layer may be a list of as many parts itself
    stacks = [m for n, m in lists.items() if not any(n.startswith(f"{outer}.") for outer in lists)]
    if len(stacks) != 1:
        raise UnsupportedArgument("layers: this architecture has no single stack of layers; leave layers=None")
    del stacks[0][layers:]
    model.config.num_hidden_layers = layers


def _load(folder: Path, random_init: bool, seed: int) -> tuple[Any, Any]:
    """Return (model in eval mode and without gradients, tokenizer) of a folder."""
    from transformers import AutoModel

    missing: set[str] = set()
    with reading(folder):
        config, tokenizer = _read_config(folder)
        if random_init:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)
        else:
            model, about = AutoModel.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
            missing = set(about["missing_keys"])
    # what no query reads may be missing; anything else would be drawn at random, differently each time
    unread = ("pooler.", "decoder.") if config.is_encoder_decoder else ("pooler.",)
    lacking = sorted(key for key in missing if not key.startswith(unread))
    if lacking:
        raise BackboneUnavailable(
            f"backbone: {folder} is without the weights {', '.join(lacking[:MOST_NAMED])}"
            f"{' and others' if len(lacking) > MOST_NAMED else ''}; fetch it again, or choose another"
        )
    return _asked_part(folder, model).eval().requires_grad_(False), tokenizer


def _read_config(folder: Path) -> tuple[Any, Any]:
    """Return configuration and tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    config.use_cache = False  # one pass reads it all: a decoder's keys and values would be kept for nothing
    return config, AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def _asked_part(folder: Path, model: Any) -> Any:
    """Return what queries run of a model; UnsupportedArgument where it can read no state token."""
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    if "inputs_embeds" not in inspect.signature(model.forward).parameters:
        raise UnsupportedArgument(f"backbone: {folder} takes no inputs_embeds, so no state token; choose another")
    width, hidden = model.get_input_embeddings().weight.shape[1], model.config.hidden_size
    if width != hidden:
        raise UnsupportedArgument(
            f"backbone: {folder} has word embeddings of {width} numbers and hidden states of {hidden}; "
            "a state token needs one width, choose another"
        )
    return model


@contextmanager
def reading(folder: Path, what: str = "backbone") -> Iterator[None]:
    """Let transformers read a folder quietly; what it raises at a damaged one becomes BackboneUnavailable."""
    try:
        with quietly():
            yield
    except (LagoError, MemoryError):
        raise
    except Exception as error:  # tokenizers raises no other class, safetensors and huggingface_hub some of their own
        raise BackboneUnavailable(
            f"{what}: {folder} cannot be loaded ({type(error).__name__}: {error}); fetch it again: config.json, "
            "tokenizer and all of its safetensors"
        ) from error


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers load a model without bars, and without reports of heads that are left out as if at fault."""
    import transformers

    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def max_tokens_of(model: Any, tokenizer: Any) -> int | None:
    """Return the longest sequence of a model with absolute or rotary positions; None where it names no limit."""
    positions = getattr(model.config, "max_position_embeddings", None)
    # a tokenizer may be for less, and of relative positions none decides
    return None if positions is None else min(int(positions) - first_position(model), int(tokenizer.model_max_length))


def first_position(transformer: Any) -> int:
    """Return 0, or the number behind that of the padding's position where there is one: RoBERTa counts from there."""
    tables = [module for name, module in transformer.named_modules() if name.endswith("position_embeddings")]
    return 1 + tables[0].padding_idx if tables and getattr(tables[0], "padding_idx", None) is not None else 0


def kind_of(config: Any) -> Literal["encoder", "decoder"]:
    """Tell a bidirectional encoder from a causal decoder by what transformers can build on it."""
    from transformers.models.auto import modeling_auto

    if config.is_encoder_decoder:
        return "encoder"
    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return "decoder" if causal and not masked else "encoder"


_SAID: set[str] = set()


def _say_once(message: str) -> None:
    if message not in _SAID:
        _SAID.add(message)
        logger.info(message)
