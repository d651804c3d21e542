"""An unpickler that runs no code of the file's, and takes no more memory or time than the file is long.

It knows a written list of names. Most of them a pickle may only refer to, or make an empty instance of, whose state
follows; a few, which a pickle of a space or an array calls, may be called, and are called with what fits the bytes that
are there. Python's own C unpickler has no say in that, so this is its Python one with the opcodes that call something
replaced.
Test: pytest tests/algorithms/test_safe_pickle.py
"""

import io
import math
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np

from lago_fast.errors import CorruptFile, UntrustedPickle

UnpicklingError = pickle.UnpicklingError  # which torch raises too; pickle is imported nowhere else
MAX_OPCODES = 10**6  # of a pickle; a space's is some hundreds
PLAIN_NUMBER = re.compile("[biufc][0-9]{1,2}")  # as numpy pickles the dtype of an array of them
PLAIN_DTYPE = (None, None, None, -1, -1, 0)  # of its state: no fields, no shape of its own, sizes of the kind
EMPTY_ARRAY = (0,)  # the shape that numpy makes an array with before its state comes

# by module, and never a whole module: what a pickle may refer to
REFERRED = """
gymnasium.spaces.box: Box
gymnasium.spaces.dict: Dict
gymnasium.spaces.discrete: Discrete
gymnasium.spaces.multi_binary: MultiBinary
gymnasium.spaces.multi_discrete: MultiDiscrete
numpy: ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
numpy.random._pcg64: PCG64
numpy.random.bit_generator: SeedSequence
torch.nn.modules.activation: CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU
torch.nn.modules.activation: ReLU ReLU6 RReLU SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
torch.nn.modules.linear: Identity
torch.optim.adadelta: Adadelta
torch.optim.adagrad: Adagrad
torch.optim.adam: Adam
torch.optim.adamax: Adamax
torch.optim.adamw: AdamW
torch.optim.nadam: NAdam
torch.optim.radam: RAdam
torch.optim.rmsprop: RMSprop
torch.optim.sgd: SGD
stable_baselines3.common.policies: ActorCriticPolicy ActorCriticCnnPolicy MultiInputActorCriticPolicy
stable_baselines3.common.torch_layers: FlattenExtractor NatureCNN CombinedExtractor
stable_baselines3.common.buffers: RolloutBuffer DictRolloutBuffer
stable_baselines3.common.utils: FloatSchedule ConstantSchedule LinearSchedule
lago_fast.algorithms.kl_coefficient: LinearSchedule
lago_fast.algorithms.text_policy: TextActionPolicy
"""
# and what it may call
CALLED = """
collections: deque OrderedDict
_codecs: encode
numpy: dtype
numpy.core.multiarray: _reconstruct scalar
numpy._core.multiarray: _reconstruct scalar
numpy.core.numeric: _frombuffer
numpy._core.numeric: _frombuffer
numpy.random._pickle: __generator_ctor __bit_generator_ctor
numpy.random.bit_generator: __pyx_unpickle_SeedSequence
"""


def _pairs(text: str) -> frozenset[tuple[str, str]]:
    lines = (line.split(": ") for line in text.strip().splitlines())
    return frozenset((module, name) for module, names in lines for name in names.split())


CALLABLE = _pairs(CALLED)
ALLOWED = _pairs(REFERRED) | CALLABLE


def read_pickle(entry: str, content: bytes) -> Any:
    """Return what a pickle holds.

    Args:
        entry: its name, for errors.

    Raises:
        UntrustedPickle: it refers to something outside of ALLOWED, or calls what is not to be called.
        CorruptFile: it cannot be read, or asks for more memory or time than its length accounts for.
    """
    try:
        _check_opcodes(entry, content)
        return _ListedUnpickler(io.BytesIO(content), entry).load()
    except (UntrustedPickle, CorruptFile):
        raise
    # a pickle of listed names can still be nonsense in any way; what an error holds may be hostile too, so only its
    # name is told
    except Exception as error:
        name = type(error).__name__
        raise CorruptFile(f"path: the entry {entry!r} cannot be read ({name}); save the model again") from error


def _check_opcodes(entry: str, content: bytes) -> None:
    """Raise CorruptFile where a pickle is too long, or remembers things at places that no pickler gives them."""
    for n, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if n >= MAX_OPCODES or (opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > n):
            raise CorruptFile(
                f"path: the entry {entry!r} is no pickle that any program wrote ({opcode.name} at {n}); do not load it"
            )


PythonUnpickler: Any = pickle._Unpickler  # whose stack and dispatch table its stubs leave out


class _ListedUnpickler(PythonUnpickler):
    """An unpickler that knows the names of ALLOWED, and calls those of CALLABLE."""

    dispatch: ClassVar[dict[int, Callable[..., None]]] = dict(PythonUnpickler.dispatch)

    def __init__(self, file: io.BytesIO, entry: str) -> None:
        super().__init__(file)
        self.entry = entry
        self._calls: dict[int, Callable[..., Any]] = {}  # what to call in place of a listed callable, by its id

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UntrustedPickle(
                f"path: the entry {self.entry!r} refers to {module}.{name}, which could run code; "
                f"supply it with custom_objects={{{self.entry!r}: ...}}, or pass trust_pickle=True if you made the file"
            )
        found = super().find_class(module, name)
        if (module, name) in CALLABLE:
            self._calls[id(found)] = CHECKED[name](found) if name in CHECKED else found
        return found

    def persistent_load(self, pid: Any) -> Any:
        del pid
        raise self._refused("has a persistent id")

    def _refused(self, what: str) -> UntrustedPickle:
        return UntrustedPickle(f"path: the entry {self.entry!r} {what}; do not load it")

    def load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self._calls.get(id(self.stack[-1]))
        if called is None:
            raise self._refused("calls something that may only be referred to")
        self.stack[-1] = called(*arguments)

    def load_newobj(self) -> None:
        if self.stack[-1] != () or not isinstance(self.stack[-2], type):
            raise self._refused("makes an instance with arguments")
        super().load_newobj()

    def load_build(self) -> None:
        state, instance = self.stack[-1], self.stack[-2]
        if isinstance(instance, type) or id(instance) in self._calls:
            raise self._refused("changes a class or a function")
        if isinstance(instance, np.ndarray):
            _check_array(*state)
        if isinstance(instance, np.dtype) and not (state[:1] == (3,) and state[2:] == PLAIN_DTYPE):
            raise CorruptFile("path: the dtype of an array is none of plain numbers; do not load it")
        super().load_build()

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:])
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_keys(self.stack)
        super().load_setitems()

    def load_dict(self) -> None:
        self._check_keys(self.stack)
        super().load_dict()

    def _check_keys(self, items: list[Any]) -> None:
        """Refuse keys other than plain ones: a tuple of tuples of the same tuple takes for ever to hash."""
        if not all(isinstance(key, str | int | float | None) for key in items[::2]):
            raise self._refused("has a key that is neither a text nor a number")

    def load_refused(self) -> None:
        raise self._refused("has an opcode that no space, array or schedule needs")


for _name in ("REDUCE", "NEWOBJ", "BUILD", "SETITEM", "SETITEMS", "DICT"):
    _ListedUnpickler.dispatch[getattr(pickle, _name)[0]] = getattr(_ListedUnpickler, f"load_{_name.lower()}")
for _name in ("NEWOBJ_EX", "INST", "OBJ", "ADDITEMS", "FROZENSET", "EXT1", "EXT2", "EXT4"):
    _ListedUnpickler.dispatch[getattr(pickle, _name)[0]] = _ListedUnpickler.load_refused


def _check_size(shape: Any, dtype: Any, content: Any) -> None:
    """Raise CorruptFile unless an array of plain numbers of this shape is as long as what it is filled with."""
    plain = isinstance(dtype, np.dtype) and dtype.kind in "biufc" and isinstance(content, bytes | bytearray)
    shaped = isinstance(shape, tuple) and all(type(size) is int and size >= 0 for size in shape)
    if not plain or not shaped or math.prod(shape) * dtype.itemsize != len(content):
        raise CorruptFile("path: an array is not as long as what it is filled with, or not of numbers; do not load it")


def _check_array(version: Any, shape: Any, dtype: Any, is_fortran: Any, content: Any) -> None:
    """Raise CorruptFile unless this is a state that numpy gives an array."""
    if version != 1 or type(is_fortran) is not bool:
        raise CorruptFile("path: the state of an array is none of numpy's; do not load it")
    _check_size(shape, dtype, content)


def _dtype(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's constructor of dtypes for plain numbers."""

    def construct(name: Any, align: Any, copy: Any) -> Any:
        del align, copy
        if not isinstance(name, str) or not PLAIN_NUMBER.fullmatch(name):
            raise UntrustedPickle("path: an array or a scalar is of something else than numbers; do not load it")
        return make(name, False, True)

    return construct


def _empty_array(reconstruct: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's constructor of an array whose state is still to come."""

    def construct(subtype: Any, shape: Any, dtype: Any) -> Any:
        if subtype is not np.ndarray or shape != EMPTY_ARRAY:
            raise CorruptFile("path: an array is made that numpy would not have pickled so; do not load it")
        return reconstruct(subtype, shape, dtype)

    return construct


def _number(scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's constructor of scalars for plain numbers: of an object dtype it would unpickle its bytes."""

    def construct(dtype: Any, content: bytes) -> Any:
        _check_size((), dtype, content)
        return scalar(dtype, content)

    return construct


def _array(frombuffer: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's constructor of an array over bytes."""

    def construct(content: Any, dtype: Any, shape: Any, order: Any) -> Any:
        _check_size(shape, dtype, content)
        return frombuffer(content, dtype, shape, order)

    return construct


def _generator(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's constructor of generators, without the callable that old pickles hand to it."""

    def construct(bit_generator: Any, constructor: Any = None) -> Any:
        del constructor
        return make(bit_generator)

    return construct


def _empty_container(make: Callable[..., Any]) -> Callable[..., Any]:
    """Return the constructor of a container that is filled later, where keys are looked at."""

    def construct(content: Any = (), *maxlen: Any) -> Any:
        if content != ():
            raise CorruptFile("path: a container is made as Python would not have pickled it; do not load it")
        return make(content, *maxlen)

    return construct


def _latin(encode: Callable[..., Any]) -> Callable[..., Any]:
    """Return `codecs.encode` for the one use that old pickles make of it: bytes as a text."""

    def construct(text: Any, codec: Any) -> Any:
        if codec != "latin1":
            raise CorruptFile("path: a text is encoded as Python would not have pickled it; do not load it")
        return encode(text, codec)

    return construct


CHECKED = {
    "deque": _empty_container,
    "OrderedDict": _empty_container,
    "encode": _latin,
    "dtype": _dtype,
    "_reconstruct": _empty_array,
    "scalar": _number,
    "_frombuffer": _array,
    "__generator_ctor": _generator,
}
