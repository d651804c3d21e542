"""Vector environments: an array lane for our trainers and an SB3 lane for everyone else.

Names are loaded on first use, so that importing this package needs neither EnvPool nor SB3. The import tells
gymnasium of "lago_fast/ClevrRobot-v0" and the text games, by name: gymnasium itself has no way to find them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register, registry

if TYPE_CHECKING:
    from lago_fast.envs.alfworld import make_alfworld
    from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv, make_clevr_robot
    from lago_fast.envs.frozen_lake import make_frozen_lake
    from lago_fast.envs.metaworld import MetaworldArrayEnv, make_metaworld
    from lago_fast.envs.overcooked import make_overcooked
    from lago_fast.envs.text_recording import make_text_expert, record_text_episodes
    from lago_fast.envs.text_transitions import TextTransitions
    from lago_fast.envs.textworld import make_textworld
    from lago_fast.envs.vec_env import ArrayReset, ArrayStep, ArrayVecEnv, ReturnNormalizer

__all__ = [
    "ArrayReset",
    "ArrayStep",
    "ArrayVecEnv",
    "ClevrRobotArrayEnv",
    "MetaworldArrayEnv",
    "ReturnNormalizer",
    "TextTransitions",
    "make_alfworld",
    "make_clevr_robot",
    "make_frozen_lake",
    "make_metaworld",
    "make_overcooked",
    "make_text_expert",
    "make_textworld",
    "record_text_episodes",
]

_HOME = {
    "ArrayReset": "vec_env",
    "ArrayStep": "vec_env",
    "ArrayVecEnv": "vec_env",
    "ClevrRobotArrayEnv": "clevr_robot",
    "MetaworldArrayEnv": "metaworld",
    "ReturnNormalizer": "vec_env",
    "TextTransitions": "text_transitions",
    "make_alfworld": "alfworld",
    "make_clevr_robot": "clevr_robot",
    "make_frozen_lake": "frozen_lake",
    "make_metaworld": "metaworld",
    "make_overcooked": "overcooked",
    "make_text_expert": "text_recording",
    "make_textworld": "textworld",
    "record_text_episodes": "text_recording",
}

if "lago_fast/ClevrRobot-v0" not in registry:
    register(id="lago_fast/ClevrRobot-v0", entry_point="lago_fast.envs.clevr_gym:ClevrRobotEnv")

for _id, _game in (
    ("FrozenLakeText", "frozen-lake"),
    ("OvercookedText", "overcooked"),
    ("TextWorld", "textworld"),
    ("ALFWorld", "alfworld"),
):
    if f"lago_fast/{_id}-v0" not in registry:
        register(id=f"lago_fast/{_id}-v0", entry_point="lago_fast.envs.text_gym:TextGameEnv", kwargs={"game": _game})


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
