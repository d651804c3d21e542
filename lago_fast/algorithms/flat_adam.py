"""Adam over one tensor: parameters, gradients and moments of all layers each lie in one block of memory.

A small network's step is otherwise spent on visiting its dozen tensors, not on arithmetic.
Source: Kingma and Ba, arXiv 1412.6980, by the op `adam`.
Test: pytest tests/algorithms/test_flat_adam.py
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lago_fast import ops

BETA_1, BETA_2 = 0.9, 0.999
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Gathered(NamedTuple):
    block: ops.AdamBlock  # what each parameter, gradient and moment is a view of
    addresses: list[tuple[int, int]]  # of each parameter and its gradient inside of the block


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam with the same numbers and the same `state_dict`, in one call per step.

    Args:
        params: parameters of one dtype on one device; each moves into the block at the first step.
        lr: learning rate.
        eps: added to the root of the second moment.
        impl: implementation of the op `adam` (`lago_fast.ops`).

    A parameter without a gradient counts as having a gradient of zero.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, eps: float = 1e-8, impl: str = "auto") -> None:
        super().__init__(params, lr=lr, betas=(BETA_1, BETA_2), eps=eps, fused=True)
        self.impl = impl
        self._gathered: _Gathered | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they stay in the block, whatever `set_to_none` says."""
        if self._gathered is None:
            super().zero_grad(set_to_none)
        else:
            self._gathered.block.grad.zero_()

    @torch.no_grad()
    def clipped_step(self, max_norm: float, lr: Tensor | None = None) -> None:
        """Scale all gradients such that their common norm is at most `max_norm`, and take one step of Adam.

        Args:
            max_norm: of all gradients together.
            lr: the learning rate as a 0-D float32 tensor on the parameters' device; None: the group's.
        """
        group = self.param_groups[0]
        settings = ops.AdamSettings(group["lr"] if lr is None else lr, BETA_1, BETA_2, group["eps"])
        ops.clipped_adam(self.gather(), settings, max_norm, impl=self.impl)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of Adam."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.clipped_step(math.inf)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what torch.optim.Adam would, each parameter with a count of steps of its own."""
        self._note_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments and settings of this class or of torch.optim.Adam."""
        super().load_state_dict(state_dict)
        self._gathered = None  # the moments are tensors of their own now

    def _note_steps(self) -> None:
        """Copy the count of steps, which the block keeps, to each parameter's state."""
        if self._gathered is not None:
            for state in self.state.values():
                state["step"].copy_(self._gathered.block.step)

    def gather(self) -> ops.AdamBlock:
        """Return the block, after moving into it what lies outside (a new gradient, a reassigned parameter)."""
        params = self.param_groups[0]["params"]
        if self._gathered is None or _addresses(params) != self._gathered.addresses:
            self._note_steps()
            self._gathered = self._moved(params)
        return self._gathered.block

    def _moved(self, params: list[nn.Parameter]) -> _Gathered:
        zeros = [torch.zeros_like(p) for p in params]
        started = [self.state[p] for p in params if self.state[p]]
        exp_avg, exp_avg_sq = (_joined([state[name] for state in started] or zeros) for name in MOMENTS)
        step = started[0]["step"] if started else torch.zeros(())
        parameter = _joined(params)
        grad = _joined([zero if p.grad is None else p.grad for p, zero in zip(params, zeros, strict=True)])

        sizes = [p.numel() for p in params]
        views = zip(*(t.split(sizes) for t in (parameter, grad, exp_avg, exp_avg_sq)), strict=True)
        for p, (own, own_grad, *averages) in zip(params, views, strict=True):
            p.data, p.grad = own.view_as(p), own_grad.view_as(p)
            self.state[p] = {"step": step.clone(), **{k: t.view_as(p) for k, t in zip(MOMENTS, averages, strict=True)}}
        step = step.to(parameter.device, copy=True)
        return _Gathered(ops.AdamBlock(parameter, grad, exp_avg, exp_avg_sq, step), _addresses(params))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _addresses(params: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), -1 if p.grad is None else p.grad.data_ptr()) for p in params]
