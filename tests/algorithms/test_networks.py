"""Native networks say and learn what the policy's own modules do; whatever is not plain is left to them."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.torch_layers import FlattenExtractor, MlpExtractor
from torch import nn

from lago_fast import FastKLPPO
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.heads import make_head
from lago_fast.algorithms.networks import PolicyNetworks
from lago_fast.buffers import RolloutBatch, RolloutBuffer
from tests.algorithms.point_env import PointEnv

BOX, DISCRETE = spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(3)
OBSERVATION = spaces.Box(-1, 1, (5,), np.float32)


def policy(action_space=BOX, observation_space=OBSERVATION, optimizer_class=FlatAdam, **options) -> ActorCriticPolicy:
    torch.manual_seed(0)
    return ActorCriticPolicy(
        observation_space, action_space, lambda _: 1e-3, optimizer_class=optimizer_class, **options
    )


def networks(actor_critic: ActorCriticPolicy, impl: str = "cpp") -> PolicyNetworks:
    found = PolicyNetworks(actor_critic, impl)
    found.refresh()
    return found


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["box", "discrete"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"net_arch": []},
        {"net_arch": {"pi": [7], "vf": [9, 3]}},
        {"activation_fn": nn.ReLU},
        {"net_arch": [], "activation_fn": nn.ReLU},
        {"share_features_extractor": False},
        {"observation_space": spaces.Box(-1, 1, (2, 3), np.float64)},
    ],
    ids=str,
)
def test_same_outputs_and_gradients_as_autograd(action_space, options):
    grads = {}
    for impl in ("reference", "cpp"):
        actor_critic = policy(action_space, **options)
        head = make_head(actor_critic, impl)
        head.networks.refresh()
        assert head.networks.native == (impl == "cpp")
        generator = torch.Generator().manual_seed(1)
        seen = torch.randn(33, *actor_critic.observation_space.shape, generator=generator)
        outputs, values = head.evaluate(RolloutBatch(seen, *[torch.empty(0)] * 6, ()))
        given = tuple(torch.randn(t.shape, generator=generator) for t in (*outputs, values))
        actor_critic.optimizer.zero_grad()
        head.backward(outputs, values, given)
        grads[impl] = {
            **{name: p.grad for name, p in actor_critic.named_parameters()},
            **{f"output {i}": t.detach() for i, t in enumerate((*outputs, values))},
        }
    for name, expected in grads["reference"].items():
        torch.testing.assert_close(
            grads["cpp"][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


class OwnExtractor(FlattenExtractor):
    """Sees twice of everything."""

    def forward(self, observations: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(observations)


class OwnBody(MlpExtractor):
    """A body that only calls itself another."""


class OwnPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = OwnBody(self.features_dim, self.net_arch, self.activation_fn, self.device)


def half_frozen() -> ActorCriticPolicy:
    found = policy()
    found.mlp_extractor.value_net.requires_grad_(False)
    return found


def watched() -> ActorCriticPolicy:
    found = policy()
    found.value_net.register_forward_hook(lambda *_: None)
    return found


@pytest.mark.parametrize(
    "make",
    [
        lambda: policy(activation_fn=nn.ELU),
        lambda: policy(features_extractor_class=OwnExtractor),
        lambda: policy(optimizer_class=torch.optim.Adam),
        lambda: policy(observation_space=spaces.Discrete(4)),
        lambda: OwnPolicy(OBSERVATION, BOX, lambda _: 1e-3, optimizer_class=FlatAdam),
        half_frozen,
        watched,
    ],
    ids=["elu", "extractor", "adam", "discrete", "body", "frozen", "hook"],
)
def test_what_is_not_plain_is_left_to_the_modules(make):
    assert not networks(make()).native


def test_the_reference_is_the_modules_themselves():
    assert not networks(policy(), "reference").native


def test_changed_modules_and_moved_parameters_are_found():
    actor_critic = policy()
    found, seen = networks(actor_critic), torch.randn(3, 5)
    found.forward(seen)
    actor_critic.action_net.weight.data = actor_critic.action_net.weight.data + 1
    found.refresh()
    with torch.no_grad():
        expected = actor_critic.get_distribution(seen).distribution.mean
    torch.testing.assert_close(found.forward(seen)[0], expected)
    actor_critic.mlp_extractor.policy_net[1] = nn.ELU()
    found.refresh()
    assert not found.native


@pytest.mark.parametrize("env_id", [PointEnv, "CartPole-v1"], ids=["box", "discrete"])
def test_a_whole_training_is_the_modules(env_id):
    weights = []
    for impl in ("reference", "cpp"):
        env = make_vec_env(env_id, n_envs=4, seed=0)
        model = FastKLPPO("MlpPolicy", env, n_steps=32, batch_size=32, n_epochs=3, seed=2, device="cpu", impl=impl)
        model.learn(3 * 32 * model.n_envs)
        assert model.impls["mlp"] == impl
        weights.append(model.policy.state_dict())
    for name, expected in weights[0].items():
        torch.testing.assert_close(weights[1][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_acting_into_a_rollout_stores_what_acting_returns(action_space):
    head = make_head(policy(action_space), "cpp")
    dtype = torch.int64 if action_space is DISCRETE else torch.float32
    seen = np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    buffer = RolloutBuffer(2, 6, seen[0, 0], head.action_shape, dtype, head.widths, torch.device("cpu"))
    buffer.store_observation(1, seen[1])
    assert not head.act_into(buffer, 1, slice(1, 4), torch.Generator().manual_seed(1))  # never refreshed
    head.networks.refresh()
    with torch.no_grad():
        expected = head.act(buffer.observation_at(1, slice(1, 4)), torch.Generator().manual_seed(1))
    assert head.act_into(buffer, 1, slice(1, 4), torch.Generator().manual_seed(1))
    columns = (buffer.actions, buffer.values, buffer.log_probs, *buffer.policy_outputs)
    for column, answer in zip(columns, (*expected[:3], *expected.outputs), strict=True):
        torch.testing.assert_close(column[1, 1:4], answer.expand_as(column[1, 1:4]))
        assert not column[0].any()
        assert not column[1, 4:].any()
