"""Norm, scale and a step of Adam in native code, on one CPU block.

Native side: csrc/ops/adam.cc. Test: pytest tests/kernels/test_adam.py
"""

import torch

from lago_fast import _C

from .reference import Block, Settings


def clipped_step(block: Block, settings: Settings, max_norm: float, *, lanes: int = 16) -> None:
    """Scale the gradient to a norm of at most `max_norm`, then take one step; in place.

    Args:
        block: contiguous float32 [n] on the CPU, and a 0-D count of steps.
        settings: rates and constants.
        max_norm: of the gradient.
        lanes: floats at once, at most: 16 (AVX-512), 8 (AVX2) or 4, as a processor that has no more.

    Raises:
        ValueError: a tensor on another device, of another dtype or shape.
    """
    for name, tensor in zip(Block._fields, block[:4], strict=False):
        if (
            tensor.shape != block.parameter.shape
            or tensor.dtype is not torch.float32
            or not (tensor.is_cpu and tensor.is_contiguous())
        ):
            raise ValueError(
                f"{name}: expected contiguous float32 {list(block.parameter.shape)} on the CPU, got {tensor.dtype} "
                f"{list(tensor.shape)} on {tensor.device}; use impl='reference'"
            )
    block.step.add_(1)
    _C.adam(
        tuple(tensor.data_ptr() for tensor in block[:4]),
        block.parameter.numel(),
        float(settings.lr),
        *settings[1:],
        max_norm,
        block.step.item(),
        lanes,
    )
