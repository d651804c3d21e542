"""TextActionPolicy: an actor and a critic over frozen vectors of texts, for `FastKLPPO` on text games.

A state is a row of numbers, [2 + A] int64: the ids of the instruction, of the observation and of the admissible
actions, and PADDING behind them. The actor's logit of an action is f(e(state), e(action)), the critic's value
v(e(state)); f is the network that `DQNPrior` calls Q. Padding is masked: it is never chosen, and has no gradient.

Both output layers are zero at first: the first rollout is played uniformly whatever the inputs are scaled by, so that
its texts can centre and scale them (`fit_inputs`) without making anything stale that it holds.
Test: pytest tests/algorithms/test_text_policy.py
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from stable_baselines3.common.distributions import Distribution
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.vec_env import VecEnv
from torch import Tensor, nn

from lago_fast.algorithms.lanes import array_lane_of
from lago_fast.algorithms.text_q import ACTIVATIONS, TextQNetwork, vectors
from lago_fast.algorithms.text_states import PADDING, StateReader, TextState, playing_rows
from lago_fast.errors import EncoderMismatch, UnsupportedArgument
from lago_fast.priors.text_base import TextEncoder

STATE = 2  # columns before the actions


class TextActionPolicy(ActorCriticPolicy):
    """An actor-critic policy whose actions are texts, as many as a state has.

    Args:
        observation_space, action_space: of the array lane of a text game (`lago_fast.text_lane.TextLane`).
        lr_schedule: as in Stable-Baselines3.
        width: Z, of the encoder's vectors.
        net_arch: widths of the hidden layers of actor and critic, at least one.
        activation: "relu" or "tanh".
        optimizer_class, optimizer_kwargs: as in Stable-Baselines3.
        use_sde: refused.

    Raises:
        UnsupportedArgument: a value that cannot be honoured.
    """

    def __init__(
        self,
        observation_space: Any,
        action_space: Any,
        lr_schedule: Any,
        width: int = 384,
        net_arch: Sequence[int] = (64, 64),
        activation: str = "relu",
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.Adam,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        if use_sde:
            raise UnsupportedArgument("use_sde: a choice among texts has no such noise; leave it out")
        self.width, self.widths, self.activation = width, tuple(net_arch), activation
        self._encoder: TextEncoder | None = None
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Any) -> None:
        self.actor = TextQNetwork(self.width, self.widths, self.activation)
        layers: list[nn.Module] = []
        for before, after in zip((STATE * self.width, *self.widths), (*self.widths, 1), strict=True):
            layers += [nn.Linear(before, after), ACTIVATIONS[self.activation]()]
        self.critic = nn.Sequential(*layers[:-1])
        for output in (self.actor.rest[-1], self.critic[-1]):
            for parameter in output.parameters():
                nn.init.zeros_(parameter)
        self.register_buffer("encoder_digest", torch.zeros(32, dtype=torch.uint8))
        # Stable-Baselines3's own type is a union that mypy cannot call
        self.optimizer = self.optimizer_class(self.parameters(), lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _get_constructor_parameters(self) -> dict[str, Any]:
        own = {"width": self.width, "net_arch": self.widths, "activation": self.activation}
        theirs = ("observation_space", "action_space", "optimizer_class", "optimizer_kwargs")
        # the schedule is not kept by Stable-Baselines3 either
        return {**{name: getattr(self, name) for name in theirs}, **own, "lr_schedule": self._dummy_schedule}

    # ---- the texts --------------------------------------------------------------------------------------------

    @property
    def encoder(self) -> TextEncoder:
        """Return what turns ids into vectors."""
        if self._encoder is None:
            raise UnsupportedArgument(
                "encoder: this policy has none yet; load it with load_text_ppo, give the model an env, or call "
                "policy.attach(encoder)"
            )
        return self._encoder

    def attach(self, encoder: TextEncoder) -> None:
        """Read vectors from this encoder from now on.

        Raises:
            EncoderMismatch: vectors of another width, or another encoder than the one of the training.
        """
        if encoder.width != self.width:
            raise EncoderMismatch(
                f"encoder: its vectors have {encoder.width} numbers, the policy reads {self.width}; pass "
                f'policy_kwargs={{"width": {encoder.width}}}'
            )
        own = torch.frombuffer(bytearray(hashlib.sha256(encoder.digest.encode()).digest()), dtype=torch.uint8)
        kept = self.get_buffer("encoder_digest")
        if bool(kept.any()) and not torch.equal(kept.cpu(), own):
            raise EncoderMismatch("encoder: this policy was trained on the vectors of another one; pass the same one")
        kept.copy_(own)
        self._encoder = encoder

    @torch.no_grad()
    def fit_inputs(self, observations: Tensor) -> None:
        """Centre and scale both networks' inputs by the texts of states [B, 2 + A]; once, later calls do nothing."""
        if not self.actor.get_buffer("is_fitted"):
            numbers = observations.long()
            states, actions = numbers[:, :STATE].unique(dim=0), numbers[:, STATE:]
            actions = actions[actions != PADDING].unique()
            self.actor.fit_inputs(vectors(self.encoder, states), self.encoder.rows(actions))

    # ---- what FastKLPPO's head asks ---------------------------------------------------------------------------

    def logits_and_values(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [B, A], which mean nothing where padded, and values [B]."""
        numbers = observations.long()
        states = vectors(self.encoder, numbers[:, :STATE])
        distinct, which = torch.unique(numbers[:, STATE:].clamp(min=0), return_inverse=True)
        return self.actor(states, self.encoder.rows(distinct), which), self._values(states)

    def _values(self, states: Tensor) -> Tensor:
        mean, spread = self.actor.get_buffer("state_mean"), self.actor.get_buffer("state_spread")
        values: Tensor = self.critic((states - mean) / spread)
        return values.squeeze(-1)

    def action_mask(self, observations: Tensor) -> Tensor:
        """Return True where an action is admissible, [B, A] bool.

        Where an episode is over there is none: the first column is allowed, and what is chosen there is ignored.
        """
        mask = observations[:, STATE:] != PADDING
        mask[:, 0] |= ~mask.any(dim=1)
        return mask

    # ---- Stable-Baselines3's entries --------------------------------------------------------------------------

    def _distribution(self, logits: Tensor, observations: Tensor) -> Distribution:
        masked = logits.masked_fill(~self.action_mask(observations), -torch.inf)
        return self.action_dist.proba_distribution(action_logits=masked)

    def forward(self, obs: Tensor, deterministic: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return actions [B], values [B, 1] and log-probabilities [B]."""
        logits, values = self.logits_and_values(obs)
        distribution = self._distribution(logits, obs)
        actions = distribution.get_actions(deterministic=deterministic)
        return actions, values[:, None], distribution.log_prob(actions)

    def evaluate_actions(self, obs: Any, actions: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values [B, 1], log-probabilities [B] and entropies [B]."""
        logits, values = self.logits_and_values(obs)
        distribution = self._distribution(logits, obs)
        return values[:, None], distribution.log_prob(actions), distribution.entropy()

    def get_distribution(self, obs: Any) -> Distribution:
        """Return the distribution over the admissible actions."""
        return self._distribution(self.logits_and_values(obs)[0], obs)

    def predict_values(self, obs: Any) -> Tensor:
        """Return values [B, 1]."""
        return self._values(vectors(self.encoder, obs[:, :STATE].long()))[:, None]

    def predict(
        self,
        observation: Any,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return for each of N states the index [N] int64 of an admissible action, and None.

        Args:
            observation: states as texts (`lago_fast.envs.text_env.TextState`), of any number of actions; one without
                actions, of which the episode is over, gets 0. Or rows of numbers, as Stable-Baselines3 passes them.
            state, episode_start, deterministic: as in Stable-Baselines3.
        """
        if not hasattr(observation, "admissible"):
            return super().predict(observation, state, episode_start, deterministic)
        choice, rows = np.zeros(len(observation.observation), dtype=np.int64), playing_rows(observation)
        if len(rows):
            self.set_training_mode(False)
            with torch.no_grad():
                distribution = self.get_distribution(numbered(self.encoder, observation, rows)[rows])
            choice[rows] = distribution.get_actions(deterministic=deterministic).cpu().numpy()
        return choice, state


def attach_encoder(policy: ActorCriticPolicy, env: VecEnv | None) -> None:
    """Let a policy over texts read by the encoder of an env's array lane; other policies have none.

    Raises:
        UnsupportedArgument: the env's lane has no encoder.
        EncoderMismatch: it is not the one of the training.
    """
    if not isinstance(policy, TextActionPolicy) or env is None:
        return
    encoder = getattr(array_lane_of(env), "encoder", None)
    if encoder is None:
        raise UnsupportedArgument("env: TextActionPolicy needs the lane of a text game; make it with make_text_ppo")
    policy.attach(encoder)


def numbered(encoder: TextEncoder, state: TextState, rows: np.ndarray) -> Tensor:
    """Return states as rows of numbers [N, 2 + A] int64, A the largest number of actions in `rows`.

    States not in `rows` are not looked at and have no actions.
    """
    seen = StateReader(encoder, None).read(state, rows)
    return torch.cat([seen.state, seen.actions], dim=1)
