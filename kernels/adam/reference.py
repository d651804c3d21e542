"""A step of Adam over one block of parameters, after scaling its gradient to a largest norm: the definition.

Source: Kingma and Ba, arXiv 1412.6980, by torch.optim.adam's function.
Test: pytest tests/kernels/test_adam.py tests/algorithms/test_flat_adam.py
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adam import adam


class Block(NamedTuple):
    parameter: Tensor  # [n]
    grad: Tensor  # [n], scaled in place
    exp_avg: Tensor  # [n]
    exp_avg_sq: Tensor  # [n]
    step: Tensor  # 0-D float32, steps taken


class Settings(NamedTuple):
    lr: float | Tensor  # a 0-D float32 tensor where a captured graph is to follow its changes
    beta_1: float
    beta_2: float
    eps: float


def scale_to_norm(grad: Tensor, max_norm: float) -> Tensor:
    """Scale a gradient in place such that its norm is at most `max_norm`; return the norm before, 0-D."""
    norm = torch.linalg.vector_norm(grad)
    # as torch.nn.utils.clip_grad_norm_ does, without asking on the host which is smaller
    grad.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))
    return norm


def step(block: Block, settings: Settings) -> None:
    """Take one step of Adam in place."""
    adam(
        [block.parameter],
        [block.grad],
        [block.exp_avg],
        [block.exp_avg_sq],
        [],
        [block.step],
        fused=True,
        amsgrad=False,
        beta1=settings.beta_1,
        beta2=settings.beta_2,
        lr=settings.lr,
        weight_decay=0.0,
        eps=settings.eps,
        maximize=False,
    )


def clipped_step(block: Block, settings: Settings, max_norm: float) -> None:
    """Scale the gradient to a norm of at most `max_norm`, then take one step; in place."""
    scale_to_norm(block.grad, max_norm)
    step(block, settings)
