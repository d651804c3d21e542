"""DQNPrior: Q learning whose maxima and whose behaviour run over what a frozen language prior proposes.

Without a prior it is DQN over all admissible actions, on the same path.
Source: arXiv 2410.07927 (DQN-Prior). Test: pytest tests/algorithms/test_dqn_prior.py
"""

from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback
from torch import Tensor

from lago_fast.algorithms.proposals import draw, greedy
from lago_fast.algorithms.text_learner import Callbacks, TextLearner
from lago_fast.algorithms.text_playing import TextPlay
from lago_fast.algorithms.text_q import q_values
from lago_fast.algorithms.text_replay import TextBatch, TextReplayBuffer
from lago_fast.algorithms.text_saving import built, put_back, read_model
from lago_fast.algorithms.text_states import Seen, TextEnv
from lago_fast.errors import UnsupportedArgument, check_whole
from lago_fast.priors.text_base import TextActionPrior, TextEncoder

# what a saved model does not hold of the constructor's names
NOT_KEPT = {"self", "env", "prior", "encoder", "__class__"}
BEHAVIOURS = ("posterior", "epsilon_greedy")


class DQNPrior(TextLearner):
    """DQN over text actions with y = r + gamma max Q_target(s', a'), a' of the k proposals at s'.

    Keyword arguments have Stable-Baselines3's names and meanings where it has them; an env step is a valid row.
    Proposals are drawn afresh whenever they are needed, from the prior's answer, which is asked for once per state
    that is met. Until `learning_starts` the prior acts alone.

    Args:
        env: text games stepped together (`lago_fast.envs.text_env.TextVecEnv`); None: only to predict.
        prior: frozen; None: every admissible action is proposed, whatever k says.
        encoder: frozen, of the texts.
        k: proposals per state; None: all that the prior does not exclude, weighted by it.
        alpha: temperature of the posterior p(a|s) exp(Q(s, a) / alpha), in units of reward.
        behaviour: "posterior" draws from it over the proposals, "epsilon_greedy" takes the best proposal, or with
            the exploration rate any of them; None: the first with a prior, the second without.
        learning_rate: of AdamW, constant.
        buffer_size: transitions.
        learning_starts: env steps before the first update; the texts met until then centre and scale the inputs.
        batch_size: transitions per update.
        tau: of the target network's update; 1 copies.
        gamma: discount.
        train_freq: steps of all environments between updates, or a pair such as (2, "episode").
        gradient_steps: updates each time; -1: as many as env steps since.
        target_update_interval: gradient steps between updates of the target network, as in Stable-Baselines3's SAC; env
            steps, as in its DQN, would tie the target's pace to the number of environments.
        exploration_fraction, exploration_initial_eps, exploration_final_eps: of "epsilon_greedy".
        max_grad_norm: of all gradients together.
        weight_decay: decoupled, AdamW's; 0 is Adam.
        net_arch: widths of the Q network's hidden layers.
        activation: "relu" or "tanh".
        stats_window_size: episodes that the log averages over.
        tensorboard_log: folder, None: no such log.
        verbose: 1 prints the log.
        seed: of everything that is drawn, the env's episodes included.

    Raises:
        UnsupportedArgument: a value that cannot be honoured.
        TrainablePrior: the prior has a parameter that requires a gradient.
    """

    def __init__(
        self,
        env: TextEnv | None,
        prior: TextActionPrior | None,
        encoder: TextEncoder,
        *,
        k: int | None = 5,
        alpha: float = 0.1,
        behaviour: str | None = None,
        learning_rate: float = 5e-4,
        buffer_size: int = 20_000,
        learning_starts: int = 100,
        batch_size: int = 128,
        tau: float = 0.005,
        gamma: float = 0.99,
        train_freq: int | tuple[int, str] = 1,
        gradient_steps: int = -1,
        target_update_interval: int = 1,
        exploration_fraction: float = 0.3,
        exploration_initial_eps: float = 1.0,
        exploration_final_eps: float = 0.05,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.01,
        net_arch: Sequence[int] = (64, 64),
        activation: str = "relu",
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in NOT_KEPT}
        super().__init__(prior, encoder, {**arguments, "net_arch": list(net_arch)})
        self.behaviour = behaviour or ("epsilon_greedy" if prior is None else "posterior")
        if self.behaviour not in BEHAVIOURS:
            raise UnsupportedArgument(f"behaviour={behaviour!r}: choose one of {', '.join(BEHAVIOURS)}")
        if not 0 < exploration_fraction <= 1:
            raise UnsupportedArgument(f"exploration_fraction={exploration_fraction}: give a number above 0, at most 1")
        for name, rate in (("initial", exploration_initial_eps), ("final", exploration_final_eps)):
            if not 0 <= rate <= 1:
                raise UnsupportedArgument(f"exploration_{name}_eps={rate}: give a number from 0 to 1")
        if gradient_steps < -1 or learning_starts < 0:
            raise UnsupportedArgument(
                f"gradient_steps={gradient_steps}, learning_starts={learning_starts}: give 0 or more; -1 gradient "
                "steps are as many as env steps"
            )
        self.train_freq, self.train_unit = _frequency(train_freq)
        self.exploration_fraction = exploration_fraction
        self.exploration_eps = exploration_initial_eps, exploration_final_eps
        self.exploration_rate = exploration_initial_eps
        self.learning_starts, self.gradient_steps, self.buffer_size = learning_starts, gradient_steps, buffer_size
        self.env = env
        check_whole(1, stats_window_size=stats_window_size)
        self.ep_info_buffer: deque[dict[str, float]] = deque(maxlen=stats_window_size)
        self.ep_success_buffer: deque[bool] = deque(maxlen=stats_window_size)
        self._play: TextPlay | None = None
        self._episodes = 0
        if env is not None:
            if buffer_size < env.num_envs:
                raise UnsupportedArgument(f"buffer_size={buffer_size}: give at least one per env, {env.num_envs}")
            self.replay_buffer = TextReplayBuffer(buffer_size, env.max_actions)

    @classmethod
    def load(
        cls,
        path: str | Path,
        encoder: TextEncoder,
        *,
        prior: TextActionPrior | None = None,
        env: TextEnv | None = None,
    ) -> Self:
        """Return a saved model; its replay buffer is empty, and no code from the file is run.

        Args:
            path: of the file, with or without its suffix.
            encoder, prior: the ones that it was trained with.
            env: to go on learning.

        Raises:
            NoCheckpoint, CorruptFile, HashMismatch: there is no such file, or it is damaged.
            EncoderMismatch, PriorMismatch: another encoder or prior.
            UnsupportedArgument: the file holds a model of another class.
        """
        kept, arguments = read_model(path, cls.__name__, encoder, prior)
        model = built(partial(cls, env, prior, encoder), kept, arguments, path)
        put_back(model, kept, path)
        return model

    def get_env(self) -> TextEnv | None:
        """Return the environment learnt from."""
        return self.env

    # ---- learning ---------------------------------------------------------------------------------------------

    def learn(
        self,
        total_timesteps: int,
        callback: Callbacks = None,
        log_interval: int | None = 4,
        tb_log_name: str = "DQNPrior",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Play and learn for at least `total_timesteps` env steps, as in Stable-Baselines3.

        Args:
            callback: one, a list, or a function of (locals, globals); one that returns False ends learning.
            log_interval: episodes between two rows of the log; None: no rows.

        Raises:
            UnsupportedArgument: there is no env, or a state of it has no admissible action.
            NonFiniteError: NaN or infinity in rewards, the prior's answers or the loss.
        """
        if self.env is None:
            raise UnsupportedArgument("env: there is none to learn from; pass it to the constructor or to load")
        total_timesteps, callback = self._begin(
            total_timesteps, callback, tb_log_name, reset_num_timesteps, progress_bar
        )
        if reset_num_timesteps or self._play is None:
            self._play = TextPlay(self.env, self.reader, self.seed)
        if reset_num_timesteps:
            self.ep_info_buffer.clear()
            self.ep_success_buffer.clear()
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            before = self.num_timesteps
            callback.on_rollout_start()
            if not self._collect(self._play, callback, log_interval, total_timesteps):
                break
            callback.on_rollout_end()
            if self.num_timesteps > self.learning_starts:
                self._train(self.num_timesteps - before if self.gradient_steps == -1 else self.gradient_steps)
        callback.on_training_end()
        return self

    def _collect(self, play: TextPlay, callback: BaseCallback, log_interval: int | None, total_timesteps: int) -> bool:
        """Play until an update is due; False where a callback wants to end."""
        done = 0
        while done < self.train_freq:
            played = play.step(self._act)
            self.replay_buffer.add(played.batch)
            self.num_timesteps += len(played.batch.choice)
            self._explore_less(total_timesteps)
            infos, rewards = played.infos, played.step.reward
            dones = np.array(["episode" in info for info in infos])
            callback.update_locals(locals())
            if not callback.on_step():
                return False
            self._note_episodes(infos, log_interval)
            done += 1 if self.train_unit == "step" else int(dones.sum())
        return True

    def _act(self, seen: Seen) -> Tensor:
        """Return a choice [n]; of the prior alone as long as nothing was learnt."""
        if self.num_timesteps < self.learning_starts:
            return draw(seen.log_prior.exp(), 1, self.generator).squeeze(1)
        return self._choose(seen, deterministic=False)

    def _explore(self, q: Tensor, log_weights: Tensor) -> Tensor:
        if self.behaviour == "posterior":
            return super()._explore(q, log_weights)
        anything = draw((log_weights > -torch.inf).float(), 1, self.generator).squeeze(1)
        explores = torch.rand(len(q), generator=self.generator) < self.exploration_rate
        return torch.where(explores, anything, greedy(q, log_weights))

    def _explore_less(self, total_timesteps: int) -> None:
        """Let the exploration rate fall, as Stable-Baselines3's DQN does."""
        initial, final = self.exploration_eps
        passed = min(self.num_timesteps / total_timesteps / self.exploration_fraction, 1)
        self.exploration_rate = initial + passed * (final - initial)

    def _note_episodes(self, infos: list[dict[str, Any]], log_interval: int | None) -> None:
        for info in infos:
            if "episode" not in info:
                continue
            self.ep_info_buffer.append(info["episode"])
            self.ep_success_buffer.append(info["is_success"])
            self._episodes += 1
            if log_interval is not None and self._episodes % log_interval == 0:
                self._record_episodes()
                self._dump()

    def _record_episodes(self) -> None:
        record = self.logger.record
        record("rollout/ep_rew_mean", float(np.mean([episode["r"] for episode in self.ep_info_buffer])))
        record("rollout/ep_len_mean", float(np.mean([episode["l"] for episode in self.ep_info_buffer])))
        record("rollout/success_rate", float(np.mean(self.ep_success_buffer)))
        if self.behaviour == "epsilon_greedy":
            record("rollout/exploration_rate", self.exploration_rate)
        record("time/episodes", self._episodes, exclude="tensorboard")

    def _train(self, gradient_steps: int) -> None:
        if not bool(self.network.get_buffer("is_fitted")):
            self.fit_inputs(*self.replay_buffer.distinct())
        losses = [
            self.gradient_step(self.replay_buffer.sample(self.batch_size, self.generator))
            for _ in range(gradient_steps)
        ]
        if losses:
            self.logger.record("train/loss", float(np.mean(losses)))

    def loss(self, batch: TextBatch) -> Tensor:
        """Return half the mean squared TD error."""
        taken = batch.seen.actions.gather(1, batch.choice[:, None])
        error = q_values(self.network, self.encoder, batch.seen.state, taken).squeeze(1) - self.td_target(batch)
        return 0.5 * error.square().mean()


def _frequency(train_freq: int | Sequence[Any]) -> tuple[int, str]:
    """Return how many steps or episodes pass between updates, and which of the two."""
    count, unit = (train_freq, "step") if isinstance(train_freq, int) else tuple(train_freq)
    if not isinstance(count, int) or count < 1 or unit not in ("step", "episode"):
        raise UnsupportedArgument(f'train_freq={train_freq}: give a number from 1 on, or (number, "step" or "episode")')
    return count, unit
