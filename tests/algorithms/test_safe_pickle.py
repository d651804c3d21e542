"""What models hold comes back whole; what a hostile pickle asks for, it does not get."""

import codecs
import pickle
from collections import OrderedDict, deque

import numpy as np
import pytest
import torch
from gymnasium import spaces
from numpy.random._pickle import __generator_ctor as generator_constructor  # of what pickles of spaces name
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.utils import ConstantSchedule, FloatSchedule

from lago_fast import errors
from lago_fast.algorithms.safe_pickle import read_pickle
from tests.algorithms.test_safe_load import Runs, little_memory

EMPTY = np.empty(0).__reduce__()[0]  # numpy's _reconstruct
FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
HUGE = 10**10
REFUSED = (errors.UntrustedPickle, errors.CorruptFile)


def seeded(space):
    space.seed(3)
    return space


@pytest.mark.parametrize("protocol", [4, 5])
@pytest.mark.parametrize(
    "thing",
    [
        {"a": [1, 2.5, None, True], "b": (b"bytes", "text")},
        OrderedDict(a=1),
        deque([{"r": 1.0, "l": 3, "t": 0.5}], maxlen=100),
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.asfortranarray(np.arange(6, dtype=np.uint8).reshape(2, 3)),
        np.zeros((3, 0)),
        np.float64(0.5),
        np.bool_(True),
        np.dtype(np.int64),
        [torch.nn.ReLU, torch.optim.AdamW, ActorCriticPolicy, OrderedDict],
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_what_a_model_holds_comes_back(thing, protocol):
    read = read_pickle("thing", pickle.dumps(thing, protocol))
    assert type(read) is type(thing)
    np.testing.assert_equal(read, thing)
    if isinstance(thing, deque):
        assert read.maxlen == thing.maxlen


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Discrete(4, start=1),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary((2, 2)),
        spaces.Dict(a=spaces.Discrete(2), b=spaces.Box(0, 255, (4, 4, 1), np.uint8)),
    ],
    ids=str,
)
def test_a_space_comes_back_and_draws_on(space):
    read = read_pickle("space", pickle.dumps(seeded(space)))
    assert read == space
    np.testing.assert_equal(read.sample(), space.sample())


def test_schedules_come_back():
    read = read_pickle("lr_schedule", pickle.dumps(FloatSchedule(ConstantSchedule(0.25))))
    assert read(0.5) == 0.25


def nested(depth):
    """Return a tuple of two references to such a tuple: short to write, and 2 ** depth long to hash."""
    made = ()
    for _ in range(depth):
        made = (made, made)
    return made


class Filled(Runs):
    """A pickle that calls something, and then gives the result a state."""

    def __init__(self, state, what, *arguments):
        super().__init__(what, *arguments)
        self.call = (*self.call, state)


PATCH = b"cgymnasium.spaces.box\nBox\n(N}S'contains'\nNstb."  # Box.contains = None
KEYED = pickle.dumps(nested(60), 2)[:-1].replace(b"\x80\x02", b"\x80\x02}", 1) + b"Ns."  # {nested: None}


@pytest.mark.parametrize(
    "thing",
    [
        Runs(spaces.Box, 0, 1, (HUGE,)),
        Runs(torch.nn.PReLU, HUGE),
        Runs(np.ndarray, (HUGE,)),
        Runs(EMPTY, np.ndarray, (HUGE,), b"b"),
        Filled((1, (HUGE,), np.dtype("O"), False, [None]), EMPTY, np.ndarray, (0,), b"b"),
        Filled((1, (HUGE,), np.dtype("u1"), False, b"abc"), EMPTY, np.ndarray, (0,), b"b"),
        Filled((1, (-1, -3), np.dtype("u1"), False, b"abc"), EMPTY, np.ndarray, (0,), b"b"),
        Filled((3, "<", None, None, None, 64, -1, 0), np.dtype, "f4", False, True),
        Filled((3, "<", None, ("a",), {"a": 1}, -1, -1, 0), np.dtype, "f4", False, True),
        Runs(deque, Runs(FROM_BUFFER, b"", np.dtype("V0"), (HUGE,), "C")),
        Runs(deque, [1, 2]),
        Runs(OrderedDict, [(nested(60), 1)]),
        Runs(codecs.encode, "a" * 99, "idna"),
        Runs(np.dtype, nested(60), False, True),
        Runs(np.float64(1).__reduce__()[0], np.dtype(f"V{2**31 - 1}")),
        Runs(generator_constructor, HUGE, torch.nn.PReLU),
        PATCH,
        PATCH.replace(b"gymnasium.spaces.box\nBox", b"numpy._core.multiarray\n_reconstruct"),
        KEYED,
        b"(i__main__\nRuns\n.",
        b"\x80\x04\x8f(K\x01\x90.",  # a set of 1
    ],
    ids=lambda thing: thing.call[0].__name__ if isinstance(thing, Runs) else repr(thing)[:20],
)
def test_a_hostile_pickle_is_refused_and_takes_no_memory(thing):
    content = thing if isinstance(thing, bytes) else pickle.dumps(thing, 2)
    with (
        little_memory(),
        pytest.raises(REFUSED, match=r"clip_range|array|container|encoded"),
    ):
        read_pickle("clip_range", content)
    assert spaces.Box.contains is not None
