"""CQLPrior: conservative Q learning from recorded transitions, over what a frozen language prior proposes.

The loss of a row is 0.5 TD^2 + cql_coef (logsumexp Q(s, .) - Q(s, a_data)). The log-sum-exp runs over the proposals
at s and a_data. The paper's formula leaves a_data out where it is not proposed: the term then has no lower bound, and
its gradient raises Q(s, a_data) by the same amount for ever, most where the prior knows the action to be bad. With
a_data in the sum the term is the cross-entropy of a_data against softmax Q, at least 0, and for proposals of every
admissible action it is CQL's.
Sources: CQL, arXiv 2006.04779; proposals, arXiv 2410.07927 (CQL-Prior). Test: pytest tests/algorithms/test_cql_prior.py
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from lago_fast.algorithms.proposals import propose
from lago_fast.algorithms.text_learner import Callbacks, TextLearner
from lago_fast.algorithms.text_replay import TextBatch, TextReplayBuffer
from lago_fast.algorithms.text_saving import built, put_back, read_model
from lago_fast.algorithms.text_states import StateReader, States
from lago_fast.errors import DemonstrationError, UnsupportedArgument
from lago_fast.priors.text_base import TextActionPrior, TextEncoder

# what a saved model does not hold of the constructor's names
NOT_KEPT = {"self", "transitions", "prior", "encoder", "__class__"}


# what is read of recorded transitions beside the choice
READ = ("instruction", "observation", "admissible", "reward", "next_observation", "next_admissible", "terminated")


class Transitions(Protocol):
    """n recorded transitions; `lago_fast.envs.text_transitions.TextTransitions` is the contract."""

    @property
    def instruction(self) -> list[str]: ...
    @property
    def observation(self) -> list[str]: ...
    @property
    def admissible(self) -> list[tuple[str, ...]]: ...
    @property
    def choice(self) -> np.ndarray: ...
    @property
    def reward(self) -> np.ndarray: ...
    @property
    def next_observation(self) -> list[str]: ...
    @property
    def next_admissible(self) -> list[tuple[str, ...]]: ...
    @property
    def terminated(self) -> np.ndarray: ...


class CQLPrior(TextLearner):
    """Offline Q learning over text actions; without a prior, CQL over all admissible actions.

    Args:
        transitions: recorded ones, read once; None: only to predict.
        prior: frozen, asked once about each distinct state; None: every admissible action is proposed.
        encoder: frozen, of the texts.
        cql_coef: weight of the conservative term; 0 is fitted Q iteration over proposals.
        k, alpha, learning_rate, batch_size, tau, gamma, max_grad_norm, weight_decay, net_arch, activation,
        tensorboard_log, verbose, seed: as of `DQNPrior`; alpha counts for `predict` alone.
        target_update_interval: gradient steps between updates of the target network.

    Raises:
        DemonstrationError: no transitions, or one whose action is not admissible.
        UnsupportedArgument: a value that cannot be honoured.
        TrainablePrior: the prior has a parameter that requires a gradient.
    """

    def __init__(
        self,
        transitions: Transitions | None,
        prior: TextActionPrior | None,
        encoder: TextEncoder,
        *,
        k: int | None = 5,
        alpha: float = 0.1,
        cql_coef: float = 1.0,
        learning_rate: float = 5e-4,
        batch_size: int = 128,
        tau: float = 0.005,
        gamma: float = 0.99,
        target_update_interval: int = 1,
        max_grad_norm: float = 1.0,
        weight_decay: float = 0.01,
        net_arch: Sequence[int] = (64, 64),
        activation: str = "relu",
        tensorboard_log: str | None = None,
        verbose: int = 0,
        seed: int | None = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in NOT_KEPT}
        super().__init__(prior, encoder, {**arguments, "net_arch": list(net_arch)})
        if not 0 <= cql_coef < float("inf"):
            raise UnsupportedArgument(f"cql_coef={cql_coef}: give 0 or more")
        self.cql_coef = cql_coef
        self.data: TextReplayBuffer | None = None
        if transitions is not None:
            self.data = _stored(transitions, self.reader)
            self.fit_inputs(*self.data.distinct())

    @classmethod
    def load(
        cls,
        path: str | Path,
        encoder: TextEncoder,
        *,
        prior: TextActionPrior | None = None,
        transitions: Transitions | None = None,
    ) -> Self:
        """Return a saved model; no code from the file is run.

        Args:
            path: of the file, with or without its suffix.
            encoder, prior: the ones that it was trained with.
            transitions: to go on learning.

        Raises:
            NoCheckpoint, CorruptFile, HashMismatch: there is no such file, or it is damaged.
            EncoderMismatch, PriorMismatch: another encoder or prior.
            UnsupportedArgument: the file holds a model of another class.
        """
        kept, arguments = read_model(path, cls.__name__, encoder, prior)
        model = built(partial(cls, transitions, prior, encoder), kept, arguments, path)
        put_back(model, kept, path)
        return model

    def learn(
        self,
        total_timesteps: int,
        callback: Callbacks = None,
        log_interval: int | None = 100,
        tb_log_name: str = "CQLPrior",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Take `total_timesteps` gradient steps, each of which is a step to callbacks and to the log.

        Args:
            callback: one, a list, or a function of (locals, globals); one that returns False ends learning.
            log_interval: gradient steps between two rows of the log; None: no rows.

        Raises:
            UnsupportedArgument: there are no transitions.
            NonFiniteLoss: the loss became NaN or infinite.
        """
        if self.data is None:
            raise UnsupportedArgument("transitions: there are none to learn from; pass them to the constructor or load")
        total_timesteps, callback = self._begin(
            total_timesteps, callback, tb_log_name, reset_num_timesteps, progress_bar
        )
        callback.on_training_start(locals(), globals())
        while self.num_timesteps < total_timesteps:
            loss = self.gradient_step(self.data.sample(self.batch_size, self.generator))
            self.logger.record_mean("train/loss", loss)
            self.num_timesteps += 1
            if not callback.on_step():
                break
            if log_interval is not None and self.num_timesteps % log_interval == 0:
                self._dump()
        callback.on_training_end()
        return self

    def loss(self, batch: TextBatch) -> Tensor:
        """Return the mean of 0.5 TD^2 + cql_coef (logsumexp Q(s, .) - Q(s, a_data)) over the batch."""
        q = self._q(self.network, batch.seen)
        chosen = batch.choice[:, None]
        of_data = q.gather(1, chosen).squeeze(1)
        td = 0.5 * (of_data - self.td_target(batch)).square()
        proposed = propose(batch.seen.log_prior, self.draws, self.generator) > -torch.inf
        proposed = proposed.scatter(1, chosen, True)
        gap = q.masked_fill(~proposed, -torch.inf).logsumexp(dim=1) - of_data
        if self._logger is not None:
            self._logger.record_mean("train/cql_gap", float(gap.detach().mean()))
        return (td + self.cql_coef * gap).mean()


def _stored(transitions: Transitions, reader: StateReader) -> TextReplayBuffer:
    """Return transitions as numbers, after reading each distinct state once."""
    rows = len(transitions.choice)
    if rows == 0:
        raise DemonstrationError("transitions: they are empty; record at least one episode")
    for name in READ:
        length = len(getattr(transitions, name))
        if length != rows:
            raise DemonstrationError(f"{name}: {length} rows beside {rows} choices; give one each")
    if not np.isfinite(transitions.reward).all():
        raise DemonstrationError("reward: NaN or infinity; leave such episodes out, or record them again")
    for row, (choice, actions) in enumerate(zip(transitions.choice.tolist(), transitions.admissible, strict=True)):
        if not 0 <= choice < len(actions):
            raise DemonstrationError(
                f"transitions: the action of row {row}, number {choice}, is not among its {len(actions)} admissible "
                "ones; leave its episode out, or record it again"
            )
    number: dict[tuple[Any, ...], int] = {}

    def numbered(observation: list[str], admissible: list[tuple[str, ...]]) -> Tensor:
        keys = zip(transitions.instruction, observation, map(tuple, admissible), strict=True)
        return torch.tensor([number.setdefault(key, len(number)) for key in keys])

    now = numbered(transitions.observation, transitions.admissible)
    following = numbered(transitions.next_observation, transitions.next_admissible)
    states = States(*map(list, zip(*number, strict=True)))
    read_too = np.ones(len(number), dtype=bool)
    ended = torch.from_numpy(np.asarray(transitions.terminated, dtype=bool))
    # what follows a terminated row is read only where it was met on the way, too
    read_too[following[ended].numpy()] = False
    read_too[now.numpy()] = True
    read_too[following[~ended].numpy()] = True
    seen = reader.read(states, np.flatnonzero(read_too))
    data = TextReplayBuffer(rows, seen.actions.shape[1])
    after = seen.take(following)
    after = after._replace(log_prior=after.log_prior.masked_fill(ended[:, None], -torch.inf))
    reward = torch.from_numpy(transitions.reward.astype(np.float32))
    choice = torch.from_numpy(np.asarray(transitions.choice, dtype=np.int64))
    data.add(TextBatch(seen.take(now), choice, reward, after, ended))
    return data
