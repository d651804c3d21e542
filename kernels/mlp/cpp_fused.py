"""Multilayer perceptrons and their gradients in native code, on CPU tensors.

Both passes keep what they need in one workspace: a pass allocates its outputs and nothing else.
Native side: csrc/ops/mlp.cc. Test: pytest tests/kernels/test_mlp.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lago_fast import _C

from .reference import ACTIVATIONS, Activation, Layer


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
