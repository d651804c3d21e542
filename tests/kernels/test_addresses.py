"""How native code reads torch's tensors without a Python call for each of their properties."""

import pytest
import torch

from lago_fast import _C

if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
    pytest.skip("this torch has no quick reader", allow_module_level=True)

X = torch.zeros(4, 3)


def addresses(*tensors):
    return [0 if t is None else t.data_ptr() for t in tensors]


def test_tensors_that_fit_have_addresses():
    tensors = (X, X[:, 0].contiguous(), X[0], torch.tensor(1.0), torch.arange(4), X > 0, None)
    assert _C.addresses(tensors, "ERWSIMM", 4, 3) == addresses(*tensors)
    assert _C.addresses((X[1:],), "E", 3, 3) == addresses(X[1:])


def test_leaves_and_results_of_autograd_have_addresses():
    leaf = torch.nn.Parameter(torch.zeros(4, 3))
    result = 2 * leaf
    assert _C.addresses((leaf, result), "EE", 4, 3) == addresses(leaf, result)


def test_an_empty_tensor_fits_whatever_its_strides():
    assert _C.addresses((torch.zeros(3, 0).T,), "E", 0, 3) is not None
    assert _C.addresses((torch.zeros(3, 1).T,), "E", 1, 3) is not None


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (X.T, "E"),
        (X.double(), "E"),
        (X.half(), "E"),
        (X.to(torch.complex64), "E"),
        (X.int(), "E"),
        (X[0], "E"),
        (X[:2], "E"),
        (X.to("meta"), "E"),
        (X.to_sparse(), "E"),
        (X.numpy(), "E"),
        (3.0, "S"),
        (torch.ones(1), "S"),
        (torch.zeros(4, dtype=torch.int32), "I"),
        (torch.zeros(4, 3, dtype=torch.uint8), "M"),
        (torch.zeros(8)[::2], "R"),
    ],
)
def test_what_does_not_fit_has_none(tensor, kind):
    assert _C.addresses((tensor,), kind, 4, 3) is None


def test_unknown_kinds_and_wrong_counts_are_refused():
    with pytest.raises(ValueError, match=r"^kinds: no kind"):
        _C.addresses((X,), "Q", 4, 3)
    with pytest.raises(ValueError, match=r"^kinds: expected one"):
        _C.addresses((X,), "EE", 4, 3)


def test_a_number_is_an_address_where_one_is_expected():
    assert _C.addresses((64, X, None), "AEA", 4, 3) == [64, X.data_ptr(), 0]
    assert _C.addresses((64,), "S", 4, 3) is None
    with pytest.raises(OverflowError):
        _C.addresses((-1,), "A", 4, 3)
    with pytest.raises(TypeError):
        _C.addresses((X,), "A", 4, 3)


def test_too_few_tensors_are_refused():
    with pytest.raises(ValueError, match=r"^tensors: expected 28"):
        _C.ppo_kl_gaussian((X,), "E", 4, 3, False, False, False, True, 16, 1)
