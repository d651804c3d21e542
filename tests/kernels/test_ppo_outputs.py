"""What a loss returned, given back to be overwritten."""

from collections import namedtuple

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.ppo.outputs import check_outputs, packed
from tests.kernels.cuda_cases import coefficients, draw_categorical, draw_gaussian

CPU = torch.device("cpu")
Outputs = namedtuple("Outputs", "loss entropy approx_kl")


def test_outputs_of_one_tensor_are_that_tensor():
    statistics = torch.arange(5.0)
    outputs = Outputs(*statistics[1:4].unbind())
    assert packed(outputs, CPU).data_ptr() == outputs.loss.data_ptr()
    assert packed(outputs, CPU).tolist() == [1, 2, 3]


def test_outputs_of_several_tensors_are_refused():
    outputs = Outputs(*torch.zeros(3).unbind())
    with pytest.raises(ValueError, match=r"^out\[0\]\.entropy: expected to lie behind"):
        packed(outputs._replace(entropy=torch.zeros(())), CPU)
    with pytest.raises(ValueError, match=r"^out\[0\]\.entropy: expected to lie behind"):
        packed(Outputs(*torch.zeros(6)[::2].unbind()), CPU)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1), torch.zeros((), dtype=torch.float64), torch.zeros((), device="meta")]
)
def test_outputs_that_cannot_be_written_are_named(wrong):
    outputs = Outputs(*torch.zeros(3).unbind())
    check_outputs(outputs, CPU)
    with pytest.raises(ValueError, match=r"^out\[0\]\.approx_kl: expected a 0-D float32 tensor on cpu"):
        check_outputs(outputs._replace(approx_kl=wrong), CPU)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("draw", "op"),
    [
        (draw_categorical, ops.ppo_kl_categorical_loss_and_grads),
        (draw_gaussian, ops.ppo_kl_gaussian_loss_and_grads),
    ],
)
def test_what_a_call_returned_is_overwritten_and_returned(draw, op, impl):
    first, second = draw(10, 4), draw(10, 4)
    expected = op(second, coefficients(), impl=impl)
    returned = op(first, coefficients(), impl=impl)
    outputs, grads = op(second, coefficients(), impl=impl, out=returned)
    assert not torch.equal(expected[0].loss, op(first, coefficients(), impl=impl)[0].loss)
    for got, before, same in zip(
        (*outputs, *grads), (*returned[0], *returned[1]), (*expected[0], *expected[1]), strict=True
    ):
        assert got is before
        assert torch.equal(got, same)
