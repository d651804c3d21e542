"""What a latent-action prior has beside its transformer: projector, head, and the moments of what they read.

Test: pytest tests/priors/test_latent_action.py
"""

from typing import Any

import torch
from torch import Tensor, nn

from lago_fast.priors.config import PriorConfig

WORDS_AT_A_TIME = 4096
SMALL = 1 / 6  # of the usual size: where a projector starts whose token is to stay in the background


def take_moments(rows: Tensor, mean: Tensor, std: Tensor, least: float = 0.0) -> None:
    """Write mean and std [S] of rows [n, S], the latter at least `least`; a constant column keeps std 1."""
    found, middle = torch.std_mean(rows, dim=0, correction=0)
    mean.copy_(middle)
    std.copy_(torch.where(found < 1e-6, torch.ones_like(found), found.clamp(min=least)))


def token_rms(words: Any) -> Tensor:
    """Return the root mean square [] of what an embedding module returns over its words; some scale their weights."""
    weight = words.weight.detach()
    if type(words).forward is nn.Embedding.forward:
        return weight.float().square().mean().sqrt()
    parts = torch.arange(len(weight), device=weight.device).split(WORDS_AT_A_TIME)
    with torch.no_grad():
        squares = [words(part).double().square().sum() for part in parts]
    return (torch.stack(squares).sum() / weight.numel()).sqrt().float()


def projector(config: PriorConfig, width: int) -> nn.Sequential:
    """Return what maps states [B, S] to tokens [B, width]."""
    if config.state_path == "token":
        return nn.Sequential(nn.Linear(config.state_dim, width), nn.GELU(), nn.Linear(width, width))
    linear = nn.Linear(config.state_dim, width)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.mul_(SMALL)
    return nn.Sequential(linear)


def head(config: PriorConfig, width: int, outputs: int) -> nn.Module:
    """Return what maps latents to numbers [B, outputs]; of `width`, or with the state beside it."""
    hidden = config.head_hidden
    if hidden is None:
        return nn.Linear(width, outputs)
    if config.state_path == "token":
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, outputs))
    first = nn.Linear(width + config.state_dim, hidden)
    return nn.Sequential(first, nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, outputs))
