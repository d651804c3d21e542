"""Frozen priors over actions: what they answer, how they are fitted, how they are kept.

The public names are imported on first use: `priors.base` must not pull in transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lago_fast.priors.amortised import AmortisedPrior
    from lago_fast.priors.backbone import Backbone, encode_instructions, find_backbone
    from lago_fast.priors.base import ActionPrior, PriorOutput, check_frozen, match_instructions
    from lago_fast.priors.cache import CacheConfig, LatentCache
    from lago_fast.priors.cached_prior import CachedPrior
    from lago_fast.priors.cached_text_prior import CachedTextPrior
    from lago_fast.priors.causal_lm import CausalLM, find_causal_lm
    from lago_fast.priors.embed_fit import fit_embed_prior
    from lago_fast.priors.embed_prior import EmbedPrior
    from lago_fast.priors.finetune import fit_prior
    from lago_fast.priors.generate_prior import GeneratePrior
    from lago_fast.priors.latent_action import LatentActionPrior
    from lago_fast.priors.prompt import Prompt
    from lago_fast.priors.quantize import quantize_prior
    from lago_fast.priors.score_prior import ScorePrior
    from lago_fast.priors.small_lm import train_small_lm
    from lago_fast.priors.student import StudentConfig
    from lago_fast.priors.text_base import TextActionPrior, TextEncoder
    from lago_fast.priors.text_embedder import TextEmbedder
    from lago_fast.priors.walkthroughs import Steps, Walkthroughs

__all__ = [
    "ActionPrior",
    "AmortisedPrior",
    "Backbone",
    "CacheConfig",
    "CachedPrior",
    "CachedTextPrior",
    "CausalLM",
    "EmbedPrior",
    "GeneratePrior",
    "LatentActionPrior",
    "LatentCache",
    "PriorOutput",
    "Prompt",
    "ScorePrior",
    "Steps",
    "StudentConfig",
    "TextActionPrior",
    "TextEmbedder",
    "TextEncoder",
    "Walkthroughs",
    "check_frozen",
    "encode_instructions",
    "find_backbone",
    "find_causal_lm",
    "fit_embed_prior",
    "fit_prior",
    "match_instructions",
    "quantize_prior",
    "train_small_lm",
]

_HOME = {
    "ActionPrior": "base",
    "AmortisedPrior": "amortised",
    "Backbone": "backbone",
    "CacheConfig": "cache",
    "CachedPrior": "cached_prior",
    "CachedTextPrior": "cached_text_prior",
    "CausalLM": "causal_lm",
    "EmbedPrior": "embed_prior",
    "GeneratePrior": "generate_prior",
    "LatentActionPrior": "latent_action",
    "LatentCache": "cache",
    "PriorOutput": "base",
    "Prompt": "prompt",
    "ScorePrior": "score_prior",
    "Steps": "walkthroughs",
    "StudentConfig": "student",
    "TextActionPrior": "text_base",
    "TextEmbedder": "text_embedder",
    "TextEncoder": "text_base",
    "Walkthroughs": "walkthroughs",
    "check_frozen": "base",
    "encode_instructions": "backbone",
    "find_backbone": "backbone",
    "find_causal_lm": "causal_lm",
    "fit_embed_prior": "embed_fit",
    "fit_prior": "finetune",
    "match_instructions": "base",
    "quantize_prior": "quantize",
    "train_small_lm": "small_lm",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted(__all__)
