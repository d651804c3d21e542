"""Q(instruction, observation, action) over frozen text embeddings.

Q is an MLP over the vectors of the three texts side by side. The paper embeds the three as one text, with BERT; apart,
each text is embedded once, whatever it is combined with, a prior can share the vectors, and the first layer is a sum
of two parts, of which the action's is computed once per distinct action of a batch.
Source: arXiv 2410.07927. Test: pytest tests/algorithms/test_text_q.py
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lago_fast.algorithms.text_states import PADDING
from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.text_base import TextEncoder

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh}
SMALLEST_SPREAD = 1e-3  # of a dimension of unit vectors, below which texts do not differ in it


class TextQNetwork(nn.Module):
    """An MLP over a state's vectors, of its instruction and its observation, and an action's.

    Args:
        width: Z, of one vector.
        net_arch: widths of the hidden layers, at least one.
        activation: "relu" or "tanh".

    Raises:
        UnsupportedArgument: another activation, or widths below 1.
    """

    def __init__(self, width: int, net_arch: Sequence[int] = (64, 64), activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UnsupportedArgument(f"activation={activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        if not net_arch or min(net_arch) < 1:
            raise UnsupportedArgument(f"net_arch={tuple(net_arch)}: give at least one hidden layer of at least 1")
        self.state = nn.Linear(2 * width, net_arch[0])
        self.action = nn.Linear(width, net_arch[0], bias=False)
        layers: list[nn.Module] = [ACTIVATIONS[activation]()]
        for before, after in zip(net_arch, [*net_arch[1:], 1], strict=True):
            layers += [nn.Linear(before, after), ACTIVATIONS[activation]()]
        self.rest = nn.Sequential(*layers[:-1])
        for name, columns in (("state", 2 * width), ("action", width)):
            self.register_buffer(f"{name}_mean", torch.zeros(columns))
            self.register_buffer(f"{name}_spread", torch.full((columns,), width**-0.5))
        self.register_buffer("is_fitted", torch.zeros((), dtype=torch.bool))

    @torch.no_grad()
    def fit_inputs(self, states: Tensor, actions: Tensor) -> None:
        """Centre and scale each dimension by what it is over the given texts, [n, 2 Z] and [m, Z].

        A game's texts have most of their words in common, and so their vectors: what tells states apart is a hundredth
        of a vector's length, and would be learnt at a hundredth of the speed.
        """
        for name, rows in (("state", states), ("action", actions)):
            mean = rows.mean(dim=0)
            spread = (rows - mean).square().mean(dim=0).sqrt().clamp(min=SMALLEST_SPREAD)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_spread").copy_(spread)
        self.get_buffer("is_fitted").fill_(True)

    def forward(self, states: Tensor, actions: Tensor, which: Tensor) -> Tensor:
        """Return Q [B, A] of states [B, 2 Z] and, of the distinct actions [U, Z], those in `which` [B, A] int64."""
        state = self.state((states - self.get_buffer("state_mean")) / self.get_buffer("state_spread"))
        action = self.action((actions - self.get_buffer("action_mean")) / self.get_buffer("action_spread"))
        hidden = state.unsqueeze(1) + nn.functional.embedding(which, action)
        return self.rest(hidden).squeeze(-1)


def vectors(encoder: TextEncoder, state: Tensor) -> Tensor:
    """Return the vectors [B, 2 Z] of instructions and observations by their ids [B, 2]."""
    return encoder.rows(state.flatten()).reshape(len(state), -1)


def q_values(network: TextQNetwork, encoder: TextEncoder, state: Tensor, actions: Tensor) -> Tensor:
    """Return Q [B, A] of states [B, 2] and actions [B, A] by the ids of their texts, -inf where padded."""
    padded = actions == PADDING
    distinct, which = torch.unique(actions.clamp(min=0), return_inverse=True)
    values = network(vectors(encoder, state), encoder.rows(distinct), which)
    return values.masked_fill(padded, -torch.inf)
