"""What a loss returns beside its gradients, where a caller gives it back to be overwritten.

Test: pytest tests/kernels/test_ppo_outputs.py
"""

from typing import Any

import torch
from torch import Tensor


def check_outputs(outputs: Any, device: torch.device) -> None:
    """Refuse outputs (a NamedTuple) that a loss on a device cannot write.

    Raises:
        ValueError: one is not 0-D float32 on the device.
    """
    for name, t in outputs._asdict().items():
        if t.dtype is not torch.float32 or t.dim() != 0 or t.device != device:
            raise ValueError(
                f"out[0].{name}: expected a 0-D float32 tensor on {device}, got {t.dtype} {list(t.shape)} on "
                f"{t.device}; pass what an earlier call returned"
            )


def packed(outputs: Any, device: torch.device) -> Tensor:
    """Return the one tensor, [number of outputs] float32, that the outputs of an earlier call are elements of.

    Raises:
        ValueError: they are not its elements one after the other, or a loss on the device cannot write them.
    """
    check_outputs(outputs, device)
    first = outputs[0]
    for i, (name, t) in enumerate(outputs._asdict().items()):
        if t.data_ptr() != first.data_ptr() + i * first.element_size():
            raise ValueError(
                f"out[0].{name}: expected to lie behind the one before it in memory; pass what an earlier call of "
                "this implementation returned"
            )
    return first.as_strided((len(outputs),), (1,))
