"""Adam over one tensor: parameters, gradients and moments of all layers each lie in one block of memory.

A small network's step is otherwise spent on visiting its dozen tensors, not on arithmetic.
Source: Kingma and Ba, arXiv 1412.6980, by torch.optim.adam's function.
Test: pytest tests/algorithms/test_flat_adam.py
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.adam import adam

BETA_1, BETA_2 = 0.9, 0.999
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Block(NamedTuple):
    """What each parameter, gradient and moment is a view of; [all elements] but for the last two."""

    parameter: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # 0-D float32
    addresses: list[tuple[int, int]]  # of each parameter and its gradient inside of the block


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam with the same numbers and the same `state_dict`, in one call per step.

    Args:
        params: parameters of one dtype on one device; each moves into the block at the first step.
        lr: learning rate.
        eps: added to the root of the second moment.

    A parameter without a gradient counts as having a gradient of zero.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, eps: float = 1e-8) -> None:
        super().__init__(params, lr=lr, betas=(BETA_1, BETA_2), eps=eps, fused=True)
        self._block: _Block | None = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they stay in the block, whatever `set_to_none` says."""
        if self._block is None:
            super().zero_grad(set_to_none)
        else:
            self._block.grad.zero_()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale all gradients such that their common norm is at most `max_norm`; return the norm before, 0-D."""
        grad = self._gathered().grad
        norm = torch.linalg.vector_norm(grad)
        # as torch.nn.utils.clip_grad_norm_ does, without asking on the host which is smaller
        grad.mul_((max_norm / (norm + 1e-6)).clamp_(max=1.0))
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step of Adam."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        block, group = self._gathered(), self.param_groups[0]
        adam(
            [block.parameter],
            [block.grad],
            [block.exp_avg],
            [block.exp_avg_sq],
            [],
            [block.step],
            fused=True,
            amsgrad=False,
            beta1=BETA_1,
            beta2=BETA_2,
            lr=group["lr"],
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Return what torch.optim.Adam would, each parameter with a count of steps of its own."""
        self._note_steps()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments and settings of this class or of torch.optim.Adam."""
        super().load_state_dict(state_dict)
        self._block = None  # the moments are tensors of their own now

    def _note_steps(self) -> None:
        """Copy the count of steps, which the block keeps, to each parameter's state."""
        if self._block is not None:
            for state in self.state.values():
                state["step"].copy_(self._block.step)

    def _gathered(self) -> _Block:
        """Return the block, after moving into it what lies outside (a new gradient, a reassigned parameter)."""
        params = self.param_groups[0]["params"]
        if self._block is None or _addresses(params) != self._block.addresses:
            self._note_steps()
            self._block = self._gather(params)
        return self._block

    def _gather(self, params: list[nn.Parameter]) -> _Block:
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
        return _Block(parameter, grad, exp_avg, exp_avg_sq, step, _addresses(params))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _addresses(params: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), -1 if p.grad is None else p.grad.data_ptr()) for p in params]
