"""Reinforcement learning guided by a frozen language-model prior.

The public names are imported on first use, so that `import lago_fast` and `lago_fast.ops` stay light.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lago_fast.algorithms.checkpoint_every import CheckpointEvery
    from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
    from lago_fast.algorithms.stopping import StopOnSignals
    from lago_fast.demos import load_demos, record_demos
    from lago_fast.envs.alfworld import make_alfworld
    from lago_fast.envs.clevr_robot import make_clevr_robot
    from lago_fast.envs.frozen_lake import make_frozen_lake
    from lago_fast.envs.metaworld import make_metaworld
    from lago_fast.envs.overcooked import make_overcooked
    from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
    from lago_fast.envs.textworld import make_textworld
    from lago_fast.priors.amortised import AmortisedPrior
    from lago_fast.priors.finetune import fit_prior
    from lago_fast.priors.latent_action import LatentActionPrior
    from lago_fast.text_demos import load_text_demos, save_text_demos
    from lago_fast.text_training import evaluate_text, load_text_ppo, make_text_ppo

__version__ = "0.1.0"

__all__ = [
    "AmortisedPrior",
    "CheckpointEvery",
    "FastKLPPO",
    "LatentActionPrior",
    "StopOnSignals",
    "__version__",
    "evaluate_text",
    "fit_prior",
    "load_demos",
    "load_text_demos",
    "load_text_ppo",
    "make_alfworld",
    "make_clevr_robot",
    "make_frozen_lake",
    "make_metaworld",
    "make_overcooked",
    "make_text_expert",
    "make_text_ppo",
    "make_textworld",
    "record_demos",
    "record_text_episodes",
    "save_text_demos",
]

_HOME = {
    "AmortisedPrior": "lago_fast.priors.amortised",
    "CheckpointEvery": "lago_fast.algorithms.checkpoint_every",
    "FastKLPPO": "lago_fast.algorithms.fast_kl_ppo",
    "LatentActionPrior": "lago_fast.priors.latent_action",
    "StopOnSignals": "lago_fast.algorithms.stopping",
    "evaluate_text": "lago_fast.text_training",
    "fit_prior": "lago_fast.priors.finetune",
    "load_demos": "lago_fast.demos",
    "load_text_demos": "lago_fast.text_demos",
    "load_text_ppo": "lago_fast.text_training",
    "make_alfworld": "lago_fast.envs.alfworld",
    "make_clevr_robot": "lago_fast.envs.clevr_robot",
    "make_frozen_lake": "lago_fast.envs.frozen_lake",
    "make_metaworld": "lago_fast.envs.metaworld",
    "make_overcooked": "lago_fast.envs.overcooked",
    "make_text_expert": "lago_fast.envs.text_recording",
    "make_text_ppo": "lago_fast.text_training",
    "make_textworld": "lago_fast.envs.textworld",
    "record_demos": "lago_fast.demos",
    "record_text_episodes": "lago_fast.envs.text_recording",
    "save_text_demos": "lago_fast.text_demos",
}


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """List the public names without importing them."""
    return sorted(__all__)
