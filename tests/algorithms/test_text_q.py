"""The Q network is an MLP over the two vectors side by side."""

import pytest
import torch
from torch import nn

from lago_fast.algorithms.text_q import TextQNetwork, q_values, vectors
from lago_fast.algorithms.text_states import PADDING
from lago_fast.errors import UnsupportedArgument
from tests.algorithms.text_fakes import FakeEncoder


@pytest.mark.parametrize(("net_arch", "activation", "kind"), [((64, 64), "relu", nn.ReLU), ((16,), "tanh", nn.Tanh)])
def test_it_is_an_mlp_over_the_vectors_side_by_side(net_arch, activation, kind):
    network, encoder = TextQNetwork(FakeEncoder.width, net_arch, activation), FakeEncoder()
    states, actions = encoder.ids(["play", "here", "play", "there"]).reshape(2, 2), encoder.ids(["go", "stay", "look"])
    network.fit_inputs(vectors(encoder, states), encoder.rows(actions))
    whole = nn.Sequential(nn.Linear(3 * encoder.width, net_arch[0]), *network.rest)
    whole[0].weight.data = torch.cat([network.state.weight, network.action.weight], dim=1).data
    whole[0].bias.data = network.state.bias.data
    assert sum(type(layer) is kind for layer in whole) == len(net_arch)

    table = torch.stack([actions, torch.tensor([actions[2], actions[0], PADDING])])
    found = q_values(network, encoder, states, table)
    assert found[1, 2] == -torch.inf
    for row, column in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        state = (vectors(encoder, states)[row] - network.state_mean) / network.state_spread
        action = (encoder.rows(table[row, column]) - network.action_mean) / network.action_spread
        torch.testing.assert_close(found[row, column], whole(torch.cat([state, action]))[0], rtol=1e-4, atol=1e-5)


def test_inputs_are_centred_and_scaled_by_the_texts_given():
    network = TextQNetwork(1)
    network.fit_inputs(torch.tensor([[1.0, 5.0], [3.0, 5.0]]), torch.tensor([[0.0], [4.0]]))
    assert network.state_mean.tolist() == [2.0, 5.0]
    assert network.state_spread.tolist() == pytest.approx([1.0, 1e-3])  # a dimension that is the same everywhere
    assert network.action_mean.tolist() == [2.0]
    assert bool(network.is_fitted)


def test_gradients_reach_every_parameter_and_no_vector():
    network, encoder = TextQNetwork(FakeEncoder.width), FakeEncoder()
    q_values(network, encoder, encoder.ids(["play", "here"])[None], encoder.ids(["go", "stay"])[None]).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())


def test_what_is_refused():
    with pytest.raises(UnsupportedArgument, match="activation='gelu'"):
        TextQNetwork(8, activation="gelu")
    for widths in ((), (0,), (8, -1)):
        with pytest.raises(UnsupportedArgument, match="net_arch="):
            TextQNetwork(8, widths)
