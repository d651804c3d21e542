"""An instruction read once: its keys and values, shared by every state that follows it.

In a causal decoder, and in an encoder with prefix attention, the instruction's keys and values do not depend on the
state behind it. They are kept per instruction, and a query runs the transformer on one token per state. Each layer
gathers the rows that its batch asks for and drops them again, so that mixed instructions need one pass and no more
than one layer's copy.
Test: pytest tests/priors/test_prefix.py
"""

import inspect
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.backbone import Backbone, first_position
from lago_fast.priors.config import PriorConfig

# largest distance between a latent and its full recompute, as a share of its length: far above rounding, far
# below what a wrong position or mask makes
TOLERANCE, TOLERANCE_LOW_PRECISION = 1e-3, 0.1


class PrefixKV(NamedTuple):
    keys: list[Tensor]  # per layer [M, heads, L + 1, width]; there is room for the state's own behind the text's
    values: list[Tensor]
    lengths: Tensor  # [M] int64
    first: int  # position of a text's first token, as the transformer counts


def read_whole(
    transformer: Any, words: Tensor, lengths: Tensor, state_token: Tensor, *, one_way: bool = False
) -> Tensor:
    """Return the latents [B, Z] of states that follow their texts, all tokens read.

    Args:
        transformer: takes `inputs_embeds`.
        words: [B, L, Z] embedded texts, padded on the right.
        lengths: [B] int64, tokens of each text.
        state_token: [B, Z].
        one_way: let no token of a text see the state.
    """
    rows, longest = torch.arange(len(words), device=words.device), words.shape[1]
    sequence = torch.cat([words, words.new_zeros(len(words), 1, words.shape[2])], dim=1)
    # the state follows its own text, and the padding follows the state: positions are as without padding
    sequence = sequence.index_put((rows, lengths), state_token.to(words.dtype))
    place = torch.arange(longest + 1, device=words.device)
    mask = None
    if one_way:
        itself = torch.eye(longest + 1, dtype=torch.bool, device=words.device)
        mask = additive((place < lengths[:, None])[:, None] | itself, words.dtype)  # of [B, L + 1, L + 1]
    elif longest > 1:  # one token is never padding
        mask = (place <= lengths[:, None]).long()
    return transformer(inputs_embeds=sequence, attention_mask=mask).last_hidden_state[rows, lengths]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask [B, 1, queries, keys] that transformers takes as it is, of what is seen: [B, queries, keys]."""
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]


def is_wanted(asked: bool | None, config: PriorConfig, backbone: Backbone) -> bool:
    """Return whether keys and values are kept; UnsupportedArgument where that is asked for and cannot be."""
    one_way = config.attention == "prefix"
    if one_way and backbone.kind == "decoder":
        raise UnsupportedArgument('attention: a decoder\'s text never sees what follows it; leave attention="own"')
    if one_way and asked is False:
        raise UnsupportedArgument('prefix_kv: attention="prefix" is for kept keys and values; leave prefix_kv=None')
    possible = one_way or (config.form == "prompt" and backbone.kind == "decoder")
    if asked and not possible:
        raise UnsupportedArgument(
            f"prefix_kv: a {config.form!r} prior on an {backbone.kind} has no prefix that states could share; only "
            'the "prompt" form on a causal decoder has, or attention="prefix" on an encoder; leave prefix_kv=None'
        )
    wanted = possible if asked is None else asked
    if wanted:
        check_supported(backbone.model, one_way)
    return wanted


def version(*tensors: Tensor) -> list[tuple[Any, ...]]:
    """Return what differs as soon as one of the tensors was written to, moved or replaced."""
    return [(id(t), t.device, t.dtype, 0 if t.is_inference() else t._version) for t in tensors]


def stay(config: PriorConfig) -> bool:
    """Return whether a fit trains nothing that an instruction's keys and values are made of."""
    return config.finetune == "frozen" and (config.form == "prompt" or not config.instruction_adapter)


def check_supported(transformer: Any, one_way: bool = False) -> None:
    """Raise UnsupportedArgument when a transformer keeps no keys and values, or lets no one choose positions."""
    taken = _parameters(transformer)
    missing = [name for name in (cache_name(transformer), "position_ids") if name not in taken]
    if missing:
        raise UnsupportedArgument(
            f"prefix_kv: {type(transformer).__name__} takes no {' and no '.join(missing)}; {_way_out(one_way)}, or "
            "choose another model where nothing else can be asked for"
        )


def _way_out(one_way: bool) -> str:
    return 'leave attention="own"' if one_way else "pass prefix_kv=False"


def _parameters(transformer: Any) -> Any:
    # peft's forward takes anything
    inner = transformer.get_base_model() if hasattr(transformer, "get_base_model") else transformer
    return inspect.signature(inner.forward).parameters


def cache_name(transformer: Any) -> str:
    """Return what a transformer calls its keys and values: "cache" since transformers 5.24."""
    return "cache" if "cache" in _parameters(transformer) else "past_key_values"


@torch.no_grad()
def build(transformer: Any, words: Tensor, lengths: Tensor, rows: int, *, one_way: bool = False) -> PrefixKV:
    """Read the instructions and keep their keys and values.

    Args:
        transformer: in evaluation mode.
        words: [M, L, Z] embedded texts, padded on the right.
        lengths: [M] int64.
        rows: instructions per forward pass.
        one_way: the transformer is an encoder whose texts are not to see the state.

    Raises UnsupportedArgument when the answers would not be those of the full recompute.
    """
    from transformers.cache_utils import DynamicCache

    parts = []
    for part, part_lengths in zip(words.split(rows), lengths.split(rows), strict=True):
        kept = DynamicCache()
        mask = torch.arange(words.shape[1], device=words.device) < part_lengths[:, None]
        transformer(inputs_embeds=part, attention_mask=mask.long(), **{cache_name(transformer): kept})
        parts.append(kept.layers)
    keys, values = (
        [_with_room([getattr(layer, name) for layer in layers]) for layers in zip(*parts, strict=True)]
        for name in ("keys", "values")
    )
    prefix = PrefixKV(keys, values, lengths, first_position(transformer))
    _check(transformer, prefix, words, one_way)
    return prefix


def read_state(
    transformer: Any, prefix: PrefixKV, state_token: Tensor, instruction_id: Tensor, *, static: bool = False
) -> Tensor:
    """Return the latents [B, Z] of states that follow their instructions, one token read per state.

    Args:
        transformer: what `prefix` was built with.
        prefix: of all instructions.
        state_token: [B, Z].
        instruction_id: [B] int64.
        static: let no shape depend on a value: every text is padded to the longest of all, and nothing waits for
            the device, so that the pass can be captured as a graph.
    """
    from transformers.cache_utils import Cache

    lengths = prefix.lengths[instruction_id]
    longest = prefix.keys[0].shape[2] - 1 if static else int(lengths.max())
    layer, dtype = layer_type(), prefix.keys[0].dtype
    layers = [
        layer(k[:, :, : longest + 1], v[:, :, : longest + 1], instruction_id)
        for k, v in zip(prefix.keys, prefix.values, strict=True)
    ]
    mask = None
    if static or int(lengths.min()) < longest:  # attention without a mask is faster
        place = torch.arange(longest + 1, device=lengths.device)
        mask = additive(((place < lengths[:, None]) | (place == longest))[:, None], dtype)
    return transformer(
        inputs_embeds=state_token[:, None].to(dtype),
        attention_mask=mask,
        position_ids=prefix.first + lengths[:, None],
        **{cache_name(transformer): Cache(layers=layers)},
    ).last_hidden_state[:, 0]


def _with_room(parts: list[Tensor]) -> Tensor:
    whole = torch.cat(parts)
    return torch.cat([whole, whole.new_zeros(*whole.shape[:2], 1, whole.shape[3])], dim=2)


def _check(transformer: Any, prefix: PrefixKV, words: Tensor, one_way: bool) -> None:
    """Compare the shortest and the longest instruction with their full recompute."""
    ids = torch.stack([prefix.lengths.argmin(), prefix.lengths.argmax()])
    state_token = words[ids, 0]  # any token will do
    whole = read_whole(transformer, words[ids], prefix.lengths[ids], state_token, one_way=one_way)
    off = (read_state(transformer, prefix, state_token, ids) - whole).norm(dim=-1) / whole.norm(dim=-1)
    exact = all(p.dtype == torch.float32 for p in transformer.parameters())
    if not bool((off <= (TOLERANCE if exact else TOLERANCE_LOW_PRECISION)).all()):
        raise UnsupportedArgument(
            f"prefix_kv: with kept keys and values {type(transformer).__name__} is {float(off.max()):.1%} off the "
            f"full recompute; {_way_out(one_way)}"
        )


@cache
def layer_type() -> Any:
    """Return the class of one layer's kept keys and values, which transformers calls as its own."""
    from transformers.cache_utils import DynamicLayer

    class SharedPrefix(DynamicLayer):
        """One layer's keys and values of all instructions, gathered for a batch and never grown.

        `room` tokens of the batch's own have their places at the end.
        """

        keys: Tensor
        values: Tensor

        def __init__(self, keys: Tensor, values: Tensor, instruction_id: Tensor, room: int = 1) -> None:
            super().__init__()
            self.keys, self.values, self.instruction_id, self.room = keys, values, instruction_id, room
            self.is_initialized = True

        def get_seq_length(self, *_: Any) -> int:
            """Return how many tokens came before the batch's own."""
            return self.keys.shape[-2] - self.room

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            """Return the keys and values [B, heads, L + room, width] of a batch, its own tokens' at the end."""
            keys, values = self.keys[self.instruction_id], self.values[self.instruction_id]
            keys[:, :, -self.room :], values[:, :, -self.room :] = key_states, value_states
            return keys, values

    return SharedPrefix
