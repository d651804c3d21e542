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
from lago_fast.errors import UnsupportedArgument

BETA_1, BETA_2 = 0.9, 0.999
MOMENTS = ("exp_avg", "exp_avg_sq")


class _Gathered(NamedTuple):
    params: list[nn.Parameter]
    grads: list[Tensor]  # of these, inside of the block
    block: ops.AdamBlock  # what each parameter, gradient and moment is a view of
    addresses: list[tuple[int, int]]  # of each parameter and its gradient inside of the block


class FlatAdam(torch.optim.Adam):
    """torch.optim.Adam with the same numbers and the same `state_dict`, in one call per step.

    Args:
        params: parameters of one dtype on one device; each moves into the block at the first step.
        lr: learning rate.
        eps: added to the root of the second moment.
        impl: implementation of the op `adam` (`lago_fast.ops`).

    A parameter that requires no gradient is left alone; one that requires some and has none counts as having zeros. The
    count of steps is one for all: a parameter that joins later shares it.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3, eps: float = 1e-8, impl: str = "auto") -> None:
        super().__init__(params, lr=lr, betas=(BETA_1, BETA_2), eps=eps, fused=True)
        self.impl = impl
        self._gathered: _Gathered | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle or a copy keeps; the block is made anew there."""
        self._note_steps()
        return {**super().__getstate__(), "impl": self.impl}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._gathered = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Set all gradients to zero; they stay in the block, whatever `set_to_none` says."""
        if self._gathered is None:
            super().zero_grad(set_to_none)
        elif all(p.grad is grad for p, grad in zip(self._gathered.params, self._gathered.grads, strict=True)):
            self._gathered.block.grad.zero_()
        else:
            self.gather().grad.zero_()

    @torch.no_grad()
    def clipped_step(self, max_norm: float, lr: Tensor | None = None) -> None:
        """Scale all gradients such that their common norm is at most `max_norm`, and take one step of Adam.

        Args:
            max_norm: of all gradients together.
            lr: the learning rate as a 0-D float32 tensor on the parameters' device; None: the group's.

        Raises:
            UnsupportedArgument: the groups were given what this Adam has not.
        """
        group, *others = self.param_groups
        if others or group["weight_decay"] or group["amsgrad"] or group["maximize"]:
            raise UnsupportedArgument(
                "policy.optimizer: this Adam has one group of parameters and neither weight_decay, amsgrad nor "
                "maximize; pass policy_kwargs={'optimizer_class': torch.optim.Adam}"
            )
        beta_1, beta_2 = group["betas"]
        settings = ops.AdamSettings(group["lr"] if lr is None else lr, beta_1, beta_2, group["eps"])
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
            for p in self._gathered.params:
                self.state[p]["step"].copy_(self._gathered.block.step)

    def gather(self) -> ops.AdamBlock:
        """Return the block, after moving into it what lies outside (a new gradient, a reassigned parameter)."""
        params = [p for p in self.param_groups[0]["params"] if p.requires_grad]
        if self._gathered is None or _addresses(params) != self._gathered.addresses:
            self._note_steps()
            self._gathered = self._moved(params)
        return self._gathered.block

    def _moved(self, params: list[nn.Parameter]) -> _Gathered:
        zeros = [torch.zeros_like(p) for p in params]
        started = [self.state[p] for p in params if self.state[p]]
        exp_avg, exp_avg_sq = (
            _joined([self.state[p].get(name, zero) for p, zero in zip(params, zeros, strict=True)]) for name in MOMENTS
        )
        step = started[0]["step"] if started else torch.zeros((), dtype=torch.float32, device="cpu")
        parameter = _joined(params)
        grad = _joined([zero if p.grad is None else p.grad for p, zero in zip(params, zeros, strict=True)])

        sizes = [p.numel() for p in params]
        views = zip(*(t.split(sizes) for t in (parameter, grad, exp_avg, exp_avg_sq)), strict=True)
        for p, (own, own_grad, *averages) in zip(params, views, strict=True):
            p.data, p.grad = own.view_as(p), own_grad.view_as(p)
            self.state[p] = {"step": step.clone(), **{k: t.view_as(p) for k, t in zip(MOMENTS, averages, strict=True)}}
        step = step.to(parameter.device, copy=True)
        grads = [p.grad for p in params if p.grad is not None]
        return _Gathered(params, grads, ops.AdamBlock(parameter, grad, exp_avg, exp_avg_sq, step), _addresses(params))


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def _addresses(params: list[nn.Parameter]) -> list[tuple[int, int]]:
    return [(p.data_ptr(), -1 if p.grad is None else p.grad.data_ptr()) for p in params]
