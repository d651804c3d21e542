"""A policy's two networks, actor and critic: in native code where they are plain, else by PyTorch's autograd.

Plain is what Stable-Baselines3's MlpPolicy makes of a vector of floats: Flatten, Linear layers with tanh or ReLU
between them, on a CPU, trained by FlatAdam. Everything else runs as it always did.
Test: pytest tests/algorithms/test_networks.py
"""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import Tensor, nn

from lago_fast import ops
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.buffers import Observations, RolloutBuffer

ACTIVATIONS: dict[type[nn.Module], ops.Activation] = {nn.Tanh: "tanh", nn.ReLU: "relu"}
Linears = list[nn.Linear]
Actor = ops.GaussianActor | ops.CategoricalActor


class PolicyNetworks:
    """What an actor and a critic say about observations, and the gradients of their parameters.

    Args:
        policy: of Stable-Baselines3's kind, with its own forward pass.
        impl: of the op `mlp`: "cpp", or "reference" for PyTorch's modules as they stand.
    """

    def __init__(self, policy: ActorCriticPolicy, impl: str) -> None:
        self.policy, self.impl = policy, impl
        self._native: ops.MLPNetworks | None = None
        self._actor: tuple[tuple[int, int, int], RolloutBuffer, Actor] | None = None
        self._addresses: list[int] = []
        self._parameters: list[Tensor] = []

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy keeps; native networks hold addresses, and are made anew by `refresh`."""
        return {**self.__dict__, "_native": None, "_actor": None, "_addresses": [], "_parameters": []}

    @property
    def native(self) -> bool:
        """Tell whether native code computes both passes."""
        return self._native is not None

    def refresh(self) -> None:
        """Look at the policy again: its modules may be others now, or its parameters elsewhere."""
        optimizer = self.policy.optimizer
        found = _plain(self.policy) if self.impl == "cpp" else None
        if found is None or not isinstance(optimizer, FlatAdam):
            self._native = None
            return
        networks, activation = found
        optimizer.gather()  # from here on the gradients have their places
        parameters = [p for linears in networks for linear in linears for p in (linear.weight, linear.bias)]
        self._parameters, addresses = parameters, _addresses(parameters)
        if self._native is None or addresses != self._addresses:
            layers = [
                [ops.MLPLayer(n.weight.data, n.bias.data, n.weight.grad, n.bias.grad) for n in linears]
                for linears in networks
            ]
            self._native = ops.networks(layers, activation, impl=self.impl)
            self._addresses = addresses

    def act_into(
        self,
        buffer: RolloutBuffer,
        t: int,
        rows: slice,
        generator: torch.Generator | None,
        log_std: Tensor | None = None,
    ) -> bool:
        """Act for envs whose observations are stored at step t, and store what is said there, in one native call.

        Args:
            buffer: its policy_outputs are a mean and log stds with `log_std`, [D] of all states, else logits.
            t, rows: of the buffer.
            generator: None: torch's own.
            log_std: see `buffer`.

        Returns:
            False, and nothing is done, where native code does not compute the networks.
        """
        if self._native is None or not isinstance(buffer.observations, Tensor):
            return False
        if _addresses(self._parameters) != self._addresses:  # a callback gave the policy other tensors
            self.refresh()
            return self.act_into(buffer, t, rows, generator, log_std)
        made_of = (id(self._native), id(buffer), 0 if log_std is None else log_std.data_ptr())
        if self._actor is None or self._actor[0] != made_of:
            seen, chose = buffer.observations.flatten(2), (buffer.actions, buffer.values, buffer.log_probs)
            columns: ops.GaussianColumns | ops.CategoricalColumns
            if log_std is None:
                (logits,) = buffer.policy_outputs
                columns = ops.CategoricalColumns(seen, logits, *chose)
            else:
                mean, log_stds = buffer.policy_outputs
                columns, log_std = ops.GaussianColumns(seen, mean, log_stds, *chose), log_std.detach()
            # which keeps alive what it is told by
            self._actor = made_of, buffer, ops.actor(self._native, columns, log_std, impl=self.impl)
        self._actor[2].act(t, rows, generator)
        return True

    def leave_to_modules(self) -> None:
        """Let PyTorch's modules compute both passes until the next `refresh`."""
        self._native = None

    def forward(self, observations: Observations) -> tuple[Tensor, Tensor]:
        """Return the actor's output [B, O] and values [B]; with a graph where autograd is to differentiate them."""
        if self._native is not None and isinstance(observations, Tensor):
            said, values = self._native.forward(observations.flatten(1))
            return said, values.flatten()
        latent_pi, latent_vf = latents(self.policy, observations)
        return self.policy.action_net(latent_pi), self.policy.value_net(latent_vf).flatten()

    def backward(self, said_grad: Tensor, values_grad: Tensor) -> None:
        """Write the gradients of both networks, given those of the last outputs; only where `native`."""
        assert self._native is not None
        self._native.backward([said_grad, values_grad.unsqueeze(1)])


def latents(policy: ActorCriticPolicy, observations: Observations) -> tuple[Tensor, Tensor]:
    """Return the actor's and the critic's last hidden layers, [B, H] each."""
    features: Any = policy.extract_features(observations)
    if policy.share_features_extractor:
        return policy.mlp_extractor(features)
    return policy.mlp_extractor.forward_actor(features[0]), policy.mlp_extractor.forward_critic(features[1])


def _addresses(parameters: list[Tensor]) -> list[int]:
    return [t.data_ptr() for p in parameters for t in (p, p.grad) if t is not None]


def _plain(policy: ActorCriticPolicy) -> tuple[list[Linears], ops.Activation] | None:
    """Return the actor's and the critic's layers and their activation, None where a policy is not plain."""
    # a policy over texts has networks of another kind
    space, body = policy.observation_space, getattr(policy, "mlp_extractor", None)
    vector = isinstance(space, spaces.Box) and space.dtype in (np.float32, np.float64) and len(space.shape) > 0
    extractors = {
        type(e) for e in (policy.features_extractor, policy.pi_features_extractor, policy.vf_features_extractor)
    }
    # subclasses may do anything
    if not vector or extractors != {FlattenExtractor} or type(body) is not MlpExtractor:
        return None
    kinds = {(p.dtype, p.device.type, p.requires_grad) for p in policy.parameters()}
    watched = any(_watched(module) for module in policy.modules()) or any(_hooked(p) for p in policy.parameters())
    if kinds != {(torch.float32, "cpu", True)} or watched:
        return None
    actor = _layers([*body.policy_net.children(), policy.action_net])
    critic = _layers([*body.value_net.children(), policy.value_net])
    if actor is None or critic is None or len(actor[1] | critic[1]) > 1:
        return None
    linears = [*actor[0], *critic[0]]
    # a layer that both share gets the sum of two gradients, and one that no optimizer knows gets none
    shared = len({id(p) for n in linears for p in (n.weight, n.bias)}) < 2 * len(linears)
    trained = {id(p) for group in policy.optimizer.param_groups for p in group["params"]}
    if shared or any(id(p) not in trained for n in linears for p in (n.weight, n.bias)):
        return None
    return [actor[0], critic[0]], next(iter(actor[1] | critic[1]), "tanh")


def _layers(modules: list[nn.Module]) -> tuple[Linears, set[ops.Activation]] | None:
    """Return the linear layers and the activations between them, None where the modules are not such."""
    linears, between = modules[0::2], modules[1::2]
    if any(type(n) not in ACTIVATIONS for n in between):
        return None
    plain = [n for n in linears if type(n) is nn.Linear and n.bias is not None]
    return (plain, {ACTIVATIONS[type(n)] for n in between}) if len(plain) == len(linears) else None


def _watched(module: nn.Module) -> bool:
    """Tell whether somebody hooked into a module's passes or replaced them, which native code would not call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in vars(module)


def _hooked(parameter: nn.Parameter) -> bool:
    """Tell whether somebody wants to see a parameter's gradient in autograd's pass."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)
