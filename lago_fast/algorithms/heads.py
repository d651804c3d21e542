"""What differs between a Gaussian and a categorical policy, and nothing else: one class each.

A head turns a Stable-Baselines3 actor-critic into plain tensors, samples, and calls its loss op.
Test: pytest tests/algorithms/test_heads.py
"""

import math
from typing import Any

import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lago_fast import ops
from lago_fast.buffers import RolloutBatch
from lago_fast.errors import PriorMismatch, UnsupportedArgument
from lago_fast.priors.base import PriorOutput


def latents(policy: ActorCriticPolicy, observations: Tensor) -> tuple[Tensor, Tensor]:
    """Return the actor's and the critic's last hidden layers, [B, H] each."""
    features: Any = policy.extract_features(observations)
    if policy.share_features_extractor:
        return policy.mlp_extractor(features)
    return policy.mlp_extractor.forward_actor(features[0]), policy.mlp_extractor.forward_critic(features[1])


class GaussianHead:
    """Diagonal Gaussian with a state-independent std, as Stable-Baselines3's `DiagGaussianDistribution`."""

    op = "ppo_kl_gaussian"
    kind = "gaussian"

    def __init__(self, space: spaces.Box) -> None:
        self.action_dim = math.prod(space.shape)
        self.action_shape: tuple[int, ...] = (self.action_dim,)
        self.widths = (self.action_dim, self.action_dim)

    def forward(self, policy: ActorCriticPolicy, observations: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (mean [B, D], log_std [D]) and values [B]."""
        latent_pi, latent_vf = latents(policy, observations)
        outputs = (policy.action_net(latent_pi), policy.log_std)
        return outputs, policy.value_net(latent_vf).flatten()

    def sample(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return actions [B, D], not clipped, and their log-probabilities [B]."""
        mean, log_std = outputs
        noise = torch.randn_like(mean)
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)
        return mean + log_std.exp() * noise, log_prob

    def prior_outputs(self, prior: PriorOutput) -> tuple[Tensor, ...]:
        """Return the prior's (mean, log_std), [B, D] each."""
        if prior.mean is None or prior.log_std is None:
            raise PriorMismatch("prior: a Box action space needs a prior that returns mean and log_std")
        return prior.mean, prior.log_std.expand_as(prior.mean)

    def prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...], **options: Any) -> Tensor:
        """Return the exact KL [B] in nats."""
        return ops.prior_kl_gaussian(*outputs, *prior, **options)

    def loss_and_grads(
        self,
        outputs: tuple[Tensor, ...],
        values: Tensor,
        batch: RolloutBatch,
        coefficients: dict[str, Any],
        **options: Any,
    ) -> tuple[ops.GaussianOutputs, ops.GaussianGrads]:
        """Return the op's statistics and its gradients for (mean, log_std, values)."""
        inputs = ops.GaussianInputs(
            outputs[0].detach(),
            outputs[1].detach(),
            values.detach(),
            batch.actions,
            batch.old_log_prob,
            batch.advantages,
            batch.returns,
            batch.old_values,
            batch.weight,
            *batch.prior,
        )
        return ops.ppo_kl_gaussian_loss_and_grads(inputs, ops.GaussianCoefficients(**coefficients), **options)


class CategoricalHead:
    """Categorical over the actions of a Discrete space."""

    op = "ppo_kl_categorical"
    kind = "categorical"

    def __init__(self, space: spaces.Discrete) -> None:
        self.action_dim = int(space.n)
        self.action_shape: tuple[int, ...] = ()
        self.widths = (self.action_dim,)

    def forward(self, policy: ActorCriticPolicy, observations: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (logits [B, A],) and values [B]."""
        latent_pi, latent_vf = latents(policy, observations)
        return (policy.action_net(latent_pi),), policy.value_net(latent_vf).flatten()

    def sample(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return actions [B] and their log-probabilities [B]."""
        log_probs = outputs[0].log_softmax(dim=-1)
        actions = torch.multinomial(log_probs.exp(), 1)
        return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)

    def prior_outputs(self, prior: PriorOutput) -> tuple[Tensor, ...]:
        """Return the prior's (log_probs [B, A],)."""
        if prior.log_probs is None:
            raise PriorMismatch("prior: a Discrete action space needs a prior that returns log_probs")
        return (prior.log_probs,)

    def prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...], **options: Any) -> Tensor:
        """Return the exact KL [B] in nats."""
        return ops.prior_kl_categorical(*outputs, *prior, **options)

    def loss_and_grads(
        self,
        outputs: tuple[Tensor, ...],
        values: Tensor,
        batch: RolloutBatch,
        coefficients: dict[str, Any],
        **options: Any,
    ) -> tuple[ops.CategoricalOutputs, ops.CategoricalGrads]:
        """Return the op's statistics and its gradients for (logits, values)."""
        inputs = ops.CategoricalInputs(
            outputs[0].detach(),
            values.detach(),
            batch.actions,
            batch.old_log_prob,
            batch.advantages,
            batch.returns,
            batch.old_values,
            batch.weight,
            *batch.prior,
        )
        return ops.ppo_kl_categorical_loss_and_grads(inputs, ops.CategoricalCoefficients(**coefficients), **options)


def make_head(space: spaces.Space[Any]) -> GaussianHead | CategoricalHead:
    """Return the head of an action space.

    Raises:
        UnsupportedArgument: the space has no loss op.
    """
    if isinstance(space, spaces.Box):
        return GaussianHead(space)
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(space)
    raise UnsupportedArgument(
        f"env: action space {type(space).__name__} has no loss op; Box and Discrete have. "
        "Use stable_baselines3.PPO for it, or flatten it to Discrete."
    )
