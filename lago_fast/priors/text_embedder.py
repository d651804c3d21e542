"""Texts as vectors of a frozen sentence encoder, each text read once: trainers keep its number and gather its row.

The default is all-MiniLM-L6-v2, the mean over a text's tokens at length 1 (sentence-transformers, arXiv 1908.10084).
Test: pytest tests/priors/test_text_embedder.py. Bench: bench/bench_text_prior.py
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors.backbone import Backbone
from lago_fast.priors.cache_store import Store
from lago_fast.priors.folder import check_choice
from lago_fast.priors.hashes import hashes_after_use
from lago_fast.priors.locate import DEFAULT_BACKBONE
from lago_fast.priors.text_keys import encoded, seed_of, text_keys

FILE_BYTES = 1 << 36  # that the file never grows beyond
LongText = Literal["refuse", "cut"]


class TextEmbedder:
    """A table of texts' vectors that grows by the texts it has not seen.

    Args:
        backbone: a name for `find_backbone`, or a loaded one.
        path: a file that keeps the vectors from one process to the next; None: they are kept in memory only.
        long_texts: what becomes of a text with more tokens than the backbone reads: "refuse" it, or "cut" it after
            its first tokens, which is counted.
        batch_tokens: padded tokens of a forward pass.

    Attributes:
        texts: the text of each id.

    Raises what `find_backbone` and `cache_store.Store` do.
    """

    def __init__(
        self,
        backbone: str | Backbone = DEFAULT_BACKBONE,
        *,
        path: str | Path | None = None,
        long_texts: LongText = "refuse",
        batch_tokens: int = 512,
    ) -> None:
        check_choice("long_texts", long_texts, ("refuse", "cut"))
        if batch_tokens < 1:
            raise UnsupportedArgument(f"batch_tokens: {batch_tokens}; give at least 1")
        self.backbone = backbones.find_backbone(backbone) if isinstance(backbone, str) else backbone
        self.long_texts, self.batch_tokens = long_texts, batch_tokens
        # as the tokenizer was loaded, whatever it has been asked since
        self._digest = self._digest_with(self.backbone.loaded_tokenizer_sha256)
        self._seed = seed_of(self._digest)
        self._store: Store | None = None
        if path is not None:
            kept = {"salt": self._digest, "row_format": "float32", "parts": [self.width]}
            self._store = Store(path, kept, row_bytes=4 * self.width, file_bytes=FILE_BYTES)
        self.texts: list[str] = []
        self._ids: dict[str, int] = {}
        self._rows = torch.empty(0, self.width)
        self._growing = threading.Lock()
        self._log = dict.fromkeys(("asked", "read", "file_hits", "cut"), 0)

    @property
    def width(self) -> int:
        """Return Z, the length of a vector."""
        return self.backbone.hidden_size

    @property
    def digest(self) -> str:
        """Return the SHA-256 of everything that can change a vector: weights, tokenizer, pooling, long texts."""
        return self._digest

    def earlier_digests(self) -> list[str]:
        """Return what the digest was when it depended on how the tokenizer had been called before."""
        return [self._digest_with(used) for used in hashes_after_use(self.backbone.tokenizer, self.backbone.max_tokens)]

    def _digest_with(self, tokenizer: str) -> str:
        about: dict[str, Any] = {
            "backbone": self.backbone.sha256,
            "tokenizer": tokenizer,
            "kind": self.backbone.kind,
            "long_texts": self.long_texts,
        }
        if self.long_texts == "cut":
            about |= {"max_tokens": self.backbone.max_tokens, "cut": self.backbone.tokenizer.truncation_side}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    @property
    def table(self) -> Tensor:
        """Return the vectors of all ids so far, [M, Z] float32; later texts are in a later table."""
        return self._rows[: len(self.texts)]

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return the id of each text, [B] int64: the same one in this process for good, a new one for a new text.

        Raises UnsupportedArgument for a text without tokens, or longer than the backbone reads and not to be cut.
        """
        found = list(map(self._ids.get, texts))
        self._log["asked"] += len(found)
        if None in found:
            with self._growing:
                self._add([text for text in dict.fromkeys(texts) if text not in self._ids])
            found = list(map(self._ids.get, texts))
        return torch.tensor(found, dtype=torch.int64)

    def rows(self, ids: Tensor) -> Tensor:
        """Return the vectors of ids [B] int64 of any shape, [B, Z] float32.

        Raises UnsupportedArgument for a number that is no id.
        """
        try:
            return nn.functional.embedding(ids, self.table)
        except IndexError as error:
            raise UnsupportedArgument(
                f"ids: outside of 0..{len(self.texts) - 1}, the texts of this process; ask for them with ids(texts)"
            ) from error

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return one vector per text, [B, Z] float32, without gradients; raises as `ids` does."""
        return self.rows(self.ids(texts))

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the backbone, all of them frozen."""
        return self.backbone.model.parameters()

    def telemetry(self) -> dict[str, float]:
        """Return counts since the last call, of texts: asked for, read by the backbone, found in the file, cut; and
        how many there are in all."""
        log, self._log = self._log, dict.fromkeys(self._log, 0)
        return {
            **{f"text/{name}": float(count) for name, count in log.items()},
            "text/distinct": float(len(self.texts)),
        }

    def close(self) -> None:
        """Let go of the file; no new text may be asked for afterwards."""
        if self._store is not None:
            self._store.close()

    def _add(self, fresh: list[str]) -> None:
        """Append texts that are not in the table."""
        if not fresh:
            return
        rows = self._read(fresh) if self._store is None else self._kept(self._store, fresh)
        start, stop = len(self.texts), len(self.texts) + len(fresh)
        if stop > len(self._rows):
            # doubled, so that a text is copied twice at most on average
            grown = torch.empty(max(stop, 2 * start, 1024), self.width)
            grown[:start] = self._rows[:start]
            self._rows = grown
        self._rows[start:stop] = rows
        self.texts.extend(fresh)
        # last: whoever finds an id without the lock finds its row
        self._ids.update(zip(fresh, range(start, stop), strict=True))

    def _kept(self, store: Store, fresh: list[str]) -> Tensor:
        """Return the vectors in the file, once those that it lacks are read and written."""
        keys = text_keys([encoded(text) for text in fresh], self._seed)
        there, stored = store.get(keys)
        self._log["file_hits"] += len(there)
        lacking = torch.ones(len(fresh), dtype=torch.bool).index_fill_(0, there, False).nonzero().flatten()
        rows = torch.empty(len(fresh), self.width)
        rows[there] = stored.view(torch.float32)
        if len(lacking):
            read = self._read([fresh[i] for i in lacking.tolist()])
            # another process may have been faster, and its vectors hold
            rows[lacking] = store.put(keys[lacking].contiguous(), read.view(torch.uint8)).view(torch.float32)
        return rows

    def _read(self, texts: list[str]) -> Tensor:
        """Return the backbone's vectors [n, Z], similar lengths together."""
        tokens = self._tokens(texts)
        order = sorted(range(len(texts)), key=lambda i: len(tokens[i]))
        rows = torch.empty(len(texts), self.width)
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and len(tokens[order[stop]]) * (stop + 1 - start) <= self.batch_tokens:
                stop += 1
            part = order[start:stop]
            rows[part] = backbones.pool(self.backbone, *backbones.pad_right([tokens[i] for i in part])).cpu()
            start = stop
        bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if bad:
            raise NonFiniteError(f"texts: the backbone's vector of {texts[bad[0]][:40]!r} is NaN or infinite")
        self._log["read"] += len(texts)
        return rows

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        tokenizer, limit = self.backbone.tokenizer, self.backbone.max_tokens
        # a warning about long texts would say what is said or counted here
        tokens = tokenizer(texts, add_special_tokens=True, verbose=False)["input_ids"]
        for text, row in zip(texts, tokens, strict=True):
            if not row:
                raise UnsupportedArgument(f"texts: {text!r} has no tokens; leave it out, or say so in words")
            if limit is not None and len(row) > limit and self.long_texts == "refuse":
                raise UnsupportedArgument(
                    f"texts: {text[:40]!r}... has {len(row)} tokens, the backbone reads at most {limit}; shorten it, "
                    'or pass long_texts="cut"'
                )
        long = [i for i, row in enumerate(tokens) if limit is not None and len(row) > limit]
        for i in long:
            tokens[i] = tokenizer(texts[i], truncation=True, max_length=limit)["input_ids"]
        self._log["cut"] += len(long)
        return tokens
