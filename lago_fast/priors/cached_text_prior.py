"""A prior over text actions that keeps what it answered, and asks the exact prior only for what is new.

The key is the text of the whole question: instruction, observation and admissible actions in their order, with the
digest of the prior. Test: pytest tests/priors/test_cached_text_prior.py. Bench: bench/bench_text_prior.py
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lago_fast.errors import TrainablePrior, UnsupportedArgument
from lago_fast.priors.cache import CacheConfig, LatentCache, distinct
from lago_fast.priors.text_base import TextActionPrior, check_texts
from lago_fast.priors.text_keys import encoded, seed_of, text_keys

WIDTH = 16  # actions of a row of the cache; a question with more has several rows


class CachedTextPrior:
    """A frozen prior that answers each question once, and from memory or a file afterwards, bit for bit.

    Args:
        inner: the exact prior.
        config: of the cache; None: one gigabyte of memory and no file.

    Raises:
        TrainablePrior: `inner` is not frozen.
        UnsupportedArgument: a config that would round answers or keys; see `LatentCache`.
        CacheMismatch, CacheCorrupt, CacheFull, MissingExtra: see `cache_store.Store`.
    """

    def __init__(self, inner: TextActionPrior, config: CacheConfig | None = None) -> None:
        config = config or CacheConfig(row_format="float32")
        if config.row_format != "float32" or config.resolution is not None:
            raise UnsupportedArgument(
                f"config: row_format {config.row_format!r}, resolution {config.resolution}; answers over texts are "
                'kept exactly, give CacheConfig(row_format="float32") and no resolution'
            )
        if any(p.requires_grad for p in inner.parameters()):
            raise TrainablePrior("inner: a parameter requires a gradient; only a frozen prior's answers can be kept")
        self.inner = inner
        self._digest = inner.digest
        self._seed, self._further_seed = seed_of(self._digest), seed_of(f"{self._digest} further rows")
        # keys are made here, of texts: no observation of numbers is ever looked up
        self.cache = LatentCache(config, salt=self._digest, parts=[WIDTH], state_dim=1, instructions=())
        self._log = dict.fromkeys(("queries", "cache_hits", "first_sightings"), 0)

    @property
    def digest(self) -> str:
        """Return the inner prior's digest: its answers are kept as they are."""
        return self._digest

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return log-probabilities [B, A] float32 over each row's admissible actions, -inf where a row is padded.

        Raises, beside what the inner prior does:
            UnsupportedArgument: more new questions at once than the budget holds.
            CacheFull, CacheCorrupt: of the file.
        """
        widest = check_texts(instruction, observation, admissible)
        questions = zip(instruction, observation, admissible, strict=True)
        blocks = torch.tensor([-(-len(actions) // WIDTH) for actions in admissible], dtype=torch.int64)
        keys, owner, place = self._keys([encoded(i, o, *actions) for i, o, actions in questions], blocks)
        rows, found = self.cache.lookup_keys(keys)
        missed = owner[~found].unique()
        asked = 0
        if len(missed):
            # of several questions alike one is asked
            first, inverse = distinct(keys[(blocks.cumsum(0) - blocks)[missed]])
            asked = len(first)
            kept, starts = self._ask(missed[first], blocks, keys, (instruction, observation, admissible))
            number = torch.full((len(blocks),), -1).index_put_((missed,), inverse)[owner]
            there = number >= 0
            rows[there] = kept[starts[number[there]] + place[there]]
        self._log["queries"] += len(blocks)
        self._log["first_sightings"] += asked
        self._log["cache_hits"] += len(blocks) - asked
        answer = torch.full((len(blocks), -(-widest // WIDTH), WIDTH), -torch.inf, dtype=torch.float32)
        answer[owner, place] = rows
        return answer.flatten(1)[:, :widest]

    def telemetry(self) -> dict[str, float]:
        """Return the inner prior's figures; since the last call the questions, those that were new (each asked once
        of the inner prior) and the others; what is resident."""
        log, self._log = self._log, dict.fromkeys(self._log, 0)
        stats = self.cache.stats()
        found = {
            **self.inner.telemetry(),
            **{f"prior/{name}": float(count) for name, count in log.items()},
            "prior/cache_rows": float(stats["rows"]),
            "prior/cache_bytes": float(stats["bytes"]),
        }
        if log["queries"]:
            found["prior/cache_hit_rate"] = log["cache_hits"] / log["queries"]
        return found

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the inner prior."""
        return self.inner.parameters()

    def close(self) -> None:
        """Let go of the cache's file; the prior must not be queried afterwards."""
        self.cache.close()

    def _keys(self, texts: Sequence[bytes], blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return of every row of the questions its key [R, 2], its question [R] and its place within that [R]."""
        owner = torch.arange(len(texts)).repeat_interleave(blocks)
        place = torch.arange(len(owner)) - (blocks.cumsum(0) - blocks)[owner]
        keys = text_keys(texts, self._seed)[owner]
        further = place.nonzero().flatten()
        if len(further):
            names = torch.cat([keys[further], place[further, None]], dim=1).numpy()
            keys[further] = text_keys([name.tobytes() for name in names], self._further_seed)
        return keys.contiguous(), owner, place

    def _ask(
        self, which: Tensor, blocks: Tensor, keys: Tensor, columns: tuple[Sequence[Any], ...]
    ) -> tuple[Tensor, Tensor]:
        """Put distinct questions to the inner prior; return their rows as stored and where each one's begin."""
        numbers = which.tolist()
        instruction, observation, admissible = ([column[i] for i in numbers] for column in columns)
        answer = self.inner.query(instruction, observation, admissible).float().cpu()
        answer = nn.functional.pad(answer, (0, -answer.shape[1] % WIDTH), value=-torch.inf).view(len(answer), -1, WIDTH)
        own = blocks[which]
        starts = own.cumsum(0) - own
        number = torch.arange(len(which)).repeat_interleave(own)
        place = torch.arange(len(number)) - starts[number]
        first_rows = (blocks.cumsum(0) - blocks)[which]
        return self.cache.insert_keys(keys[first_rows[number] + place], answer[number, place]), starts
