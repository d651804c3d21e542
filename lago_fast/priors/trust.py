"""How far a state is from the demonstrations, in the latent space that a prior answers from: its trust.

The distance is the one to the nearest of some latents of demonstrated states (Sun et al., "Out-of-Distribution
Detection with Deep Nearest Neighbors", arXiv 2204.06507), in units of the distance that demonstrations have from
each other's episodes. Test: pytest tests/priors/test_trust.py
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lago_fast.priors.base import trust_at

if TYPE_CHECKING:
    from lago_fast.priors.base import ActionPrior

INSIDE = 0.9  # share of the demonstrated states that are fully trusted, seen from the other episodes
MEASURED_ROWS = 4096  # demonstrated states, at most, by which the unit of distance is found


class Demonstrated(nn.Module):
    """Latents of demonstrated states.

    Args:
        latents: [K, Z] float32.
        scale: [] float32, the distance up to which a latent is fully trusted.
    """

    latents: Tensor
    scale: Tensor

    def __init__(self, latents: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("latents", latents)
        self.register_buffer("scale", scale)

    def forward(self, latent: Tensor) -> Tensor:
        """Return the trust [B] in 0..1 of latents [B, Z]: 1 up to `scale`, beyond it exp((1 - (d / scale)^2) / 2)."""
        return trust_at((torch.cdist(latent.float(), self.latents).amin(dim=1) / self.scale).square())


@torch.no_grad()
def remember(
    prior: "ActionPrior", states: Tensor, instruction_id: Tensor, episode_id: Tensor, rows: int
) -> Demonstrated | None:
    """Return latents of at most `rows` demonstrated states; None with one episode, which has none to be measured by.

    Args:
        prior: frozen, fitted to them; its answers hold latents.
        states: [n, S], raw.
        instruction_id: [n] int64.
        episode_id: [n] int64.
        rows: that are kept, evenly spread over the n; rows of one episode follow each other.
    """
    if len(episode_id.unique()) < 2:
        return None
    kept, seen = (_spread(len(states), count).to(states.device) for count in (rows, MEASURED_ROWS))
    latents, others = (prior.query(states[i], instruction_id[i]).latent for i in (kept, seen))
    assert latents is not None
    assert others is not None
    own = episode_id[seen][:, None] == episode_id[kept]
    nearest = torch.cdist(others.float(), latents.float()).masked_fill(own, torch.inf).amin(dim=1)
    scale = nearest[nearest.isfinite()].quantile(INSIDE).clamp(min=torch.finfo(torch.float32).tiny)
    return Demonstrated(latents.float(), scale)


@torch.no_grad()
def encode_again(known: Demonstrated, exact: Tensor, latents: Tensor) -> Demonstrated:
    """Return latents of demonstrated states as another prior has them, which answers nearly as theirs does.

    The unit of distance grows by what rounding adds to the squared distances between demonstrated states: a state then
    has about the trust that it had.

    Args:
        known: of the exact prior.
        exact: [n, Z], the exact prior's latents of at least two demonstrated states.
        latents: [n, Z], the other prior's latents of the same states.
    """
    n = len(exact)
    kept, seen = (_spread(n, count).to(exact.device) for count in (len(known.latents), MEASURED_ROWS))
    own = seen[:, None] == kept

    def squared(found: Tensor) -> Tensor:
        found = found.float()
        nearest = torch.cdist(found[seen], found[kept]).masked_fill(own, torch.inf).amin(dim=1)
        return nearest[nearest.isfinite()].square().mean()

    scale = (known.scale.square() + squared(latents) - squared(exact)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    return Demonstrated(latents[kept].float(), scale)


def _spread(n: int, count: int) -> Tensor:
    """Return the indices of at most `count` of n rows, evenly spread."""
    return torch.linspace(0, n - 1, min(n, count)).round().long()
