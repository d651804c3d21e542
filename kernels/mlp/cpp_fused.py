"""Multilayer perceptrons and their gradients in native code, on CPU tensors.

Both passes keep what they need in one workspace: a pass allocates its outputs and nothing else.
Native side: csrc/ops/mlp.cc. Test: pytest tests/kernels/test_mlp.py
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lago_fast import _C

from .reference import ACTIVATIONS, ActColumns, Activation, Layer


def _address(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> int:
    """Return where a tensor lies, 0 for None, or refuse what native code would misread."""
    if tensor is None:
        return 0
    if tensor.shape != shape or tensor.dtype is not torch.float32 or not (tensor.is_cpu and tensor.is_contiguous()):
        raise ValueError(
            f"{name}: expected contiguous float32 {list(shape)} on the CPU, "
            f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}; use impl='reference'"
        )
    return tensor.data_ptr()


class Networks:
    """Several networks on the same rows, forward and backward.

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
        self._workspace = torch.empty(0)
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
            self._workspace = torch.empty(self._native.workspace(self._rows))
        outputs = [torch.empty((len(x), width)) for width in self.outputs]
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


class GaussianActor:
    """Acts for some envs at a step whose observations are stored, and stores what it says there, in one call.

    Args:
        networks: the actor's mean and the critic.
        log_std: [D] float32, of all states; read anew at each call, where it lies now.
        columns: of the rollout, float32 and contiguous, written where they lie.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """

    def __init__(self, networks: Networks, log_std: Tensor, columns: ActColumns) -> None:
        steps, self._envs = columns.values.shape
        wide, flat = (steps, self._envs, networks.outputs[0]), (steps, self._envs)
        shapes = ((steps, self._envs, networks.inputs), wide, wide, wide, flat, flat)
        places = [
            (_address(name, column, shape), 4 * math.prod(shape[2:]))
            for (name, column), shape in zip(columns._asdict().items(), shapes, strict=True)
        ]
        self._observations, self._mean, self._log_stds, self._actions, self._values, self._log_prob = places
        self._log_std = _address("log_std", log_std, wide[2:])
        self._kept = networks, log_std, columns  # alive as long as their addresses are used
        self._native, self._steps = networks._native, steps
        self._own: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of rows: noise, workspace

    def act(self, t: int, rows: slice, generator: torch.Generator | None = None) -> None:
        """Act for the envs `rows` at step t; None: noise of torch's own generator.

        Raises ValueError for a step that there is not, or rows that do not follow one another.
        """
        start, stop, stride = rows.indices(self._envs)
        if not 0 <= t < self._steps or stride != 1:
            raise ValueError(f"t, rows: {t}, {rows}; expected a step below {self._steps} and rows in a row")
        count, first = max(0, stop - start), t * self._envs + start
        if count not in self._own:
            noise = torch.empty((count, self._mean[1] // 4))
            self._own[count] = noise, torch.empty(self._native.workspace(count))
        noise, workspace = self._own[count]
        noise.normal_(generator=generator)

        def at(place: tuple[int, int]) -> int:
            return place[0] + first * place[1]

        self._native.act_gaussian(
            (
                at(self._observations),
                workspace.data_ptr(),
                at(self._mean),
                at(self._values),
                self._log_std,
                noise.data_ptr(),
                at(self._actions),
                at(self._log_prob),
                at(self._log_stds),
            ),
            count,
            torch.get_num_threads(),
        )
