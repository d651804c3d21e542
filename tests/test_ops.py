"""The door: which implementation is chosen, and how a wrong choice is refused."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lago_fast import ops
from lago_fast.errors import ImplUnavailable


@pytest.mark.parametrize("op", list(ops.IMPLEMENTATIONS))
def test_auto_takes_the_first_that_runs_on_the_device(op):
    name, module = ops.resolve(op, "cpu")
    assert name == next(impl for impl in ops.IMPLEMENTATIONS[op] if "cpu" in ops.DEVICES[impl])
    assert module.__name__.startswith(f"lago_fast.kernels.{op}")


@pytest.mark.parametrize("op", list(ops.IMPLEMENTATIONS))
def test_an_explicit_name_never_falls_back(op):
    for name in ("inductor", "cuda"):
        if name not in ops.IMPLEMENTATIONS[op]:
            with pytest.raises(ImplUnavailable, match=f"impl='{name}'.*{op}"):
                ops.resolve(op, "cpu", name)


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ImplUnavailable, match="reference"):
        ops.resolve("gae", "cpu", "fast")


def test_native_code_refuses_another_device():
    with pytest.raises(ImplUnavailable, match="not on cuda"):
        ops.resolve("gae", "cuda", "cpp")


@pytest.mark.parametrize("op", [op for op, table in ops.IMPLEMENTATIONS.items() if "triton" in table])
class TestTriton:
    def test_is_refused_on_a_cpu_tensor(self, op):
        with pytest.raises(ImplUnavailable, match=f"impl='triton': {op} runs on cuda, not on cpu"):
            ops.resolve(op, "cpu", "triton")

    def test_is_refused_with_a_remedy_where_it_is_not_installed(self, op, monkeypatch):
        monkeypatch.setattr(ops, "find_spec", {}.get)
        # past the cache, which holds what was found before
        with pytest.raises(ImplUnavailable, match=r"needs triton, which is not installed; pip install triton"):
            ops.resolve.__wrapped__(op, "cuda", "triton")
        assert ops.resolve.__wrapped__(op, "cuda", "auto")[0] == "reference"

    def test_is_what_auto_means_on_a_gpu_without_our_cuda(self, op, monkeypatch):
        monkeypatch.setattr(ops, "_is_installed", lambda impl: impl != "cuda")
        name, module = ops.resolve.__wrapped__(op, "cuda", "auto")
        assert (name, module.__name__) == ("triton", f"lago_fast.kernels.{op}.triton_fused")


def test_an_op_on_a_cpu_tensor_says_that_triton_is_not_for_it():
    one, no = torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.bool)
    with pytest.raises(ImplUnavailable, match="impl='triton'"):
        ops.gae(one, one, one, no, no, ~no, gamma=0.9, gae_lambda=0.9, impl="triton")


def test_buffers_that_no_call_returned_are_refused():
    x = ops.CategoricalInputs(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64), *torch.zeros(6, 2))
    x = x._replace(prior_log_probs=torch.zeros(2, 3))
    c = ops.CategoricalCoefficients(*(torch.tensor(0.5) for _ in range(5)))
    outputs, grads = ops.ppo_kl_categorical_loss_and_grads(x, c)
    for out in (grads, (grads, outputs), (outputs,), (outputs, tuple(grads)), [outputs, grads]):
        with pytest.raises(ValueError, match=r"^out: expected the Outputs and Grads that an earlier call returned"):
            ops.ppo_kl_categorical_loss_and_grads(x, c, out=out)


def test_coefficients_are_0d_tensors():
    made = ops.coefficients_on(torch.device("cpu"), clip_range=0.2, clip_range_vf=None)
    assert made["clip_range_vf"] is None
    assert made["clip_range"].shape == ()
    assert made["clip_range"].dtype == torch.float32


class Copies(TorchDispatchMode):
    """Counts the tensors that are made of host data."""

    made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.aten.lift_fresh.default
        return func(*args, **(kwargs or {}))


def test_a_number_becomes_a_tensor_without_a_copy_that_a_gpu_waits_for():
    mean, state = torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64)
    prior = {"prior_mean": mean, "prior_log_std": mean}
    with Copies() as given:
        ops.sample_gaussian(mean, mean, state, **prior, prior_temperature=torch.full((), 0.5), impl="reference")
    with Copies() as number:
        ops.sample_gaussian(mean, mean, state, **prior, prior_temperature=0.5, impl="reference")
    assert number.made == given.made


@pytest.mark.gpu
def test_no_number_makes_the_host_wait_for_the_gpu():
    device = torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert ops._as_scalar(0.5, device).device.type == "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")
