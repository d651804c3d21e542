"""A prior that keeps what the exact one answered, and asks it only for what is new.

It helps where states come again: text states, repeated starts, epochs over demonstrations, keys rounded to a
resolution. Raw continuous states hardly ever come again: their hit rate is near zero.
Test: pytest tests/priors/test_cache.py. Bench: bench/bench_latent_cache.py
"""

import hashlib
import json
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import ActionPrior, Kind, PriorOutput, check_frozen, check_query, prior_kl
from lago_fast.priors.cache import CacheConfig, LatentCache, distinct


class CachedPrior:
    """A frozen prior that keeps its exact answers, and asks for each only once.

    Every row is answered as stored, the first time too: a second run answers what the first did, bit for bit,
    unless rows were evicted. With a resolution the inner prior is asked at the middle of a key's cell, so that the
    answer does not depend on who came first.

    Args:
        inner: the exact prior.
        config: of the cache.
        keep_latent: whether the latent is cached and answered too.

    Raises:
        TrainablePrior: `inner` is not frozen.
        UnsupportedArgument: `inner` learns while it answers, or has no latent to keep; see LatentCache.
        CacheMismatch, CacheCorrupt, CacheFull, MissingExtra: see `cache_store.Store`.
    """

    def __init__(self, inner: ActionPrior, config: CacheConfig | None = None, *, keep_latent: bool = False) -> None:
        check_frozen(inner)
        if getattr(inner, "mode", "exact") == "amortised":
            raise UnsupportedArgument("inner: an amortised prior learns while it answers; cache its exact prior")
        self.inner, self.config, self.keep_latent = inner, config or CacheConfig(), keep_latent
        self._lossy = self.config.row_format != "float32"
        self._generator = torch.Generator().manual_seed(0)
        self._lock = threading.Lock()
        # rows; the first answers are measured
        self._kl_due = float(self.config.kl_rows) if self.config.kl_share else 0.0
        self._log = dict.fromkeys(("rows", "asked", "kl_sum", "kl_rows"), 0.0)
        self._bind()

    def _bind(self) -> None:
        """Make the cache of the inner prior as it is now."""
        self._texts = list(self.inner.instructions)
        self._inner_digest = self.inner.digest
        if not self._texts:
            raise PriorMismatch("inner: a prior without instructions answers nothing; fit it with its texts")
        one = self.inner.query(torch.zeros(1, self.state_dim), torch.zeros(1, dtype=torch.int64))
        if self.keep_latent and one.latent is None:
            raise UnsupportedArgument("keep_latent: this prior answers without a latent; leave it False")
        kept = {name: column for name, column in self._kept(one)._asdict().items() if column is not None}
        self._fields, self._device = tuple(kept), next(iter(kept.values())).device
        self._widths = [1 if column.ndim == 1 else column.shape[1] for column in kept.values()]
        self.cache = LatentCache(
            self.config,
            salt=json.dumps([self._inner_digest, self._fields]),
            parts=self._widths,
            state_dim=self.state_dim,
            instructions=self._texts,
        )

    # what the contract names

    @property
    def kind(self) -> Kind:
        """Return "gaussian" or "categorical"."""
        return self.inner.kind

    @property
    def state_dim(self) -> int:
        """Return S, the width of a raw state."""
        return self.inner.state_dim

    @property
    def action_dim(self) -> int:
        """Return D of a Gaussian, A of a categorical."""
        return self.inner.action_dim

    @property
    def instructions(self) -> list[str]:
        """Return the texts that an instruction id indexes."""
        return self.inner.instructions

    @property
    def digest(self) -> str:
        """Return the inner prior's digest where its answers are kept as they are, else one of what changes them."""
        if not self._lossy and self.config.resolution is None:
            return self._inner_digest
        about = json.dumps([self._inner_digest, self.config.row_format, self.config.resolution])
        return hashlib.sha256(about.encode()).hexdigest()

    def instruction_table(self) -> Tensor:
        """Return the instruction latents [M, Z] float32 of the inner prior."""
        return self.inner.instruction_table()

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the inner prior."""
        return self.inner.parameters()

    def telemetry(self) -> dict[str, float]:
        """Return the inner prior's figures, what is resident, and of the rows since the last call the share that
        the inner prior was not asked for and, with a resolution, the mean KL(given || exact) of a sample."""
        with self._lock:
            log, self._log = self._log, dict.fromkeys(self._log, 0.0)
        stats = self.cache.stats()
        found = {
            **self.inner.telemetry(),
            "prior/cache_rows": float(stats["rows"]),
            "prior/cache_bytes": float(stats["bytes"]),
        }
        if log["rows"]:
            found["prior/cache_hit_rate"] = 1 - log["asked"] / log["rows"]
        if log["kl_rows"]:
            found["prior/cache_kl_nats"] = log["kl_sum"] / log["kl_rows"]
        return found

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Answer for raw states [B, S] float32 and instruction ids [B] int64, on the inner prior's device.

        Raises:
            PriorMismatch, NonFiniteError: as the inner prior does; PriorMismatch when it was given texts since.
            UnsupportedArgument: more new rows at once than the budget holds.
            CacheFull, CacheCorrupt: of the file.
        """
        check_query(self, state, instruction_id)
        if len(self.inner.instructions) != len(self._texts):
            raise PriorMismatch("inner: it was given texts since; give them to the cached prior's extend_instructions")
        keys = self.cache.keys(state, instruction_id)
        rows, hit = self.cache.lookup_keys(keys)
        missed = (~hit).nonzero().flatten()
        if len(missed):
            first, inverse = distinct(keys[missed])
            ask = missed[first]
            answer = self.inner.query(self._representative(state[ask]), instruction_id[ask])
            rows[missed] = self.cache.insert_keys(keys[ask], self._pack(answer, len(ask)))[inverse]
            missed = ask
        answer = self._unpack(rows)
        with self._lock:
            self._log["rows"] += len(state)
            self._log["asked"] += len(missed)
        if self.config.resolution is not None:
            self._measure(state, instruction_id, answer)
        return answer

    def extend_instructions(self, texts: Sequence[str]) -> None:
        """Add texts to the inner prior; its digest changes, and the cache starts again.

        Raises UnsupportedArgument when the cache has a file, which is of the prior as it was.
        """
        if self.config.path is not None and set(texts) - set(self._texts):
            raise UnsupportedArgument("texts: the file is of the prior without them; extend it before caching it")
        self.inner.extend_instructions(texts)  # type: ignore[attr-defined] # beyond the contract, as in fit_prior's
        self._bind()

    def close(self) -> None:
        """Let go of the cache's file; the prior must not be queried afterwards."""
        self.cache.close()

    # rows

    def _kept(self, answer: PriorOutput) -> PriorOutput:
        return answer if self.keep_latent else answer._replace(latent=None)

    def _pack(self, answer: PriorOutput, rows: int) -> Tensor:
        columns = []
        for name, width in zip(self._fields, self._widths, strict=True):
            column = getattr(answer, name)
            if column.numel() != rows * width:
                raise PriorMismatch(
                    f"prior: its {name} has shape {list(column.shape)} for {rows} rows of {width}; an answer says each "
                    "row's own"
                )
            columns.append(column.detach().float().cpu().reshape(rows, width))
        return torch.cat(columns, dim=1)

    def _unpack(self, rows: Tensor) -> PriorOutput:
        parts = dict(zip(self._fields, rows.to(self._device).split(self._widths, dim=1), strict=True))
        if self._lossy and "log_probs" in parts:
            parts["log_probs"] = parts["log_probs"].log_softmax(dim=1)
        if "trust" in parts:
            parts["trust"] = parts["trust"].flatten()
        return PriorOutput(**parts)

    def _representative(self, state: Tensor) -> Tensor:
        """Return the observation in the middle of each row's cell."""
        if self.config.resolution is None:
            return state
        return ((state.double() / self.config.resolution).round() * self.config.resolution).float()

    def _measure(self, state: Tensor, ids: Tensor, given: PriorOutput) -> None:
        """Put a sample of the rows to the exact prior, once enough are due."""
        with self._lock:
            self._kl_due += len(state) * self.config.kl_share
            if self._kl_due < self.config.kl_rows or not len(state):
                return
            pick = torch.randperm(len(state), generator=self._generator)[: int(self._kl_due)]
            self._kl_due -= len(pick)
        exact = self.inner.query(state[pick], ids[pick])
        rows = PriorOutput(*(None if column is None else column[pick] for column in given))
        kl = prior_kl(rows, exact)
        with self._lock:
            self._log["kl_sum"] += float(kl.sum())
            self._log["kl_rows"] += len(kl)
