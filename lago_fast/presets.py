"""Settings of an experiment on Meta-World, as data; each value with its reason in `LOG.md` or its source here.

Every arm of a comparison reads the same settings; `kl_*` and `prior_*` touch the guided arms alone.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# From Meta-World's MT10: one that plain PPO does not solve in this budget, one that it does, and one with a free
# object, on which a cloned prior is weak
TASKS = ("drawer-open", "window-open", "push")


@dataclass(frozen=True)
class EnvSettings:
    """The vector env that all arms see."""

    tasks: tuple[str, ...] = TASKS
    num_envs: int = 48  # in all, split evenly over the tasks
    max_episode_steps: int = 200  # Meta-World's own limit is 500; KALM's Meta-World data use 100
    gamma: float = 0.99  # also of the running return that scales rewards


@dataclass(frozen=True)
class DemoSettings:
    """What stage 1 learns from."""

    episodes_per_task: int = 3
    action_noise: float = 0.0
    seed: int = 1000


@dataclass(frozen=True)
class PriorSettings:
    """Stage 1: backbone, head and fit."""

    backbone: str = "sentence-transformers/all-MiniLM-L6-v2"
    random_init: bool = False
    epochs: int = 40
    batch_size: int = 64
    learning_rate: float = 2e-3
    patience: int = 40
    input_noise: float = 0.0
    layers: int | None = 2  # the backbone's first layers; None: all of them
    loss: Literal["nll", "mse"] = "mse"  # fits the mean alone; "nll" the std too
    # fixed: at the floor; the other two are fitted
    std: Literal["state_independent", "state_dependent", "fixed"] = "fixed"
    std_floor: float = 0.2
    seed: int = 0
    # the amortised student
    student: dict[str, Any] = field(default_factory=lambda: {"audit_rows": 256})
    student_epochs: int = 40
    noisy_copies: int = 2
    rollout_noise: tuple[float, ...] = (0.2, 0.6)  # one episode per env with each


@dataclass(frozen=True)
class TrainSettings:
    """Stage 2: PPO's settings, the same in every arm, and the KL of the guided ones."""

    steps_per_task: int = 100_000
    n_steps: int = 128
    batch_size: int = 256
    n_epochs: int = 8
    learning_rate: float = 3e-4
    log_std_init: float = -0.5
    ent_coef: float = 0.0
    net_arch: tuple[int, ...] = (64, 64)  # Stable-Baselines3's default
    kl_coef: float = 0.3
    kl_coef_end: float = 0.0  # reached, linearly in the steps, ...
    kl_coef_until: float = 1.0  # ... when this share of them is taken
    kl_direction: str = "policy_prior"
    prior_mode: Literal["amortised", "exact"] = "amortised"
    impl: str = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class Experiment:
    """Arms x seeds on one set of tasks."""

    arms: tuple[str, ...] = ("ppo", "lago")
    seeds: tuple[int, ...] = (0, 1)
    eval_episodes: int = 50  # per task and seed
    env: EnvSettings = field(default_factory=EnvSettings)
    demos: DemoSettings = field(default_factory=DemoSettings)
    prior: PriorSettings = field(default_factory=PriorSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    measure_baselines: bool = True  # SB3 on Python Meta-World and on the SB3 lane, raw stepping


PRESETS = {
    # minutes on two cores
    "demo": Experiment(),
    # does the gap last?
    "long": Experiment(
        arms=("ppo", "lago", "bc_ppo", "lago_random_init"),
        seeds=(0, 1, 2),
        train=TrainSettings(steps_per_task=500_000),
    ),
}
