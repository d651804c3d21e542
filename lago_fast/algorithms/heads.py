"""What differs between policies, and nothing else: one class for each kind of distribution.

A head turns a Stable-Baselines3 actor-critic into plain tensors, samples, and calls its loss op. Gaussian and
categorical policies have a closed KL to a prior, the categorical one over texts with a mask of its actions; all others
go through the policy's own methods, without a prior.
Test: pytest tests/algorithms/test_heads.py
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from gymnasium import spaces
from stable_baselines3.common.distributions import CategoricalDistribution, DiagGaussianDistribution
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import Tensor

from lago_fast import ops
from lago_fast.algorithms.networks import PolicyNetworks
from lago_fast.algorithms.text_policy import TextActionPolicy
from lago_fast.buffers import Observations, RolloutBatch, RolloutBuffer
from lago_fast.errors import PriorMismatch
from lago_fast.priors.base import PriorOutput

# who replaces one of these decides what actions and values are
POLICY_METHODS = ("forward", "evaluate_actions", "extract_features", "predict_values", "_get_action_dist_from_latent")


class Acted(NamedTuple):
    actions: Tensor  # [B, ...], not clipped
    values: Tensor  # [B]
    log_prob: Tensor  # [B]
    outputs: tuple[Tensor, ...]  # what is stored for a KL as a reward


class LossBuffers:
    """What a loss returned last, which the next call on outputs of the same shape overwrites.

    Only on a CPU: a captured CUDA graph would go on writing to what was let go here.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._returned: Any = None

    def call(self, op: Callable[..., Any], inputs: Any, coefficients: Any, *, impl: str, **options: Any) -> Any:
        """Return an op's statistics and gradients, which hold until the next call."""
        like = inputs[0]
        if not like.is_cpu:
            return op(inputs, coefficients, impl=impl, **options)
        key = like.shape, like.dtype, impl
        out = self._returned if key == self._key else None
        self._returned = op(inputs, coefficients, impl=impl, out=out, **options)
        self._key = key
        return self._returned


class GaussianHead:
    """Diagonal Gaussian with a state-independent std, as Stable-Baselines3's `DiagGaussianDistribution`."""

    op = "ppo_kl_gaussian"
    kind = "gaussian"

    def __init__(self, policy: ActorCriticPolicy, space: spaces.Box, networks: PolicyNetworks) -> None:
        self.policy, self.networks, self._loss = policy, networks, LossBuffers()
        self.action_dim = math.prod(space.shape)
        self.action_shape: tuple[int, ...] = (self.action_dim,)
        self.widths = (self.action_dim, self.action_dim)

    def forward(self, observations: Observations) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (mean [B, D], log_std [D]) and values [B]."""
        mean, values = self.networks.forward(observations)
        return (mean, self.policy.log_std), values

    def act(self, observations: Observations, generator: torch.Generator | None = None) -> Acted:
        """Sample actions; None: by torch's own generator."""
        outputs, values = self.forward(observations)
        actions, log_prob = self.sample(outputs, generator)
        return Acted(actions, values, log_prob, outputs)

    def evaluate(self, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what the loss op differentiates by, and values [B]."""
        return self.forward(batch.observations)

    def sample(self, outputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return actions [B, D], not clipped, and their log-probabilities [B]."""
        mean, log_std = outputs
        noise = torch.empty_like(mean).normal_(generator=generator)
        log_prob = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)
        return mean + log_std.exp() * noise, log_prob

    def act_into(self, buffer: RolloutBuffer, t: int, rows: slice, generator: torch.Generator | None = None) -> bool:
        """Act for envs whose observations are stored at step t, and store what is said there.

        Returns:
            False, and nothing is done, where only `act` can.
        """
        return self.networks.act_into(buffer, t, rows, generator, self.policy.log_std)

    def prior_outputs(self, prior: PriorOutput) -> tuple[Tensor, ...]:
        """Return the prior's (mean, log_std), [B, D] each."""
        if prior.mean is None or prior.log_std is None:
            raise PriorMismatch("prior: a Box action space needs a prior that returns mean and log_std")
        return prior.mean, prior.log_std.expand_as(prior.mean)

    def prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...], **options: Any) -> Tensor:
        """Return the exact KL [B] in nats."""
        return ops.prior_kl_gaussian(*outputs, *prior, **options)

    def backward(self, outputs: tuple[Tensor, ...], values: Tensor, grads: tuple[Tensor, ...]) -> None:
        """Write the gradients of all parameters, which are zero before, given the loss's for outputs and values."""
        if not self.networks.native:
            differentiate((*outputs, values), grads)
            return
        mean_grad, log_std_grad, values_grad = grads
        self.networks.backward(mean_grad, values_grad)
        assert self.policy.log_std.grad is not None
        self.policy.log_std.grad.copy_(log_std_grad)

    def loss_and_grads(
        self,
        outputs: tuple[Tensor, ...],
        values: Tensor,
        batch: RolloutBatch,
        coefficients: dict[str, Any],
        **options: Any,
    ) -> tuple[ops.GaussianOutputs, ops.GaussianGrads]:
        """Return the op's statistics and its gradients for (mean, log_std, values), which hold until the next call."""
        prior_mean, prior_log_std = batch.prior
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
            prior_mean,
            prior_log_std,
            kl_weight=batch.kl_weight,
        )
        chosen = ops.GaussianCoefficients(**coefficients)
        return self._loss.call(ops.ppo_kl_gaussian_loss_and_grads, inputs, chosen, **options)


class CategoricalHead:
    """Categorical over the actions of a Discrete space."""

    op = "ppo_kl_categorical"
    kind = "categorical"

    def __init__(self, policy: ActorCriticPolicy, space: spaces.Discrete, networks: PolicyNetworks) -> None:
        self.policy, self.networks, self._loss = policy, networks, LossBuffers()
        self.action_dim = int(space.n)
        self.action_shape: tuple[int, ...] = ()
        self.widths = (self.action_dim,)

    def forward(self, observations: Observations) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (logits [B, A],) and values [B]."""
        logits, values = self.networks.forward(observations)
        return (logits,), values

    def act(self, observations: Observations, generator: torch.Generator | None = None) -> Acted:
        """Sample actions; None: by torch's own generator."""
        outputs, values = self.forward(observations)
        actions, log_prob = self.sample(outputs, generator)
        return Acted(actions, values, log_prob, outputs)

    def evaluate(self, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return what the loss op differentiates by, and values [B]."""
        return self.forward(batch.observations)

    def sample(self, outputs: tuple[Tensor, ...], generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Return actions [B] and their log-probabilities [B]."""
        log_probs = outputs[0].log_softmax(dim=-1)
        actions = torch.multinomial(log_probs.exp(), 1, generator=generator)
        return actions.squeeze(-1), log_probs.gather(-1, actions).squeeze(-1)

    def act_into(self, buffer: RolloutBuffer, t: int, rows: slice, generator: torch.Generator | None = None) -> bool:
        """Act for envs whose observations are stored at step t, and store what is said there.

        Returns:
            False, and nothing is done, where only `act` can.
        """
        return self.networks.act_into(buffer, t, rows, generator)

    def action_mask(self, observations: Observations) -> Tensor | None:
        """Return True where an action is allowed, [B, A] bool; None: every action is."""
        del observations
        return None

    def prior_outputs(self, prior: PriorOutput) -> tuple[Tensor, ...]:
        """Return the prior's (log_probs [B, A],)."""
        if prior.log_probs is None:
            raise PriorMismatch("prior: a Discrete action space needs a prior that returns log_probs")
        return (prior.log_probs,)

    def prior_kl(self, outputs: tuple[Tensor, ...], prior: tuple[Tensor, ...], **options: Any) -> Tensor:
        """Return the exact KL [B] in nats."""
        return ops.prior_kl_categorical(*outputs, *prior, **options)

    def backward(self, outputs: tuple[Tensor, ...], values: Tensor, grads: tuple[Tensor, ...]) -> None:
        """Write the gradients of all parameters, which are zero before, given the loss's for outputs and values."""
        if self.networks.native:
            self.networks.backward(*grads)
        else:
            differentiate((*outputs, values), grads)

    def loss_and_grads(
        self,
        outputs: tuple[Tensor, ...],
        values: Tensor,
        batch: RolloutBatch,
        coefficients: dict[str, Any],
        **options: Any,
    ) -> tuple[ops.CategoricalOutputs, ops.CategoricalGrads]:
        """Return the op's statistics and its gradients for (logits, values), which hold until the next call."""
        (prior_log_probs,) = batch.prior
        inputs = ops.CategoricalInputs(
            outputs[0].detach(),
            values.detach(),
            batch.actions,
            batch.old_log_prob,
            batch.advantages,
            batch.returns,
            batch.old_values,
            batch.weight,
            prior_log_probs,
            action_mask=self.action_mask(batch.observations),
            kl_weight=batch.kl_weight,
        )
        chosen = ops.CategoricalCoefficients(**coefficients)
        return self._loss.call(ops.ppo_kl_categorical_loss_and_grads, inputs, chosen, **options)


class TextHead(CategoricalHead):
    """Categorical over the admissible actions of a text game: an observation says which ones these are."""

    policy: TextActionPolicy

    def forward(self, observations: Observations) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (logits [B, A],), which mean nothing where an action is masked, and values [B]."""
        assert isinstance(observations, Tensor)
        logits, values = self.policy.logits_and_values(observations)
        return (logits,), values

    def act(self, observations: Observations, generator: torch.Generator | None = None) -> Acted:
        """Sample allowed actions, by torch's own generator unless another is given."""
        outputs, values = self.forward(observations)
        masked = outputs[0].masked_fill(~self.action_mask(observations), -torch.inf)
        actions, log_prob = self.sample((masked,), generator)
        return Acted(actions, values, log_prob, outputs)

    def action_mask(self, observations: Observations) -> Tensor:
        """Return True where an action is admissible, [B, A] bool."""
        assert isinstance(observations, Tensor)
        return self.policy.action_mask(observations)

    def fit_inputs(self, observations: Observations) -> None:
        """Let the first rollout's texts [T, N, 2 + A] scale the networks' inputs."""
        assert isinstance(observations, Tensor)
        self.policy.fit_inputs(observations.flatten(0, 1))


class PolicysOwnHead:
    """Any distribution that the policy can sample and evaluate by itself; it has no KL to a prior."""

    op = "ppo"
    kind = "other"
    networks = None  # the policy's own methods are called
    widths: tuple[int, ...] = ()

    def __init__(self, policy: ActorCriticPolicy) -> None:
        self.policy, space = policy, policy.action_space
        self.action_dim = math.prod(space.shape or ())
        self.action_shape: tuple[int, ...] = (self.action_dim,) if space.shape else ()

    def act(self, observations: Observations, generator: torch.Generator | None = None) -> Acted:
        """Sample actions; the policy does so by torch's own generator."""
        assert generator is None
        actions, values, log_prob = self.policy(observations)
        return Acted(actions.reshape(-1, *self.action_shape), values.flatten(), log_prob, ())

    def evaluate(self, batch: RolloutBatch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return (log-probabilities [B], entropy [B]) of the stored actions, and values [B]."""
        values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
        # without a closed form the entropy is estimated from the actions taken, as in Stable-Baselines3
        return (log_prob, -log_prob if entropy is None else entropy), values.flatten()

    def backward(self, outputs: tuple[Tensor, ...], values: Tensor, grads: tuple[Tensor, ...]) -> None:
        """Write the gradients of all parameters, which are zero before, given the loss's for outputs and values."""
        differentiate((*outputs, values), grads)

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


def differentiate(outputs: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Run autograd back from outputs with these gradients; an output that only frozen parameters made is left out."""
    pairs = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
    torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])


def decides_itself(policy: ActorCriticPolicy) -> bool:
    """Tell whether a policy's class or the policy alone replaces what Stable-Baselines3's policies do."""
    replaced = (getattr(type(policy), name) is not getattr(ActorCriticPolicy, name) for name in POLICY_METHODS)
    return any(replaced) or any(name in vars(policy) for name in POLICY_METHODS)


def make_head(policy: ActorCriticPolicy, mlp_impl: str = "auto") -> Head:
    """Return the head of a policy, its networks computed by that implementation of the op `mlp`."""
    space = policy.action_space
    networks = PolicyNetworks(policy, ops.resolve("mlp", policy.device.type, mlp_impl)[0])
    if isinstance(policy, TextActionPolicy):
        assert isinstance(space, spaces.Discrete)
        return TextHead(policy, space, networks)
    if not decides_itself(policy):
        if isinstance(space, spaces.Box) and type(policy.action_dist) is DiagGaussianDistribution:
            return GaussianHead(policy, space, networks)
        if isinstance(space, spaces.Discrete) and type(policy.action_dist) is CategoricalDistribution:
            return CategoricalHead(policy, space, networks)
    return PolicysOwnHead(policy)
