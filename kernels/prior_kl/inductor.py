"""The definition, compiled by torch.compile with its inductor backend.

Test: pytest tests/kernels/test_inductor.py
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference
from .reference import CategoricalInputs, Direction, GaussianInputs


@cache
def _compiled(name: str) -> Any:
    # shapes are specialised: a training run has one or two
    return torch.compile(getattr(reference, name), dynamic=False)


def categorical(inputs: CategoricalInputs, prior_temperature: Tensor, direction: Direction) -> Tensor:
    """Return KL [B] in nats, differentiable; arguments as the definition's."""
    return _compiled("categorical")(inputs, prior_temperature, direction)


def gaussian(inputs: GaussianInputs, prior_temperature: Tensor, direction: Direction) -> Tensor:
    """Return KL [B] in nats, differentiable; arguments as the definition's."""
    return _compiled("gaussian")(inputs, prior_temperature, direction)
