"""What learners of Q over text actions share: the networks, the TD target, choosing, and Stable-Baselines3's manners.

Test: pytest tests/algorithms/test_text_learner.py
"""

import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, ConvertCallback, ProgressBarCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import configure_logger
from torch import Tensor

from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.proposals import check_alpha, draw, draws_of, greedy, posterior, propose, typical
from lago_fast.algorithms.text_q import TextQNetwork, q_values, vectors
from lago_fast.algorithms.text_replay import TextBatch
from lago_fast.algorithms.text_saving import write_model
from lago_fast.algorithms.text_states import Seen, StateReader, TextState, playing_rows
from lago_fast.errors import NonFiniteLoss, UnsupportedArgument, check_seed
from lago_fast.priors.text_base import TextActionPrior, TextEncoder

Callbacks = BaseCallback | list[BaseCallback] | Callable[[dict[str, Any], dict[str, Any]], bool] | None


class StepsBar(ProgressBarCallback):
    """Stable-Baselines3's bar of progress, moved by the steps that were made."""

    _shown = 0

    def _on_step(self) -> bool:
        self.pbar.update(self.model.num_timesteps - self._shown)
        self._shown = self.model.num_timesteps
        return True

    def _on_training_start(self) -> None:
        super()._on_training_start()
        self._shown = self.model.num_timesteps


def _plain(value: Any) -> Any:
    """Return NumPy's scalars and arrays as Python's, which can be saved as JSON."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list) else value


class TextLearner:
    """A Q function over text actions with its target, and how actions are chosen by it.

    Args:
        prior: proposes actions; None: every admissible one is proposed.
        encoder: of the texts.
        arguments: the rest of the constructor's, by name; kept with a saved model.
    """

    def __init__(self, prior: TextActionPrior | None, encoder: TextEncoder, arguments: dict[str, Any]) -> None:
        a = self.arguments = {name: _plain(value) for name, value in arguments.items()}
        self.k, self.alpha, self.gamma, self.tau = a["k"], a["alpha"], a["gamma"], a["tau"]
        self.learning_rate, self.batch_size = a["learning_rate"], a["batch_size"]
        self.max_grad_norm, self.weight_decay = a["max_grad_norm"], a["weight_decay"]
        self.target_update_interval = a["target_update_interval"]
        self.tensorboard_log, self.verbose, self.seed = a["tensorboard_log"], a["verbose"], a["seed"]
        self._check()
        self.draws = draws_of(prior, self.k)
        self.prior, self.encoder, self.reader = prior, encoder, StateReader(encoder, prior)
        self.generator = torch.Generator()
        if self.seed is None:
            self.generator.seed()
        else:
            check_seed("seed", self.seed)
            self.generator.manual_seed(self.seed)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(2**62, (), generator=self.generator)))
            self.network = TextQNetwork(encoder.width, a["net_arch"], a["activation"])
        self.target = deepcopy(self.network).requires_grad_(False)
        self.optimizer = FlatAdam(self.network.parameters(), lr=self.learning_rate)
        self.num_timesteps = self.n_updates = 0
        self._logger: Logger | None = None
        self._custom_logger = False

    def _check(self) -> None:
        check_alpha(self.alpha)
        for name, value, inside, allowed in (
            ("gamma", self.gamma, 0 <= self.gamma <= 1, "a number from 0 to 1"),
            ("tau", self.tau, 0 < self.tau <= 1, "a number above 0, at most 1; 1 copies"),
            ("learning_rate", self.learning_rate, self.learning_rate > 0, "a number above 0"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
            ("max_grad_norm", self.max_grad_norm, self.max_grad_norm > 0, "a number above 0"),
            ("weight_decay", self.weight_decay, self.weight_decay >= 0, "0 or more"),
            ("target_update_interval", self.target_update_interval, self.target_update_interval >= 1, "at least 1"),
        ):
            if not inside:
                raise UnsupportedArgument(f"{name}={value}: give {allowed}")

    # ---- choosing ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def q_values(self, state: TextState) -> Tensor:
        """Return Q [N, A] of all admissible actions, -inf where padded.

        Raises:
            UnsupportedArgument: a state without admissible actions.
        """
        seen = self.reader.read(state, range(len(state.observation)))
        return self._q(self.network, seen)

    def _q(self, network: TextQNetwork, seen: Seen) -> Tensor:
        return q_values(network, self.encoder, seen.state, seen.actions)

    def predict(self, observation: TextState, deterministic: bool = False) -> tuple[np.ndarray, None]:
        """Return for each of N states the index [N] int64 of an admissible action, and None, as in Stable-Baselines3.

        Args:
            observation: the states; one without actions, of which the episode is over, gets 0, which a text
                environment ignores there and refuses elsewhere.
            deterministic: the posterior's likeliest action, argmax of Q / alpha + log p over what `k` draws from the
                prior hold more often than not; else as while learning.
        """
        rows = playing_rows(observation)
        choice = np.zeros(len(observation.observation), dtype=np.int64)
        if not len(rows):
            return choice, None
        seen = self.reader.read(observation, rows)
        choice[rows] = self._choose(seen.take(torch.from_numpy(rows)), deterministic).numpy()
        return choice, None

    @torch.no_grad()
    def _choose(self, seen: Seen, deterministic: bool) -> Tensor:
        """Return an index [B] into the actions of states, at least one, that all have some."""
        q = self._q(self.network, seen)
        if deterministic:
            weights = typical(seen.log_prior, self.draws)
            return greedy(posterior(q, weights, self.alpha), weights)
        return self._explore(q, propose(seen.log_prior, self.draws, self.generator))

    def _explore(self, q: Tensor, log_weights: Tensor) -> Tensor:
        """Draw from the posterior over the proposals."""
        return draw(posterior(q, log_weights, self.alpha).exp(), 1, self.generator).squeeze(1)

    # ---- learning ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def td_target(self, batch: TextBatch) -> Tensor:
        """Return r + gamma max Q_target(s', a') [B] over fresh proposals a' at s'; r alone where terminated."""
        proposed = propose(batch.following.log_prior, self.draws, self.generator)
        values = self._q(self.target, batch.following).masked_fill(proposed == -torch.inf, -torch.inf)
        best = values.amax(dim=1).masked_fill(batch.terminated, 0)
        return batch.reward + self.gamma * best

    def loss(self, batch: TextBatch) -> Tensor:
        """Return the loss of a batch, a scalar with a graph."""
        raise NotImplementedError

    def gradient_step(self, batch: TextBatch) -> float:
        """Take one step of AdamW with clipped gradients, and move the target where it is due; return the loss.

        Raises:
            NonFiniteLoss: it became NaN or infinite.
        """
        self.optimizer.zero_grad()
        loss = self.loss(batch)
        loss.backward()
        value = float(loss.detach())
        if not np.isfinite(value):
            raise NonFiniteLoss(
                "loss: it became NaN or infinite; lower learning_rate or cql_coef, or scale the rewards", self.n_updates
            )
        if self.weight_decay:
            self.optimizer.gather().parameter.mul_(1 - self.learning_rate * self.weight_decay)
        self.optimizer.clipped_step(self.max_grad_norm)
        self.n_updates += 1
        if self.n_updates % self.target_update_interval == 0:
            self.update_target()
        return value

    @torch.no_grad()
    def update_target(self) -> None:
        """Move the target network towards the network by `tau`; 1 copies it."""
        for old, new in zip(self.target.parameters(), self.network.parameters(), strict=True):
            old.lerp_(new, self.tau)

    def fit_inputs(self, states: Tensor, actions: Tensor) -> None:
        """Let both networks centre and scale texts by what the ones with these ids are."""
        for network in (self.network, self.target):
            network.fit_inputs(vectors(self.encoder, states), self.encoder.rows(actions))

    # ---- Stable-Baselines3's manners --------------------------------------------------------------------------

    @property
    def logger(self) -> Logger:
        """Return the logger that `learn` or `set_logger` has set."""
        if self._logger is None:
            raise UnsupportedArgument("logger: there is none yet; call learn, or set_logger")
        return self._logger

    def set_logger(self, logger: Logger) -> None:
        """Log to this one from now on."""
        self._logger, self._custom_logger = logger, True

    def get_env(self) -> Any:
        """Return the environment learnt from, None where there is none."""
        return None

    def save(self, path: str | Path) -> None:
        """Write networks, optimiser, counters, arguments and digests as one checked file, whole or not at all.

        Args:
            path: ".safetensors" is added where there is no suffix.

        Raises:
            NotSaved: the system could not write it; a file of before stands.
        """
        write_model(self, path)

    def _begin(
        self, total_timesteps: int, callback: Callbacks, name: str, reset_num_timesteps: bool, progress_bar: bool
    ) -> tuple[int, BaseCallback]:
        """Set up counters, logger and callbacks for `learn`; return the count of steps to end at, and the callback."""
        if reset_num_timesteps:
            self.num_timesteps = 0
        self._start_time, self._steps_at_start = time.time_ns(), self.num_timesteps
        if not self._custom_logger:
            self._logger = configure_logger(self.verbose, self.tensorboard_log, name, reset_num_timesteps)
        parts: list[Any] = callback if isinstance(callback, list) else [callback]
        made = [part if isinstance(part, BaseCallback) else ConvertCallback(part) for part in parts if part is not None]
        whole = CallbackList([*made, *([StepsBar()] if progress_bar else [])])
        whole.init_callback(self)  # type: ignore[arg-type]  # what callbacks read of a model is here
        return total_timesteps + self.num_timesteps, whole

    def _dump(self) -> None:
        """Write a row of the log."""
        seconds = max((time.time_ns() - self._start_time) / 1e9, sys.float_info.epsilon)
        record = self.logger.record
        record("train/n_updates", self.n_updates, exclude="tensorboard")
        record("train/learning_rate", self.learning_rate)
        record("time/fps", int((self.num_timesteps - self._steps_at_start) / seconds))
        record("time/time_elapsed", int(seconds), exclude="tensorboard")
        record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        for key, value in (self.prior.telemetry() if self.prior is not None else {}).items():
            record(key, value)
        self.logger.dump(step=self.num_timesteps)
