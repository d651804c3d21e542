"""How a training asks its prior: options of `lago train` besides the prior's folder."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Literal

from lago_fast.cli import inputs
from lago_fast.cli.command import by_default
from lago_fast.errors import UnsupportedArgument

if TYPE_CHECKING:
    from lago_fast.priors.cached_prior import CachedPrior


@dataclass(frozen=True)
class PriorOptions:
    """A cache of the prior's answers, and what is asked of a quantized one."""

    prior_cache: Annotated[str | None, by_default("none")] = None
    """Keep the exact prior's answers for states that come again: memory, or a file that later runs find them in."""
    prior_cache_bytes: int = 1 << 30
    """Memory for kept answers; those that were not found for longest make room."""
    prior_cache_format: Literal["float32", "float16", "int8"] = "float16"
    """Of a kept answer."""
    prior_cache_resolution: Annotated[float | None, by_default("none: every bit of a state counts")] = None
    """States that round to the same multiples of it are one; the KL that this makes is measured and logged."""
    max_quantization_kl: Annotated[float | None, by_default("as the prior was made with")] = None
    """How far off a quantized prior may be, in nats on average; inf takes one that was never measured too."""
    prior_buckets: bool = False
    """Ask the prior in batches of few sizes; on a CUDA device each size is one captured graph."""

    def check(self, arm: str, guided: bool, prior_mode: str) -> None:
        """Raise UnsupportedArgument for an option of a prior, or of a cache, that is not there."""
        given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        if given and not guided:
            raise UnsupportedArgument(f"{given[0]}: the arm {arm} has no prior; leave it out")
        of_the_cache = [name for name in given if name.startswith("prior_cache_")]
        if of_the_cache and self.prior_cache is None:
            raise UnsupportedArgument(f"{of_the_cache[0]}: without --prior-cache there is none; leave it out")
        if self.prior_cache is not None and prior_mode == "amortised":
            raise UnsupportedArgument(
                "prior_cache: a student learns while it answers, and answers faster; take --prior-mode exact, or "
                "leave the cache out"
            )

    def apply(self, prior: "inputs.Prior") -> "CachedPrior | None":
        """Set what is asked of a prior; return it behind its cache where one was asked for."""
        from lago_fast.priors.cache import CacheConfig
        from lago_fast.priors.cached_prior import CachedPrior
        from lago_fast.priors.quantize import checked_bound

        exact = inputs.exact_of(prior)
        exact.buckets = self.prior_buckets
        if self.max_quantization_kl is not None:
            exact.max_quantization_kl = checked_bound(self.max_quantization_kl)
        if self.prior_cache is None:
            return None
        config = CacheConfig(
            budget_bytes=self.prior_cache_bytes,
            row_format=self.prior_cache_format,
            resolution=self.prior_cache_resolution,
            path=None if self.prior_cache == "memory" else self.prior_cache,
        )
        return CachedPrior(prior, config)
