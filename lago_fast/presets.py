"""Settings of an experiment, as data; each value with its reason in `LOG.md` or its source here.

Every arm of a comparison reads the same settings; `kl_*` and `prior_*` touch the guided arms alone.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lago_fast.errors import UnsupportedArgument

# From Meta-World's MT10: one that plain PPO does not solve in this budget, one that it does, and one with a free
# object, on which a cloned prior is weak
TASKS = ("drawer-open", "window-open", "push")
# wide enough for a prior fitted to few demonstrations, narrow enough to be asked at every step; it is refitted where
# its audit comes near the 0.1 nats that are allowed. A prior with half the std needs a wider one: a KL grows by its
# inverse square
STUDENT = {"hidden": 256, "refresh_kl": 0.06, "refresh_steps": 20}


@dataclass(frozen=True)
class EnvSettings:
    """The vector env that all arms see."""

    env: Literal["metaworld", "clevr-robot"] = "metaworld"  # the environment
    tasks: tuple[str, ...] = TASKS  # names such as drawer-open push; Meta-World v3 has 50, CLEVR-Robot 7 families
    eval_tasks: tuple[str, ...] = ()  # tasks that are evaluated, whose words are known too; none: those trained on
    sample_actions: bool = False  # evaluate policies and priors by drawing their actions, not by the likeliest
    num_envs: int = 48  # simulators side by side, in all; a multiple of the number of tasks
    max_episode_steps: int = 200  # steps per episode; Meta-World's own limit is 500, KALM's Meta-World data use 100
    groups: int | None = None  # groups that step in turn while the policy answers; None: 2 for 16 per task, else 1
    gamma: float = 0.99  # discount factor, also of the running return that scales rewards
    # what policies see of the instructions: the language model's latents, or what the amortised student makes of them
    words: Literal["latents", "student"] = "latents"
    explained_variance: float = 1.0  # share of the wordings' variance that the policy's view of them keeps


@dataclass(frozen=True)
class DemoSettings:
    """What stage 1 learns from."""

    episodes_per_task: int = 3  # demonstrated episodes of each task
    action_noise: float = 0.0  # standard deviation of noise on the expert's actions, which lie in -1..1
    noisy_tasks: tuple[str, ...] = ()  # tasks whose expert gets the noise; none: all
    success_only: bool = False  # keep only episodes in which the task was solved
    num_envs_per_task: int = 10  # simulators that are played side by side
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
    wording_noise: float = 0.0  # noise on the instructions' latents while fitting, of a mean square of about 1
    wordings: int = 1  # ways to say its goal that each step is fitted in, one of them in a pass
    layers: int | None = 2  # first layers of the language model that are used; None: all
    head_hidden: int | None = None  # width of a hidden layer between the language model and the action; None: no such
    state_path: Literal["token", "token_and_head"] = "token"  # who reads the state: the language model, or both
    attention: Literal["own", "prefix"] = "own"  # prefix: an encoder's text does not see the state; faster to ask
    loss: Literal["nll", "mse"] = "mse"  # mse fits the mean alone, nll the standard deviation too
    std: Literal["state_independent", "state_dependent", "fixed"] = "fixed"  # fixed at the floor, or fitted
    std_floor: float = 0.4  # smallest standard deviation that the prior answers with
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
    kl_coef: float = 1.2  # weight of the KL to the prior at the start
    kl_coef_end: float = 0.04  # weight that it falls to, linearly in the steps, and keeps to the end
    kl_coef_until: float = 0.25  # share of the steps after which --kl-coef-end is reached
    kl_direction: Literal["policy_prior", "prior_policy"] = "policy_prior"  # the KL from policy to prior, or back
    guard: bool = True  # True: a task's KL counts only where the prior does better than the policy; False: always
    guard_floor: float = 1.0  # share of the KL that a prior which once did keeps, should the policy pass it
    guard_imitate: bool = True  # True: fit the policy to such a prior on its own episodes, once; False: do not
    # passes over what the amortised student was taught, on which the policy is fitted to it; 0: on its episodes alone
    imitate_passes: int = 0
    prior_mode: Literal["exact", "amortised"] = "exact"  # ask the language model itself, or the fast student
    # collect the next rollout while the policy is updated: it is learnt from one update late
    overlap: Literal["none", "update"] = "none"
    cuda_graph: bool = False  # replay a minibatch's gradient step as one CUDA graph
    impl: Literal["auto", "reference", "inductor", "cpp", "triton", "cuda"] = "auto"  # who computes the loss
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
    measure_baselines: bool = True  # True: time bare stepping, SB3 on Python Meta-World, and SB3 on the SB3 lane too


# what CLEVR-Robot starts from: trained on the real goals and wordings, evaluated on every split
CLEVR_FAMILIES = ("real", "rephrase", "easy", "two-goals", "three-goals", "line", "gather")
CLEVR_START = Experiment(
    arms=("ppo", "lago", "bc_ppo"),
    seeds=(0, 1, 2),
    eval_episodes=100,  # 300 of each family over the seeds
    env=EnvSettings(
        env="clevr-robot",
        tasks=("real",),
        eval_tasks=CLEVR_FAMILIES,
        # a clone of the expert that always takes its likeliest push gets stuck: the same push against a wall again
        sample_actions=True,
        num_envs=64,
        max_episode_steps=50,
        # few directions: with more of them, what is learnt of the real wordings carries over to fewer others
        explained_variance=0.98,
    ),
    demos=DemoSettings(episodes_per_task=8000, success_only=True, num_envs_per_task=100),
    prior=PriorSettings(
        epochs=16,
        batch_size=256,
        loss="nll",
        head_hidden=256,
        state_path="token_and_head",
        # MiniLM puts 4,320 sentences close together, and with one each the prior learns sentences instead of goals
        wordings=16,
        wording_noise=0.3,
        rollout_noise=(0.0, 0.3),
        noisy_copies=1,
        student={**STUDENT, "hidden": 384},
        student_epochs=40,
    ),
    train=TrainSettings(
        steps_per_task=1_500_000,
        n_steps=32,
        batch_size=512,
        n_epochs=4,
        learning_rate=3e-4,
        ent_coef=0.01,
        net_arch=(256, 256),
        # much at first, for the policy finds it hard to read the words as the prior does, and soon little: PPO goes
        # beyond this prior
        kl_coef=3.0,
        kl_coef_end=0.01,
        kl_coef_until=0.1,
    ),
    measure_baselines=False,
)
# with a student, which knows more of the words and can be imitated in all of them
CLEVR = replace(
    CLEVR_START,
    # the language model's latents hardly say which ball goes to which; what the student makes of them does
    env=replace(CLEVR_START.env, words="student", explained_variance=0.9),
    # the policy imitates the student at length, once, and is held a little
    train=replace(CLEVR_START.train, prior_mode="amortised", imitate_passes=8, kl_coef=0.03, kl_coef_end=0.03),
)

PRESETS = {
    # minutes on two cores; of this seed's demonstrations drawer-open's are too few, so that there is something to learn
    "demo": Experiment(demos=DemoSettings(seed=1001), train=TrainSettings(prior_mode="amortised")),
    # does the gap last?
    "long": Experiment(
        arms=("ppo", "lago", "bc_ppo", "lago_random_init"),
        seeds=(0, 1, 2),
        train=TrainSettings(prior_mode="amortised", steps_per_task=500_000, kl_coef_until=0.1),
    ),
    # LaGO's discrete benchmark at the paper's budget
    "clevr": CLEVR,
    # the same, all arms trained on the goals of every split
    "clevr-all": replace(
        CLEVR,
        # most of the variance of all families' words is which family it is
        env=replace(CLEVR.env, tasks=CLEVR_FAMILIES, num_envs=70, explained_variance=0.98),
        train=replace(CLEVR.train, steps_per_task=1_500_000 // len(CLEVR_FAMILIES)),
    ),
}
# what `lago demos`, `fit-prior` and `train` start from
STARTS = {"metaworld": PRESETS["demo"], "clevr-robot": CLEVR_START}


def start_of(env: str) -> Experiment:
    """Return what commands start from in an environment.

    Raises:
        UnsupportedArgument: no such environment.
    """
    if env not in STARTS:
        raise UnsupportedArgument(f"env: {env!r} is unknown; choose one of {', '.join(STARTS)}")
    return STARTS[env]
