"""Settings of an experiment on Meta-World, as data; each value with its reason in `LOG.md` or its source here.

Every arm of a comparison reads the same settings; `kl_*` and `prior_*` touch the guided arms alone.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

# From Meta-World's MT10: one that plain PPO does not solve in this budget, one that it does, and one with a free
# object, on which a cloned prior is weak
TASKS = ("drawer-open", "window-open", "push")
# wide enough for a prior fitted to few demonstrations, narrow enough to be asked at every step; it is refitted where
# its audit comes near the 0.1 nats that are allowed
STUDENT = {"hidden": 384, "refresh_kl": 0.06, "refresh_steps": 20}


@dataclass(frozen=True)
class EnvSettings:
    """The vector env that all arms see."""

    tasks: tuple[str, ...] = TASKS  # names such as drawer-open push; Meta-World v3 has 50
    num_envs: int = 48  # simulators side by side, in all; a multiple of the number of tasks
    max_episode_steps: int = 200  # steps per episode; Meta-World's own limit is 500, KALM's Meta-World data use 100
    gamma: float = 0.99  # discount factor, also of the running return that scales rewards


@dataclass(frozen=True)
class DemoSettings:
    """What stage 1 learns from."""

    episodes_per_task: int = 3  # demonstrated episodes of each task
    action_noise: float = 0.0  # standard deviation of noise on the expert's actions, which lie in -1..1
    seed: int = 1000  # decides start positions, goals, wording and noise of the demonstrations


@dataclass(frozen=True)
class PriorSettings:
    """Stage 1: backbone, head and fit."""

    backbone: str = "sentence-transformers/all-MiniLM-L6-v2"  # language model: a folder, or a name on the hub
    random_init: bool = False  # draw the language model's weights at random, a control
    epochs: int = 40  # passes over the demonstrations, at most
    batch_size: int = 64  # steps of the demonstrations per update
    learning_rate: float = 2e-3  # largest learning rate of the fit
    patience: int = 40  # passes without a better held-out result before the fit stops
    input_noise: float = 0.0  # noise on the states while fitting, in standard deviations
    layers: int | None = 2  # first layers of the language model that are used; None: all
    loss: Literal["nll", "mse"] = "mse"  # mse fits the mean alone, nll the standard deviation too
    std: Literal["state_independent", "state_dependent", "fixed"] = "fixed"  # fixed at the floor, or fitted
    std_floor: float = 0.2  # smallest standard deviation that the prior answers with
    seed: int = 0  # decides split, initial weights and order of the fit
    student: dict[str, Any] = field(default_factory=lambda: dict(STUDENT))  # settings of the amortised student
    student_epochs: int = 40  # passes of the student over its states
    noisy_copies: int = 3  # perturbed copies of each state that the student is taught as well
    rollout_noise: tuple[float, ...] = (0.1, 0.3, 0.6, 1.0)  # action noise of the episodes that the student plays


@dataclass(frozen=True)
class TrainSettings:
    """Stage 2: PPO's settings, the same in every arm, and the KL of the guided ones."""

    steps_per_task: int = 200_000  # environment steps of the whole training, per task
    n_steps: int = 128  # steps of each simulator between two updates
    batch_size: int = 256  # steps per gradient step
    n_epochs: int = 8  # passes over the collected steps per update
    learning_rate: float = 6e-4  # learning rate of Adam
    log_std_init: float = -0.5  # log of the policy's first standard deviation
    ent_coef: float = 0.0  # weight of the entropy bonus
    net_arch: tuple[int, ...] = (64, 64)  # widths of the hidden layers of policy and value; Stable-Baselines3's default
    kl_coef: float = 0.3  # weight of the KL to the prior at the start
    kl_coef_end: float = 0.01  # weight that it falls to, linearly in the steps, and keeps to the end
    kl_coef_until: float = 0.5  # share of the steps after which --kl-coef-end is reached
    kl_direction: Literal["policy_prior", "prior_policy"] = "policy_prior"  # or prior_policy, KL(prior || policy)
    guard: bool = False  # let the KL of a task count less where following the prior does not pay
    prior_mode: Literal["amortised", "exact"] = "amortised"  # ask the fast student, or the language model itself
    impl: Literal["auto", "reference", "inductor", "cpp", "triton", "cuda"] = "auto"  # of the loss
    device: str = "cpu"  # cpu, cuda, or auto for CUDA where there is one


@dataclass(frozen=True)
class Experiment:
    """Arms x seeds on one set of tasks."""

    arms: tuple[str, ...] = ("ppo", "lago")  # of ppo, lago, bc_ppo, lago_random_init
    seeds: tuple[int, ...] = (0, 1)  # one training run per arm and seed
    eval_episodes: int = 100  # evaluation episodes per task and seed
    env: EnvSettings = field(default_factory=EnvSettings)
    demos: DemoSettings = field(default_factory=DemoSettings)
    prior: PriorSettings = field(default_factory=PriorSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    measure_baselines: bool = True  # time bare stepping, SB3 on Python Meta-World, and SB3 on the SB3 lane too


PRESETS = {
    # minutes on two cores
    "demo": Experiment(),
    # does the gap last?
    "long": Experiment(
        arms=("ppo", "lago", "bc_ppo", "lago_random_init"),
        seeds=(0, 1, 2),
        train=TrainSettings(steps_per_task=500_000, kl_coef_until=0.2),
    ),
}
