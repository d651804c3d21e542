"""What differs between policies, and nothing else: one class for each kind of distribution.

A head turns a Stable-Baselines3 actor-critic into plain tensors, samples, and calls its loss op. Gaussian and
categorical policies have a closed KL to a prior; all others go through the policy's own methods, without a prior.
Test: pytest tests/algorithms/test_heads.py
"""

import math
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lago_fast import ops
from lago_fast.buffers import Observations, RolloutBatch
from lago_fast.errors import PriorMismatch
from lago_fast.priors.base import PriorOutput

# a subclass that replaces one of these decides itself what its actions and values are
POLICY_METHODS = ("forward", "evaluate_actions", "extract_features", "predict_values", "_get_action_dist_from_latent")


class Acted(NamedTuple):
    actions: Tensor  # [B, ...], not clipped
    values: Tensor  # [B]
    log_prob: Tensor  # [B]
    outputs: tuple[Tensor, ...]  # what is stored for a KL as a reward


def latents(policy: ActorCriticPolicy, observations: Observations) -> tuple[Tensor, Tensor]:
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

    def forward(self, policy: ActorCriticPolicy, observations: Observations) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (mean [B, D], log_std [D]) and values [B]."""
        latent_pi, latent_vf = latents(policy, observations)
        outputs = (policy.action_net(latent_pi), policy.log_std)
        return outputs, policy.value_net(latent_vf).flatten()

    def act(self, policy: ActorCriticPolicy, observations: Observations) -> Acted:
        """Sample actions."""
        outputs, values = self.forward(policy, observations)
        actions, log_prob = self.sample(outputs)
        return Acted(actions, values, log_prob, outputs)

    def evaluate(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what the loss op differentiates by, and values [B]."""
        return self.forward(policy, batch.observations)

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

    def forward(self, policy: ActorCriticPolicy, observations: Observations) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (logits [B, A],) and values [B]."""
        latent_pi, latent_vf = latents(policy, observations)
        return (policy.action_net(latent_pi),), policy.value_net(latent_vf).flatten()

    def act(self, policy: ActorCriticPolicy, observations: Observations) -> Acted:
        """Sample actions."""
        outputs, values = self.forward(policy, observations)
        actions, log_prob = self.sample(outputs)
        return Acted(actions, values, log_prob, outputs)

    def evaluate(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what the loss op differentiates by, and values [B]."""
        return self.forward(policy, batch.observations)

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


class PolicysOwnHead:
    """Any distribution that the policy can sample and evaluate by itself; it has no KL to a prior."""

    op = "ppo"
    kind = "other"
    widths: tuple[int, ...] = ()

    def __init__(self, space: spaces.Space[Any]) -> None:
        self.action_shape: tuple[int, ...] = space.shape or ()
        self.action_dim = math.prod(self.action_shape)

    def act(self, policy: ActorCriticPolicy, observations: Observations) -> Acted:
        """Sample actions."""
        actions, values, log_prob = policy(observations)
        return Acted(actions, values.flatten(), log_prob, ())

    def evaluate(self, policy: ActorCriticPolicy, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (log-probabilities [B], entropy [B]) of the stored actions, and values [B]."""
        values, log_prob, entropy = policy.evaluate_actions(batch.observations, batch.actions)
        # without a closed form the entropy is estimated from the actions taken, as in Stable-Baselines3
        return (log_prob, -log_prob if entropy is None else entropy), values.flatten()

    def loss_and_grads(
        self,
        outputs: tuple[Tensor, ...],
        values: Tensor,
        batch: RolloutBatch,
        coefficients: dict[str, Any],
        *,
        normalize_advantage: bool,
        impl: str,
        **of_the_prior: Any,
    ) -> tuple[ops.PPOOutputs, ops.PPOGrads]:
        """Return the op's statistics and its gradients for (log_prob, entropy, values)."""
        del of_the_prior  # there is none
        inputs = ops.PPOInputs(
            outputs[0].detach(),
            outputs[1].detach(),
            values.detach(),
            batch.old_log_prob,
            batch.advantages,
            batch.returns,
            batch.old_values,
            batch.weight,
        )
        chosen = ops.PPOCoefficients(**{name: coefficients[name] for name in ops.PPOCoefficients._fields})
        return ops.ppo_loss_and_grads(inputs, chosen, normalize_advantage=normalize_advantage, impl=impl)


Head = GaussianHead | CategoricalHead | PolicysOwnHead


def make_head(policy: ActorCriticPolicy) -> Head:
    """Return the head of a policy."""
    space, own = policy.action_space, type(policy)
    if all(getattr(own, name) is getattr(ActorCriticPolicy, name) for name in POLICY_METHODS):
        if isinstance(space, spaces.Box) and type(policy.action_dist) is DiagGaussianDistribution:
            return GaussianHead(space)
        if isinstance(space, spaces.Discrete) and type(policy.action_dist) is CategoricalDistribution:
            return CategoricalHead(space)
    return PolicysOwnHead(space)
