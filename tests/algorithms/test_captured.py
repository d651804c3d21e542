"""Gradient steps in static memory: the trainer's own, schedules followed, and nothing in them waits for the host.

A graph itself needs a GPU; everything that it would hold runs here as it is.
"""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lago_fast import FastKLPPO
from lago_fast.algorithms.captured import CapturedStep
from lago_fast.errors import UnsupportedArgument
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior
from tests.algorithms.test_every_space import DICT, Noise

CASES = {
    "gaussian": (PointEnv, {"prior": ScriptedPrior}),
    "categorical": (DiscretePointEnv, {"prior": lambda: ScriptedPrior("categorical")}),
    "dictionary": (lambda: Noise(DICT, spaces.Discrete(3)), {"policy": "MultiInputPolicy"}),
    "clipped values": (PointEnv, {"clip_range_vf": 0.3, "ent_coef": 0.01}),
}
# every number that a schedule may change does so; minibatches of 64 and 36 rows
# a learning rate that a graph holds is rounded to float32, which moves a convolution's weight by nearly 5e-5
FEW_ROUNDINGS = 2e-4
OPTIONS = {"n_steps": 25, "batch_size": 64, "n_epochs": 3, "seed": 0, "max_grad_norm": 0.3}
pytestmark = pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # the smaller one is meant


def falling(start):
    return lambda progress: start * (0.5 + progress)


def model_of(case, **options):
    env, own = CASES[case]
    arguments = {"policy": "MlpPolicy", "device": "cpu", **OPTIONS, **own, **options}
    if "prior" in own:
        arguments["prior"] = own["prior"]()
        arguments["kl_coef"] = falling(0.2)
    return FastKLPPO(
        env=make_vec_env(env, n_envs=4, seed=0), learning_rate=falling(3e-3), clip_range=falling(0.3), **arguments
    )


def in_static_memory(model):
    model._captured = CapturedStep(model._head)
    return model


def logged(model):
    return {k: v for k, v in model.logger.name_to_value.items() if k.startswith("train/")}


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_same_with_every_schedule_followed(case, impl):
    own = model_of(case, impl=impl).learn(400)
    static = in_static_memory(model_of(case, impl=impl)).learn(400)
    for name, value in own.policy.state_dict().items():
        # the learning rate is a float32 there, and a Python float here
        torch.testing.assert_close(static.policy.state_dict()[name], value, rtol=1e-3, atol=FEW_ROUNDINGS)
    assert logged(static) == pytest.approx(logged(own), rel=1e-3, abs=1e-5)
    assert static._n_updates == own._n_updates == 12


def test_a_step_reads_the_numbers_of_the_update_under_way():
    model = in_static_memory(model_of("gaussian"))
    model.learn(100)
    step, buffer, rows = model._captured, model.rollout_buffer, torch.arange(64)

    def moved(lr=1e-3, max_grad_norm=0.5, **changed):
        model.policy.optimizer.param_groups[0]["lr"] = lr
        options = {"kl_direction": "policy_prior", "normalize_advantage": True, "impl": "reference"}
        step.begin(buffer, {**model._coefficients(), **changed}, 64, max_grad_norm, options)
        before = torch.nn.utils.parameters_to_vector(model.policy.parameters()).detach().clone()
        statistics = step.take(rows)
        return (torch.nn.utils.parameters_to_vector(model.policy.parameters()) - before).norm().item(), statistics

    assert moved(lr=0.0)[0] == 0
    assert moved(lr=1e-3)[0] > 0
    (_, light), (_, heavy) = moved(lr=0.0, kl_coef=0.0), moved(lr=0.0, kl_coef=2.0)
    assert heavy[0] - light[0] == pytest.approx(2.0 * float(light[4]), rel=1e-4)  # loss and prior_kl
    held = step._held
    moved(kl_coef=1.0)
    assert step._held is held  # numbers change in place
    buffer.rewards += 1
    moved(max_grad_norm=0.1)
    assert step._held is not held  # a number that a graph would have frozen


def test_what_moves_a_tensor_that_a_graph_holds_ends_the_graph():
    model = in_static_memory(model_of("gaussian"))
    model.learn(100)
    step, held = model._captured, model._captured._held
    model.learn(100, reset_num_timesteps=False)
    assert step._held is held
    model.set_parameters(model.get_parameters())  # the optimiser's moments are other tensors now
    model.learn(100, reset_num_timesteps=False)
    assert step._held is not held


class Ran(TorchDispatchMode):
    """Every operator that ran, the Python numbers that it was given, and the tensors from outside that it saw."""

    def __init__(self):
        super().__init__()
        self.names, self.numbers, self.outside = set(), [], set()
        self._made = []  # kept alive, so that no address comes twice

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        found = func(*args, **(kwargs or {}))
        given = tree_leaves((args, kwargs or {}))
        inside = {tensor.data_ptr() for tensor in self._made}
        self.names.add(name)
        self.numbers.append((name, [x for x in given if isinstance(x, int | float)]))
        self.outside |= {x.data_ptr() for x in given if isinstance(x, torch.Tensor)} - inside
        self._made += [x for x in tree_leaves(found) if isinstance(x, torch.Tensor)]
        return found


WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}


@pytest.mark.parametrize("case", sorted(set(CASES) - {"dictionary"}))  # a CPU looks at one-hot keys, a GPU does not
def test_nothing_in_a_step_waits_for_the_host(case):
    model = in_static_memory(model_of(case, impl="reference"))
    model.learn(100)
    with Ran() as ran:
        assert model._captured.take(torch.arange(64)) is not None
    assert "aten::_fused_adam_" in ran.names
    assert not ran.names & WAITING
    with Ran() as ran:
        model.policy.value_net.bias.item()
    assert ran.names & WAITING  # such an operator is seen


@pytest.mark.parametrize("case", CASES)
def test_a_graph_would_freeze_nothing_that_an_update_changes(case):
    model = in_static_memory(model_of(case, impl="reference"))
    model.learn(100)
    seen = []
    for _ in range(2):
        with Ran() as ran:
            assert model._captured.take(torch.arange(64)) is not None
        seen.append(ran)
        model.learn(190, reset_num_timesteps=False)  # other rows, and every schedule has moved on
    first, second = seen
    assert first.numbers == second.numbers
    assert first.outside == second.outside


def test_a_target_kl_that_is_set_later_stops_early():
    model = in_static_memory(model_of("gaussian"))
    model.target_kl = 1e-9
    model.learn(100)
    assert model._captured._held is None
    assert model._gradient_steps < 6  # of 3 epochs of 2 minibatches


def test_a_smaller_minibatch_is_left_alone():
    model = in_static_memory(model_of("gaussian"))
    model.learn(100)
    before = [p.detach().clone() for p in model.policy.parameters()]
    assert model._captured.take(torch.arange(36)) is None
    assert all(torch.equal(p, b) for p, b in zip(model.policy.parameters(), before, strict=True))


def test_without_memory_for_it_the_run_goes_on_and_says_so_once(monkeypatch, caplog):
    own = model_of("gaussian").learn(200)
    static = in_static_memory(model_of("gaussian"))

    def full(held):
        del held
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(static._captured, "_step", full)
    static.learn(200)
    for p, q in zip(own.policy.parameters(), static.policy.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [r.message for r in caplog.records if "graph" in r.message] == [
        "out of GPU memory for captured gradient steps: going on without a graph"
    ]


def test_what_cannot_be_captured_is_refused_by_name(monkeypatch):
    with pytest.raises(UnsupportedArgument, match="cuda_graph: there are none without a CUDA device"):
        model_of("gaussian", cuda_graph=True)
    with pytest.raises(UnsupportedArgument, match="cuda_graph: the step of a ActorCriticPolicy"):
        in_static_memory(model_of("clipped values", use_sde=True))
    with pytest.raises(UnsupportedArgument, match="cuda_graph: AdamW may wait"):
        in_static_memory(model_of("clipped values", policy_kwargs={"optimizer_class": torch.optim.AdamW}))
    monkeypatch.setattr("lago_fast.algorithms.refusals.get_device", lambda _: torch.device("cuda"))
    with pytest.raises(UnsupportedArgument, match="target_kl, cuda_graph: "):
        model_of("gaussian", cuda_graph=True, target_kl=0.1)
    with pytest.raises(UnsupportedArgument, match="overlap, cuda_graph: "):
        model_of("gaussian", cuda_graph=True, overlap="update")


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_a_graph_takes_the_steps_that_the_trainer_takes(case):
    own = model_of(case, device="cuda").learn(400)
    graphed = model_of(case, device="cuda", cuda_graph=True).learn(400)
    assert graphed._captured._graph is not None
    for name, value in own.policy.state_dict().items():
        torch.testing.assert_close(graphed.policy.state_dict()[name], value, rtol=1e-3, atol=FEW_ROUNDINGS)
    assert logged(graphed) == pytest.approx(logged(own), rel=1e-2, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_no_gradient_step_waits_for_the_gpu(cuda_graph, monkeypatch):
    model = model_of("gaussian", device="cuda", cuda_graph=cuda_graph)
    model.learn(200)
    shuffled = model.rollout_buffer.shuffled

    def watched(batch_size):
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield from shuffled(batch_size)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(model.rollout_buffer, "shuffled", watched)
    np.random.seed(0)  # noqa: NPY002 - minibatches are drawn by the global generator
    model.train()
