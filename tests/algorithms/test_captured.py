"""Gradient steps in static memory: the trainer's own, schedules followed, and nothing in them waits for the host.

A graph itself needs a GPU; everything that it would hold runs here as it is.
"""

import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lago_fast import FastKLPPO
from lago_fast.algorithms.captured import CapturedStep
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import UnsupportedArgument
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior
from tests.algorithms.test_every_space import DICT, Noise

CASES = {
    "gaussian": (PointEnv, {"prior": ScriptedPrior}),
    "categorical": (DiscretePointEnv, {"prior": lambda: ScriptedPrior("categorical")}),
    "dictionary": (lambda: Noise(DICT, spaces.Discrete(3)), {"policy": "MultiInputPolicy"}),
    "clipped values": (PointEnv, {"clip_range_vf": 0.3, "ent_coef": 0.01}),
}
# a graph holds the learning rate as a float32, not as a Python float: already that moves the weights of the
# dictionary's convolutions by nearly 5e-5, and another order of sums on a GPU moves them too
ROUNDED = {"dictionary": {"rtol": 1e-3, "atol": 2e-4}}
ROUNDED_LITTLE = {"rtol": 1e-3, "atol": 5e-5}
# every number that a schedule may change does so; minibatches of 64 and 36 rows
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
        torch.testing.assert_close(static.policy.state_dict()[name], value, **ROUNDED.get(case, ROUNDED_LITTLE))
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


def test_what_a_new_form_replaces_is_gone_before_the_new_is_allocated(monkeypatch):
    model = in_static_memory(model_of("gaussian")).learn(100)
    step, empty_like, old_is_gone = model._captured, torch.empty_like, []
    old = weakref.ref(step._held.columns[0])

    def allocated(*args, **kwargs):
        old_is_gone.append(old() is None)
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", allocated)
    step.begin(model.rollout_buffer, model._coefficients(), 32, 0.5, {})
    assert old_is_gone
    assert all(old_is_gone)


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
    copies = []

    def full(held):
        copies.extend(weakref.ref(column) for column in held.columns)
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(static._captured, "_step", full)
    static.learn(200)
    for p, q in zip(own.policy.parameters(), static.policy.parameters(), strict=True):
        assert torch.equal(p, q)
    assert [r.message for r in caplog.records if "graph" in r.message] == [
        "out of GPU memory for captured gradient steps: going on without a graph"
    ]
    assert copies
    assert not any(copy() is not None for copy in copies)
    assert not any(isinstance(value, RolloutBuffer) for value in vars(static._captured).values())


class FakeStream:
    def __init__(self, device):
        self.device = device

    def wait_stream(self, stream):
        pass


class FakeCuda:
    """Streams and captures as torch 2.13 has them: one that breaks fails again at its end, and keeps its stream."""

    def __init__(self, monkeypatch, breaks):
        self.breaks, self.captured_on, self.selected = breaks, [], []
        self.before = self.current = FakeStream(None)
        for name in ("current_stream", "set_stream", "stream", "graph", "device"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)

    def current_stream(self, device):
        del device
        return self.current

    def set_stream(self, stream):
        self.current = stream

    def stream(self, stream):
        del stream
        return nullcontext()

    def device(self, device):
        self.selected.append(device)
        return nullcontext()

    def graph(self, cuda_graph, stream):
        del cuda_graph
        return FakeCapture(self, stream)


class FakeCapture:
    def __init__(self, cuda, stream):
        self.cuda, self.stream = cuda, stream

    def __enter__(self):
        self.cuda.current = self.stream
        self.cuda.captured_on.append(self.stream.device)

    def __exit__(self, kind, error, traceback):
        if self.cuda.breaks:
            raise RuntimeError("the capture was broken off")
        self.cuda.current = self.cuda.before


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (None, None, ""),
        (torch.OutOfMemoryError("injected"), torch.OutOfMemoryError, "injected"),
        (RuntimeError("it waits"), UnsupportedArgument, r"something in it waits for the host \(it waits\)"),
        (KeyError("a mistake"), KeyError, "a mistake"),
    ],
)
def test_a_capture_is_on_its_device_and_fails_with_what_broke_it(failure, raised, message, monkeypatch):
    step = in_static_memory(model_of("gaussian")).learn(100)._captured
    cuda = FakeCuda(monkeypatch, breaks=failure is not None)

    def body(held):
        assert cuda.current.device == held.rows.device
        if failure is not None:
            raise failure

    monkeypatch.setattr(step, "_step", body)
    with nullcontext() if raised is None else pytest.raises(raised, match=message):
        step._captured(step._held)
    assert cuda.captured_on == cuda.selected == [torch.device("cpu")]
    assert cuda.current is cuda.before


def test_a_capture_that_fails_only_at_its_end_says_so(monkeypatch):
    step = in_static_memory(model_of("gaussian")).learn(100)._captured
    cuda = FakeCuda(monkeypatch, breaks=True)
    monkeypatch.setattr(step, "_step", lambda _: None)
    with pytest.raises(UnsupportedArgument, match="the capture was broken off"):
        step._captured(step._held)
    assert cuda.current is cuda.before


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
        torch.testing.assert_close(graphed.policy.state_dict()[name], value, **ROUNDED.get(case, ROUNDED_LITTLE))
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


@pytest.mark.gpu
def test_what_waits_for_the_host_is_named_and_leaves_the_stream(monkeypatch):
    step = model_of("gaussian", device="cuda", cuda_graph=True).learn(200)._captured
    before = torch.cuda.current_stream()
    monkeypatch.setattr(step, "_step", lambda held: held.lr.item())
    with pytest.raises(UnsupportedArgument, match=r"waits for the host \(.*captur"):
        step._captured(step._held)
    assert torch.cuda.current_stream() == before


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_graph_on_another_device_than_the_current_one_learns():
    own = model_of("gaussian", device="cuda:1").learn(400)
    graphed = model_of("gaussian", device="cuda:1", cuda_graph=True).learn(400)
    assert graphed._captured._graph is not None
    for name, value in own.policy.state_dict().items():
        torch.testing.assert_close(graphed.policy.state_dict()[name], value, **ROUNDED_LITTLE)
