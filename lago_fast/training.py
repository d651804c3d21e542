"""One training run: an arm, a seed, a run folder.

Arms: "ppo" (no prior), "lago" (the prior's KL), "bc_ppo" (policy cloned from the demonstrations, no KL),
"lago_random_init" (as lago, the prior's backbone drawn at random: a control).
Test: pytest tests/test_experiment.py
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback

from lago_fast import runs
from lago_fast.algorithms.checkpoint_every import CheckpointEvery
from lago_fast.algorithms.cloning import clone_policy
from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.algorithms.progress_log import progress_logger
from lago_fast.algorithms.stopping import StopOnSignals
from lago_fast.envs.sb3_adapter import SB3VecEnv
from lago_fast.envs.suites import suite_named
from lago_fast.envs.vec_env import ArrayVecEnv
from lago_fast.errors import UnsupportedArgument
from lago_fast.evaluate import Act, View, draw_actions, rows_for
from lago_fast.presets import EnvSettings, Experiment, TrainSettings
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.base import ActionPrior, match_instructions

ARMS = ("ppo", "lago", "bc_ppo", "lago_random_init")
CHECKPOINT_EVERY = 25  # iterations between two checkpoints
GROUPED_FROM = 16  # simulators per task; fewer were not measured
NO_STATES = "imitate_passes: an exact prior keeps no states; use prior_mode='amortised', or imitate_passes=0"
WORDINGS = 4  # in which each state is seen where a student is imitated
WINDOW = 50  # episodes per task over which training success is counted


class RunResult(NamedTuple):
    model: FastKLPPO
    curve: dict[str, Any]  # env_steps and success per task; steps_to_90 and settled_from as of SuccessCurve
    env_steps: int  # valid ones, over all tasks
    wall_s: float  # of learn(), prior queries included
    cpu_s: float  # of all cores meanwhile
    audit_kl_nats: float | None  # mean over training; None without a student
    stage_s: dict[str, float]  # seconds of each stage of all iterations (`lago_fast.algorithms.stage_clock`)


class SuccessCurve(BaseCallback):
    """Success of the last WINDOW training episodes of each task, after every rollout.

    Args:
        tasks: names.
        task_id: [N], of each env.
        progress: called with (steps done, steps in all) after each rollout.
        whole: env steps of a task in which each of its envs has ended an episode at least. Where a success ends an
            episode the first to end are successes, whatever the policy: what comes sooner, also after the guard has
            started the envs anew, is no `steps_to_90`, and lies before `settled_from`.
    """

    def __init__(self, tasks: list[str], task_id: np.ndarray, progress: Any = None, whole: int = 0) -> None:
        super().__init__()
        self.task_id, self.progress, self.whole, self.settled_from = task_id, progress, whole, whole
        self.recent: list[deque[bool]] = [deque(maxlen=WINDOW) for _ in tasks]
        self.curve: dict[str, dict[str, list[float]]] = {t: {"env_steps": [], "success": []} for t in tasks}
        self.steps_to_90: dict[str, int | None] = dict.fromkeys(tasks)
        self.audits: list[float] = []

    def _on_step(self) -> bool:
        for episode in self.locals["episodes"]:
            self.recent[self.task_id[episode.env]].append(bool(episode.success))
        return True

    def _on_rollout_end(self) -> None:
        steps = self.num_timesteps // len(self.recent)
        assert isinstance(self.model, FastKLPPO)
        self.settled_from = max(self.settled_from, self.model.envs_anew_at // len(self.recent) + self.whole)
        for (task, points), recent in zip(self.curve.items(), self.recent, strict=True):
            if not recent:
                continue
            success = float(np.mean(recent))
            points["env_steps"].append(steps)
            points["success"].append(success)
            self.logger.record(f"rollout/success_{task}", success)
            settled = steps >= self.settled_from and len(recent) == WINDOW
            if success >= 0.9 and settled and self.steps_to_90[task] is None:
                self.steps_to_90[task] = steps
        if "prior/audit_kl_nats" in self.logger.name_to_value:
            self.audits.append(float(self.logger.name_to_value["prior/audit_kl_nats"]))
        if self.progress is not None:
            self.progress(self.num_timesteps, self.locals["total_timesteps"])

    def kept(self) -> dict[str, Any]:
        """Return what a checkpoint has to hold of it."""
        recent = [[bool(success) for success in episodes] for episodes in self.recent]
        return {
            "recent": recent,
            "curve": self.curve,
            "steps_to_90": self.steps_to_90,
            "audits": self.audits,
            "settled_from": self.settled_from,
        }

    def take_back(self, kept: dict[str, Any]) -> None:
        """Become what `kept` was asked of."""
        self.recent = [deque(episodes, maxlen=WINDOW) for episodes in kept["recent"]]
        self.curve, self.steps_to_90, self.audits = kept["curve"], kept["steps_to_90"], kept["audits"]
        self.settled_from = kept["settled_from"]


class RestartEnvs(BaseCallback):
    """Build the envs anew before some iterations, as a run does that is resumed there."""

    def __init__(self, at: Sequence[int], build: Callable[[], Any]) -> None:
        super().__init__()
        self.at, self.build = at, build

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        assert isinstance(self.model, FastKLPPO)
        if self.model.iterations in self.at:
            self.training_env.close()
            self.model.restart_envs(self.build)


def groups_of(settings: EnvSettings) -> int:
    """Return in how many groups the simulators step: on two cores two were faster than one with 16 per task."""
    if settings.groups is not None:
        return settings.groups
    if not suite_named(settings.env).steps_in_groups:
        return 1
    per_task = settings.num_envs // max(1, len(settings.tasks))
    return 2 if per_task >= GROUPED_FROM and per_task % 2 == 0 else 1


def make_env(settings: EnvSettings, seed: int, table: np.ndarray | None, num_threads: int | None = None) -> Any:
    """Return the training env of an experiment, rewards scaled by their running return.

    Args:
        settings: of the env.
        seed: of the env.
        table: [M, Z], a row per wording of `known_tasks(settings)`; None where policies see no instruction.
        num_threads: per pool; default: the cores shared among the pools.
    """
    suite = suite_named(settings.env)
    if settings.sample_actions and not suite.discrete:
        raise UnsupportedArgument(f"sample_actions: {suite.title} is evaluated with the mean action; leave it out")
    suite.check_evaluated(settings.tasks, settings.eval_tasks)
    groups = groups_of(settings)
    return SB3VecEnv(
        suite.make(
            settings.tasks,
            settings.num_envs,
            seed=seed,
            max_episode_steps=settings.max_episode_steps,
            instruction_table=rows_for(settings, suite.instructions(settings.tasks), table),
            normalize_reward=True,
            gamma=settings.gamma,
            num_threads=num_threads,
            **({} if groups == 1 else {"groups": groups}),
        )
    )


def ppo_settings(train: TrainSettings, env: EnvSettings) -> dict[str, Any]:
    """Return the keywords that Stable-Baselines3's PPO and FastKLPPO share."""
    return {
        "n_steps": train.n_steps,
        "batch_size": train.batch_size,
        "n_epochs": train.n_epochs,
        "learning_rate": train.learning_rate,
        "ent_coef": train.ent_coef,
        "gamma": env.gamma,
        "device": train.device,
        "policy_kwargs": {"net_arch": list(train.net_arch), "log_std_init": train.log_std_init},
    }


def kl_schedule(train: TrainSettings) -> LinearSchedule:
    """Return the schedule of the KL coefficient."""
    return LinearSchedule(train.kl_coef, train.kl_coef_end, train.kl_coef_until)


def guard_settings(train: TrainSettings) -> GuardSettings | None:
    """Return the guard of the guided arms, None for none."""
    return GuardSettings(floor=train.guard_floor, imitate=train.guard_imitate) if train.guard else None


def make_model(env: Any, seed: int, train: TrainSettings, about: EnvSettings, prior: ActionPrior | None) -> FastKLPPO:
    """Return an untrained model on `env`, which `about` describes; nothing guides it where `prior` is None."""
    return FastKLPPO(
        "MlpPolicy",
        env,
        seed=seed,
        **ppo_settings(train, about),
        prior=prior,
        kl_coef=0.0 if prior is None else kl_schedule(train),
        kl_direction=train.kl_direction,
        guard=None if prior is None else guard_settings(train),
        impl=train.impl,
        overlap=train.overlap,
        cuda_graph=train.cuda_graph,
    )


def train_run(
    arm: str,
    seed: int,
    experiment: Experiment,
    *,
    folder: Path,
    table: np.ndarray | None = None,
    prior: ActionPrior | None = None,
    demonstrations: tuple[np.ndarray, np.ndarray] | None = None,
    num_threads: int | None = None,
    progress: Any = None,
    resume: bool = False,
    stop: StopOnSignals | None = None,
    checkpoint_every: int = CHECKPOINT_EVERY,
    restart_at: Sequence[int] = (),
) -> RunResult:
    """Train one arm with one seed; write progress.csv, TensorBoard, checkpoints, model.zip and curve.json.

    A run that is resumed equals, on a CPU with the same number of threads, one that was never stopped and built its
    envs anew there (`restart_at`), bit for bit.

    Args:
        arm: one of ARMS.
        seed: of policy, minibatches and env.
        experiment: settings.
        folder: the run's, already made.
        table: [M, Z], what policies see of the instructions; needed with several tasks.
        prior: of the guided arms.
        demonstrations: observations [n, O] and actions, [n, D] or [n], of the arm bc_ppo.
        num_threads: per pool; default: the cores shared among the pools.
        progress: called with (steps done, steps in all).
        resume: go on from the newest checkpoint in the folder.
        stop: signals that end the run after the iteration under way.
        checkpoint_every: iterations between two checkpoints.
        restart_at: iterations before which the envs are built anew.

    Raises:
        UnsupportedArgument: unknown arm, what the arm needs is missing, nothing is left to resume, or a prior that was
            taught nothing is to be imitated on it.
        NoCheckpoint: there is none to resume from.
    """
    if arm not in ARMS:
        raise UnsupportedArgument(f"arm={arm!r}: choose one of {', '.join(ARMS)}")
    guided = arm.startswith("lago")
    if guided and prior is None:
        raise UnsupportedArgument(f"prior: the arm {arm} needs one; fit it with `lago fit-prior`")
    if arm == "bc_ppo" and demonstrations is None:
        raise UnsupportedArgument("demonstrations: the arm bc_ppo needs them; record them with `lago demos`")
    settings = experiment.train

    def build() -> Any:
        return make_env(experiment.env, seed, table, num_threads)

    env = build()
    model, logger = None, None
    try:
        model = make_model(env, seed, settings, experiment.env, prior if guided else None)
        lane = env.array_lane
        if guided and settings.imitate_passes:
            rows = rows_to_imitate(model.prior, experiment.env, lane, table, seed)
            model.imitate_on(*rows, passes=settings.imitate_passes)
        whole = experiment.env.num_envs // len(lane.tasks) * experiment.env.max_episode_steps
        curve = SuccessCurve(lane.tasks, lane.task_id, progress, whole)
        total = settings.steps_per_task * len(lane.tasks)
        if resume:
            curve.take_back(model.restore(folder / "checkpoints")["curve"])
            if model.num_timesteps >= total:
                raise UnsupportedArgument(f"resume: {folder} has taken all of its {total:,} steps; nothing is left")
        elif arm == "bc_ppo" and demonstrations is not None:
            clone_policy(model.policy, *demonstrations, seed=seed)
        logger = progress_logger(folder, ["csv", "tensorboard"], since=model.num_timesteps)
        model.set_logger(logger)
        checkpoints = CheckpointEvery(folder / "checkpoints", checkpoint_every, stop=stop, also={"curve": curve})
        cpu_started = time.process_time()
        model.learn(
            total - model.num_timesteps,
            callback=[curve, checkpoints, RestartEnvs(restart_at, build)],
            log_interval=1,
            reset_num_timesteps=not resume,
        )
        wall_s, cpu_s = (time.time_ns() - model.start_time) / 1e9, time.process_time() - cpu_started
    finally:
        if logger is not None:
            logger.close()
        last = None if model is None else model.get_env()  # another one after a restart
        (env if last is None else last).close()
    model.save(folder / runs.MODEL)
    summary = {
        "tasks": curve.curve,
        "steps_to_90": curve.steps_to_90,
        "settled_from": curve.settled_from,
        "arm": arm,
        "seed": seed,
    }
    runs.write_json(folder / runs.CURVE, summary)
    audit = float(np.mean(curve.audits)) if curve.audits else None
    return RunResult(model, summary, model.num_timesteps, wall_s, cpu_s, audit, dict(model.stage_clock.total))


def observations(states: np.ndarray, instruction_id: np.ndarray, table: np.ndarray | None) -> np.ndarray:
    """Return states [n, S] as a policy sees them: with their instruction's row [n, S + Z] where there is a table."""
    return states if table is None else np.concatenate([states, table[instruction_id]], axis=1)


def check_student(env: EnvSettings, train: TrainSettings) -> None:
    """Raise UnsupportedArgument where settings ask for a student that there will not be, or for no imitation at all."""
    exact = train.prior_mode != "amortised"
    if env.words == "student" and exact:
        raise UnsupportedArgument("words='student': there is none with prior_mode='exact'; use words='latents'")
    if train.imitate_passes < 0:
        raise UnsupportedArgument(f"imitate_passes={train.imitate_passes}: give 0 or more")
    if train.imitate_passes and exact:
        raise UnsupportedArgument(NO_STATES)
    if train.imitate_passes and train.guard and not train.guard_imitate:
        raise UnsupportedArgument("imitate_passes: guard_imitate=False forbids it; leave one of them out")


def rows_to_imitate(
    prior: ActionPrior | None, settings: EnvSettings, lane: ArrayVecEnv, table: np.ndarray | None, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return observations [n, O], instruction ids [n] and task ids [n] on which a policy may imitate a student.

    They are the states that the student was taught, each with WORDINGS wordings that are drawn among all of its task,
    whatever their goal: a policy that is to understand all of them has to see them all, and the student answers to any.

    Args:
        prior: the student.
        settings: of the env.
        lane: the env itself, whose instructions and tasks the ids count.
        table: as `train_run` has it.
        seed: of the draw.

    Raises:
        UnsupportedArgument: the prior is no student, or was not taught one of these tasks.
    """
    if not isinstance(prior, AmortisedPrior):
        raise UnsupportedArgument(NO_STATES)
    rng, suite = np.random.default_rng(seed), suite_named(settings.env)
    index = {text: i for i, text in enumerate(lane.instructions)}
    texts = [suite.texts((task,)) for task in lane.tasks]
    task_of = {text: k for k, of_task in enumerate(texts) for text in of_task}
    of_words = np.array([task_of.get(text, -1) for text in prior.instructions])
    task = np.repeat(of_words[prior.taught.ids.cpu().numpy()], WORDINGS)
    states = np.repeat(prior.taught.state.cpu().numpy(), WORDINGS, axis=0)
    ids = np.full(len(task), -1)
    for k, of_task in enumerate(texts):
        mine = np.flatnonzero(task == k)
        ids[mine] = rng.choice([index[text] for text in of_task], size=len(mine))
    known = ids >= 0
    untaught = [name for k, name in enumerate(lane.tasks) if not (task == k).any()]
    if untaught:
        raise UnsupportedArgument(f"prior: it was not taught {', '.join(untaught)}; use imitate_passes=0")
    words = rows_for(settings, lane.instructions, table)
    return observations(states[known], ids[known], words), ids[known], task[known]


def policy_actor(model: FastKLPPO, *, sample: bool = False, seed: int = 0) -> Act:
    """Return the policy in the form that `evaluate` wants.

    Args:
        model: whose policy.
        sample: draw among discrete actions, rather than take the likeliest or a Gaussian's mean.
        seed: of the draw.
    """
    rng = np.random.default_rng(seed)

    def act(view: View) -> np.ndarray:
        if not sample:
            return model.predict(view.observation, deterministic=True)[0]
        with torch.no_grad():
            seen = torch.as_tensor(view.observation, device=model.device)
            logits: Any = model.policy.get_distribution(seen).distribution
        return draw_actions(logits.logits.cpu().numpy(), rng)

    return act


def prior_actor(prior: ActionPrior, *, sample: bool = False, seed: int = 0) -> Act:
    """Return the prior in the form that `evaluate` wants; arguments as `policy_actor`'s.

    The env's instructions are found in the prior's by their words.
    """
    rng = np.random.default_rng(seed)
    known: tuple[Any, torch.Tensor] = (None, torch.zeros(0))  # the env that was last seen, the prior's ids of its words

    def act(view: View) -> np.ndarray:
        nonlocal known
        if known[0] is not view.env:
            known = view.env, match_instructions(prior, view.env.instructions)
        answer = prior.query(torch.from_numpy(view.state), known[1][torch.from_numpy(view.instruction_id)])
        if answer.mean is not None:
            return answer.mean.cpu().numpy()
        assert answer.log_probs is not None
        log_probs = answer.log_probs.cpu().numpy()
        return draw_actions(log_probs, rng) if sample else log_probs.argmax(axis=1)

    return act
