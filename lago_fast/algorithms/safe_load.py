"""Reading a Stable-Baselines3 zip without running code from it.

Its `data` is JSON whose entries may be pickles. They are read by an unpickler that knows a written list of names;
what they build is handed to Stable-Baselines3 as `custom_objects`, so that its own unpickler never sees them. Weights
are read by torch with weights_only=True.
Test: pytest tests/algorithms/test_safe_load.py; make fuzz
"""

import base64
import binascii
import functools
import io
import json
import pickle
import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lago_fast.errors import CorruptFile, UntrustedPickle

MAX_DATA_BYTES = 64 * 2**20  # of the JSON; a model's is a few kilobytes, a callback's buffers at most megabytes
MAX_BYTES = 32 * 2**30  # of all entries, unpacked
MAX_RATIO = 1000  # unpacked to packed, of an entry above MIN_SUSPECT_BYTES; weights do not shrink like that
MIN_SUSPECT_BYTES = 2**20
MAX_OPCODES = 10**6  # of a pickle; a space's is some hundreds

# every name that a pickle may call or refer to, by module; never a whole module
LISTED = """
collections: deque OrderedDict
_codecs: encode
gymnasium.spaces.box: Box
gymnasium.spaces.dict: Dict
gymnasium.spaces.discrete: Discrete
gymnasium.spaces.multi_binary: MultiBinary
gymnasium.spaces.multi_discrete: MultiDiscrete
numpy: dtype ndarray bool_ int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64
numpy.core.multiarray: _reconstruct scalar
numpy._core.multiarray: _reconstruct scalar
numpy.core.numeric: _frombuffer
numpy._core.numeric: _frombuffer
numpy.random._pickle: __generator_ctor __bit_generator_ctor
numpy.random._pcg64: PCG64
numpy.random.bit_generator: __pyx_unpickle_SeedSequence SeedSequence
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
ALLOWED = frozenset(
    (module, name)
    for module, names in (line.split(": ") for line in LISTED.strip().splitlines())
    for name in names.split()
)


def safe_objects(path: str | Path | io.BufferedIOBase, given: dict[str, Any] | None) -> dict[str, Any]:
    """Return the pickled entries of a model file, unpickled without running code, and `given` over them.

    Args:
        path: the zip, with or without its suffix, or a file object.
        given: objects that the caller supplies for entries; those are not read.

    Raises:
        UntrustedPickle: an entry names something outside of ALLOWED.
        CorruptFile: no zip, no JSON, a pickle that cannot be read, or sizes that no model has.
        FileNotFoundError: there is no such file.
    """
    given = given or {}
    entries = _read_data(path)
    pickles = {
        name: entry[":serialized:"]
        for name, entry in entries.items()
        if isinstance(entry, dict) and ":serialized:" in entry and name not in given
    }
    return {**{name: _unpickle(name, text) for name, text in pickles.items()}, **given}


def _read_data(path: str | Path | io.BufferedIOBase) -> dict[str, Any]:
    file: Any = path
    if isinstance(path, str | Path):
        file = Path(path)
        if not file.exists() and file.suffix == "":
            file = file.with_suffix(".zip")  # as Stable-Baselines3 finds it
    else:
        path.seek(0)
    try:
        with zipfile.ZipFile(file) as archive:
            _check_sizes(archive, path)
            damaged = archive.testzip()
            if damaged is not None:
                raise CorruptFile(f"path: {damaged} in {path} is damaged, its checksum is another; load an older file")
            entries = json.loads(archive.read("data")) if "data" in archive.namelist() else {}
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError, RecursionError) as error:
        if isinstance(error, CorruptFile):
            raise
        raise CorruptFile(
            f"path: {path} is no model file of Stable-Baselines3 ({error}); save the model again"
        ) from error
    finally:
        if not isinstance(path, str | Path):
            path.seek(0)
    if not isinstance(entries, dict):
        raise CorruptFile(f"path: the data of {path} are no dictionary; save the model again")
    return entries


def _check_sizes(archive: zipfile.ZipFile, path: Any) -> None:
    infos = archive.infolist()
    for info in infos:
        too_dense = info.file_size > MIN_SUSPECT_BYTES and info.file_size > MAX_RATIO * max(info.compress_size, 1)
        if too_dense or (info.filename == "data" and info.file_size > MAX_DATA_BYTES):
            raise CorruptFile(
                f"path: {info.filename} in {path} unpacks from {info.compress_size:,} to {info.file_size:,} bytes, "
                "which no model needs; do not load it"
            )
    if sum(info.file_size for info in infos) > MAX_BYTES:
        raise CorruptFile(
            f"path: {path} unpacks to more than {MAX_BYTES:,} bytes, which no model needs; do not load it"
        )


class _ListedUnpickler(pickle.Unpickler):
    """An unpickler that knows the names of ALLOWED."""

    def __init__(self, file: io.BytesIO, entry: str) -> None:
        super().__init__(file)
        self.entry = entry

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise UntrustedPickle(
                f"path: the entry {self.entry!r} refers to {module}.{name}, which could run code; "
                f"supply it with custom_objects={{{self.entry!r}: ...}}, or pass trust_pickle=True if you made the file"
            )
        found = super().find_class(module, name)
        return _plain_numpy_scalar(found) if name == "scalar" else found

    def persistent_load(self, pid: Any) -> Any:
        raise UntrustedPickle(f"path: the entry {self.entry!r} has a persistent id ({pid!r}); do not load it")


def _plain_numpy_scalar(scalar: Callable[..., Any]) -> Callable[..., Any]:
    """Return numpy's scalar constructor for plain numbers: of an object dtype it would unpickle its bytes."""

    @functools.wraps(scalar)
    def construct(dtype: Any, *content: Any) -> Any:
        if dtype.hasobject:
            raise UntrustedPickle("path: a numpy scalar holds a Python object, which could run code; do not load it")
        return scalar(dtype, *content)

    return construct


def _check_opcodes(entry: str, content: bytes) -> None:
    """Raise CorruptFile where a pickle would make the unpickler reserve memory that it does not fill.

    Python's own writes, and clears, a table up to whatever index an opcode names.
    """
    for n, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        if n >= MAX_OPCODES or (opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > n):
            raise CorruptFile(
                f"path: the entry {entry!r} is no pickle that any program wrote ({opcode.name} at {n}); do not load it"
            )


def _unpickle(entry: str, text: Any) -> Any:
    try:
        content = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CorruptFile(f"path: the entry {entry!r} is no base64 ({error}); save the model again") from error
    try:
        _check_opcodes(entry, content)
        return _ListedUnpickler(io.BytesIO(content), entry).load()
    except (UntrustedPickle, CorruptFile):
        raise
    except MemoryError as error:
        raise CorruptFile(f"path: the entry {entry!r} asks for more memory than there is; do not load it") from error
    # a pickle of listed names can still call them with anything
    except Exception as error:
        raise CorruptFile(f"path: the entry {entry!r} cannot be read ({error!r}); save the model again") from error
