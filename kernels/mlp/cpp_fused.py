"""Multilayer perceptrons and their gradients in native code, on CPU tensors.

Both passes keep what they need in one workspace: a pass allocates its outputs and nothing else.
Native side: csrc/ops/mlp.cc. Test: pytest tests/kernels/test_mlp.py
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lago_fast import _C

from .reference import ACTIVATIONS, Activation, CategoricalColumns, GaussianColumns, Layer, no_distribution


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> int:
    """Return where a tensor lies, 0 for None, or refuse what native code would misread."""
    if tensor is None:
        return 0
    if tensor.shape != shape or tensor.dtype is not dtype or not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(
            f"{name}: expected contiguous {dtype} {list(shape)} on the CPU, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}; use impl='reference'"
        )
    return tensor.data_ptr()


class Networks:
    """Several networks on the same rows, forward and backward; for one thread, which has the one workspace.

    Args:
        networks: of each its layers, float32 and contiguous; they are read and written where they lie, so that a
            parameter that moves needs a new object.
        activation: "tanh" or "relu".
        lanes: floats at once, at most: 16 (AVX-512), 8 (AVX2) or 4, as a processor that has no more.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape, or an unknown activation.
    """

    def __init__(self, networks: Sequence[Sequence[Layer]], activation: Activation, *, lanes: int = 16) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self._kept = [list(layers) for layers in networks]  # alive as long as their addresses are used
        self.inputs = networks[0][0].weight.shape[1]
        self.outputs = [layers[-1].weight.shape[0] for layers in networks]
        self._native = _C.Networks(
            [[self._described(layer) for layer in layers] for layers in networks], activation == "relu", lanes
        )
        self._workspace = torch.empty(0, dtype=torch.float32, device="cpu")
        self._rows = -1  # of the last forward pass

    @staticmethod
    def _described(layer: Layer) -> tuple[int, int, int, int, int, int]:
        wide, narrow = tuple(layer.weight.shape), layer.weight.shape[:1]
        addresses = [
            _address(name, tensor, shape)
            for (name, tensor), shape in zip(layer._asdict().items(), (wide, narrow, wide, narrow), strict=True)
        ]
        return wide[1], wide[0], addresses[0], addresses[1], addresses[2], addresses[3]

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return each network's output [B, O] for rows x [B, I] float32.

        Raises ValueError where x is not contiguous float32 on the CPU.
        """
        at = _address("x", x, (len(x), self.inputs))
        if len(x) != self._rows:
            self._rows = len(x)
            self._workspace = torch.empty(self._native.workspace(self._rows), dtype=torch.float32, device="cpu")
        outputs = [torch.empty((len(x), width), dtype=torch.float32, device="cpu") for width in self.outputs]
        self._native.forward(
            at, len(x), self._workspace.data_ptr(), [o.data_ptr() for o in outputs], torch.get_num_threads()
        )
        return outputs

    def backward(self, output_grads: Sequence[Tensor]) -> None:
        """Write the parameters' gradients, given those of the last outputs, [B, O] float32 each.

        The parameters must not have changed since that forward pass. Raises ValueError for gradients of other shapes.
        """
        if len(output_grads) != len(self.outputs):
            raise ValueError(f"output_grads: expected {len(self.outputs)}, got {len(output_grads)}")
        addresses = [
            _address("output_grads", grad, (self._rows, width))
            for grad, width in zip(output_grads, self.outputs, strict=True)
        ]
        self._native.backward(self._rows, self._workspace.data_ptr(), addresses, torch.get_num_threads())


class _Actor:
    """What actors share: where the rollout's columns lie, and working memory for each number of rows."""

    def __init__(
        self, networks: Networks, columns: GaussianColumns | CategoricalColumns, chosen: tuple[int, ...]
    ) -> None:
        steps, self._envs = columns.values.shape
        self._width = networks.outputs[0]
        widths = {"observations": (networks.inputs,), "actions": chosen, "values": (), "log_prob": ()}
        self._places: list[tuple[int, int]] = []  # of each column: where it is, and the bytes of a row
        for name, column in columns._asdict().items():
            shape = widths.get(name, (self._width,))
            dtype = torch.int64 if name == "actions" and not chosen else torch.float32
            row_bytes = dtype.itemsize * math.prod(shape)
            self._places.append((_address(name, column, (steps, self._envs, *shape), dtype), row_bytes))
        self._kept = networks, columns  # alive as long as their addresses are used
        self._native, self._steps = networks._native, steps
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of rows: noise, workspace

    def _rows(self, t: int, rows: slice) -> tuple[int, Tensor, list[int]]:
        """Return how many rows these are, room for their noise, and all addresses; or refuse them."""
        start, stop, stride = rows.indices(self._envs)
        if not 0 <= t < self._steps or stride != 1:
            raise ValueError(f"t, rows: {t}, {rows}; expected a step below {self._steps} and rows in a row")
        count, first = max(0, stop - start), t * self._envs + start
        if count not in self._own:
            noise = torch.empty((count, self._width), dtype=torch.float32, device="cpu")
            self._own[count] = noise, torch.empty(self._native.workspace(count), dtype=torch.float32, device="cpu")
        noise, workspace = self._own[count]
        columns = [at + first * row_bytes for at, row_bytes in self._places]
        return count, noise, [*columns, noise.data_ptr(), workspace.data_ptr()]


class GaussianActor(_Actor):
    """Acts for some envs at a step whose observations are stored, and stores what it says there, in one call.

    Args:
        networks: the actor's mean and the critic.
        columns: of the rollout, contiguous, written where they lie.
        log_std: [D] float32, of all states; read anew at each call, where it lies now.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """

    def __init__(self, networks: Networks, columns: GaussianColumns, log_std: Tensor) -> None:
        super().__init__(networks, columns, (networks.outputs[0],))
        self._log_std_at = _address("log_std", log_std, (self._width,))
        self._log_std = log_std  # alive as long as its address is used

    def act(self, t: int, rows: slice, generator: torch.Generator | None = None) -> None:
        """Act for the envs `rows` at step t; None: noise of torch's own generator.

        Raises ValueError for a step that there is not, or rows that do not follow one another.
        """
        count, noise, addresses = self._rows(t, rows)
        noise.normal_(generator=generator)
        self._native.act_gaussian([*addresses, self._log_std_at], count, torch.get_num_threads())


class CategoricalActor(_Actor):
    """The same for a categorical policy; a generator in the same state draws what `torch.multinomial` would.

    Args:
        networks: the actor's logits and the critic.
        columns: of the rollout, contiguous, written where they lie.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """

    def __init__(self, networks: Networks, columns: CategoricalColumns) -> None:
        super().__init__(networks, columns, ())

    def act(self, t: int, rows: slice, generator: torch.Generator | None = None) -> None:
        """Act for the envs `rows` at step t; None: noise of torch's own generator.

        Raises ValueError for a step that there is not, rows that do not follow one another, or logits that are no
        distribution.
        """
        count, noise, addresses = self._rows(t, rows)
        noise.exponential_(generator=generator)
        bad = self._native.act_categorical(addresses, count, torch.get_num_threads())
        if bad < count:
            raise ValueError(no_distribution(bad))
