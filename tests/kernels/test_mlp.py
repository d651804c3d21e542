"""The op `mlp`: networks on the same rows, against float64 autograd of the definition, and by hand."""

import copy
import itertools

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.mlp import cpp_fused, reference
from lago_fast.kernels.mlp.reference import Layer

LANES = (4, 8, 16)


def draw(widths, *, seed=0, dtype=torch.float32):
    """Return the layers of one network, its gradients poisoned."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        weight = torch.randn(outputs, inputs, generator=generator) * (1.5 / inputs**0.5)
        bias = 0.3 * torch.randn(outputs, generator=generator)
        layers.append(Layer(*(t.to(dtype) for t in (weight, bias, weight * torch.nan, bias * torch.nan))))
    return layers


def in_double(networks):
    return [[Layer(*(t.double() for t in layer)) for layer in layers] for layers in networks]


def both_passes(networks, x, output_grads):
    outputs = networks.forward(x)
    networks.backward(output_grads)
    return outputs


def grads_of(networks):
    return [t for layers in networks for layer in layers for t in (layer.weight_grad, layer.bias_grad)]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("rows", [1, 7, 128, 129, 2049])
@pytest.mark.parametrize(
    "shapes", [[(39, 64, 64, 4), (39, 64, 64, 1)], [(3, 5)], [(1, 17, 1), (1, 2)], [(50, 33, 48, 40)]], ids=str
)
def test_no_worse_than_eager_against_float64(shapes, rows, lanes, activation):
    networks = [draw(widths, seed=i) for i, widths in enumerate(shapes)]
    x = torch.randn(rows, shapes[0][0])
    output_grads = [torch.randn(rows, widths[-1]) for widths in shapes]
    truth, eager = in_double(networks), copy.deepcopy(networks)
    exact = both_passes(reference.Networks(truth, activation), x.double(), [g.double() for g in output_grads])
    by_eager = both_passes(reference.Networks(eager, activation), x, output_grads)
    by_native = both_passes(cpp_fused.Networks(networks, activation, lanes=lanes), x, output_grads)
    for right, theirs, ours in zip(
        [*exact, *grads_of(truth)], [*by_eager, *grads_of(eager)], [*by_native, *grads_of(networks)], strict=True
    ):
        scale = right.abs().max()
        # the sums are taken in another order
        assert (ours - right).abs().max() <= 2 * (theirs - right).abs().max() + 2e-6 * scale


def test_by_hand():
    # y = 2 tanh(3 x - 1) + 0.5 at x = 1: h = tanh 2; dy/dh = 2, dh/dz = 1 - h^2
    weight, bias = torch.tensor([[3.0]]), torch.tensor([-1.0])
    layers = [Layer(weight, bias, torch.empty(1, 1), torch.empty(1))]
    layers.append(Layer(torch.tensor([[2.0]]), torch.tensor([0.5]), torch.empty(1, 1), torch.empty(1)))
    h = 0.9640275800758169
    for module in (reference, cpp_fused):
        networks = module.Networks([layers], "tanh")
        (y,) = networks.forward(torch.tensor([[1.0]]))
        networks.backward([torch.tensor([[10.0]])])
        assert y.item() == pytest.approx(2 * h + 0.5, rel=1e-6)
        found = [t.item() for layer in layers for t in layer[2:]]
        assert found == pytest.approx([10 * 2 * (1 - h * h)] * 2 + [10 * h, 10.0], rel=1e-5)


def test_tanh_over_its_whole_range():
    layers = [Layer(torch.eye(1), torch.zeros(1), None, None), Layer(torch.eye(1), torch.zeros(1), None, None)]
    x = torch.cat([torch.linspace(-20, 20, 20001), torch.logspace(-30, 0, 400), torch.tensor([1e30, -1e30])])
    for lanes in LANES:
        (y,) = cpp_fused.Networks([layers], "tanh", lanes=lanes).forward(x.unsqueeze(1))
        error = y.flatten() - x.double().tanh()
        assert error.abs().max() < 1.2e-7
        assert (error / x.double().tanh()).nan_to_num().abs().max() < 3e-7
        assert y.abs().max() <= 1.0


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("lanes", LANES)
def test_a_nan_stays_in_its_row(activation, lanes):
    networks = [draw((5, 16, 3))]
    x = torch.randn(9, 5)
    x[4, 2] = torch.nan
    (y,) = cpp_fused.Networks(networks, activation, lanes=lanes).forward(x)
    assert y.isnan().all(dim=1).nonzero().flatten().tolist() == [4]
    assert y.isnan().sum() == 3


def test_same_bits_for_any_number_of_threads():
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            networks = [draw((39, 64, 64, 4)), draw((39, 64, 1), seed=1)]
            torch.manual_seed(0)
            x, grads = torch.randn(3000, 39), [torch.randn(3000, 4), torch.randn(3000, 1)]
            outputs = both_passes(cpp_fused.Networks(networks, "tanh"), x, grads)
            found.append([*outputs, *grads_of(networks)])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


def test_nothing_is_remembered_from_another_number_of_rows():
    networks = [draw((4, 8, 2))]
    native = cpp_fused.Networks(networks, "tanh")
    x, grad = torch.randn(200, 4), torch.randn(200, 2)
    native.forward(torch.randn(300, 4))
    both_passes(native, x, [grad])
    once = [g.clone() for g in grads_of(networks)]
    both_passes(cpp_fused.Networks(networks, "tanh"), x, [grad])
    assert all(torch.equal(a, b) for a, b in zip(once, grads_of(networks), strict=True))


def test_no_rows():
    networks = [draw((4, 8, 2))]
    native = cpp_fused.Networks(networks, "tanh")
    assert native.forward(torch.empty(0, 4))[0].shape == (0, 2)
    native.backward([torch.empty(0, 2)])
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads_of(networks))


def test_refusals():
    with pytest.raises(ValueError, match="activation"):
        cpp_fused.Networks([draw((4, 2))], "gelu")
    with pytest.raises(ValueError, match=r"weight: expected contiguous torch\.float32"):
        cpp_fused.Networks([draw((4, 2), dtype=torch.float64)], "tanh")
    with pytest.raises(ValueError, match="widths do not fit"):
        cpp_fused.Networks([[*draw((4, 3)), *draw((2, 1))]], "tanh")
    with pytest.raises(ValueError, match="one width"):
        cpp_fused.Networks([draw((4, 2)), draw((5, 2))], "tanh")
    native = cpp_fused.Networks([draw((4, 2))], "tanh")
    with pytest.raises(ValueError, match=r"x: expected contiguous torch.float32 \[3, 4\]"):
        native.forward(torch.randn(3, 5))
    native.forward(torch.randn(3, 4))
    with pytest.raises(ValueError, match="output_grads"):
        native.backward([torch.randn(2, 2)])
    with pytest.raises(ValueError, match="output_grads: expected 1"):
        native.backward([])
    only_forward = cpp_fused.Networks([[Layer(*layer[:2], None, None) for layer in draw((4, 2))]], "tanh")
    only_forward.forward(torch.randn(3, 4))
    with pytest.raises(ValueError, match="weight_grad"):
        only_forward.backward([torch.randn(3, 2)])


def test_the_door_chooses():
    layers = [draw((4, 2))]
    assert isinstance(ops.networks(layers, "tanh"), cpp_fused.Networks)
    assert isinstance(ops.networks(layers, "tanh", impl="reference"), reference.Networks)


def columns_of(steps, envs, inputs, dims):
    """Return a rollout's columns, poisoned but for the observations."""
    wide, flat = torch.full((steps, envs, dims), torch.nan), torch.full((steps, envs), torch.nan)
    seen = torch.randn(steps, envs, inputs)
    return ops.GaussianColumns(seen, wide, wide.clone(), wide.clone(), flat, flat.clone())


def acted(implementation, networks, columns, log_std, calls):
    actor = implementation.GaussianActor(implementation.Networks(networks, "tanh"), columns, log_std)
    generator = torch.Generator().manual_seed(3)
    for t, rows in calls:
        actor.act(t, rows, generator)
    return columns[1:]


@pytest.mark.parametrize(("envs", "dims"), [(1, 1), (7, 3), (64, 4), (65, 17)])
def test_an_actor_stores_what_the_definition_stores_and_nothing_else(envs, dims):
    networks = [draw((5, 16, dims), seed=1), draw((5, 16, 1), seed=2)]
    log_std = torch.linspace(-3, 1, dims)
    half = envs // 2
    calls = [(0, slice(None)), (2, slice(0, half)), (2, slice(half, envs))]
    columns = columns_of(3, envs, 5, dims)
    exact = [c.double() for c in columns]
    truth = acted_on_double(networks, exact, log_std.double(), calls)
    ours = acted(cpp_fused, networks, columns, log_std, calls)
    for right, found in zip(truth, ours, strict=True):
        assert found[1].isnan().all()
        torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


def acted_on_double(networks, columns, log_std, calls):
    """Return the definition's answers in float64, to noise that is drawn in float32."""
    drawn = torch.Generator().manual_seed(3)
    with_noise = ops.GaussianColumns(*columns)
    mlps = reference.Networks(in_double(networks), "tanh")
    for t, rows in calls:
        mean, values = mlps.forward(with_noise.observations[t, rows])
        noise = torch.empty(mean.shape).normal_(generator=drawn).double()
        normal = torch.distributions.Normal(mean, log_std.exp().expand_as(mean))
        actions = mean + log_std.exp() * noise
        said = (mean, log_std, actions, values.flatten(), normal.log_prob(actions).sum(-1))
        for column, answer in zip(with_noise[1:], said, strict=True):
            column[t, rows] = answer
    return with_noise[1:]


def test_the_definition_of_an_actor_is_what_torch_says():
    networks = [draw((5, 16, 4), seed=1), draw((5, 16, 1), seed=2)]
    log_std, calls = torch.tensor([-1.0, 0.0, 0.5, -3.0]), [(0, slice(0, 8)), (1, slice(8, 9))]
    columns = columns_of(2, 9, 5, 4)
    exact = [c.double() for c in columns]
    truth = acted_on_double(networks, exact, log_std.double(), calls)
    for right, found in zip(truth, acted(reference, networks, columns, log_std, calls), strict=True):
        torch.testing.assert_close(found.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_an_actor_follows_the_log_std_where_it_lies():
    networks, log_std = [draw((5, 4), seed=1), draw((5, 1), seed=2)], torch.zeros(4)
    columns = columns_of(2, 6, 5, 4)
    actor = cpp_fused.GaussianActor(cpp_fused.Networks(networks, "tanh"), columns, log_std)
    actor.act(0, slice(None))
    log_std.fill_(-20.0)
    actor.act(1, slice(None))
    assert (columns.actions[0] - columns.mean[0]).abs().max() > 0.1
    torch.testing.assert_close(columns.actions[1], columns.mean[1])


def test_an_actor_refuses_what_it_would_misread():
    networks = cpp_fused.Networks([draw((5, 4), seed=1), draw((5, 1), seed=2)], "tanh")
    columns = columns_of(2, 6, 5, 4)
    for wrong in (
        {"mean": columns.mean.double()},
        {"log_prob": columns.log_prob[:, :3]},
        {"actions": columns.mean[..., :2]},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cpp_fused.GaussianActor(networks, columns._replace(**wrong), torch.zeros(4))
    with pytest.raises(ValueError, match="log_std"):
        cpp_fused.GaussianActor(networks, columns, torch.zeros(3))
    actor = cpp_fused.GaussianActor(networks, columns, torch.zeros(4))
    for t, rows in ((2, slice(None)), (-1, slice(None)), (0, slice(0, 6, 2))):
        with pytest.raises(ValueError, match="t, rows"):
            actor.act(t, rows)
    lonely = cpp_fused.Networks([draw((5, 4), seed=1)], "tanh")
    with pytest.raises(ValueError, match="an actor and a critic"):
        cpp_fused.GaussianActor(lonely, columns, torch.zeros(4)).act(0, slice(None))


def choices(steps, envs, inputs, n_actions):
    """Return the columns of a rollout of choices, poisoned but for the observations."""
    flat = torch.full((steps, envs), torch.nan)
    seen, logits = torch.randn(steps, envs, inputs), torch.full((steps, envs, n_actions), torch.nan)
    return ops.CategoricalColumns(seen, logits, torch.full((steps, envs), -1), flat, flat.clone())


@pytest.mark.parametrize("implementation", [reference, cpp_fused])
@pytest.mark.parametrize(("envs", "n_actions"), [(1, 1), (7, 2), (64, 40), (65, 257)])
def test_an_actor_chooses_what_torch_would_draw(implementation, envs, n_actions):
    layers = [draw((5, 16, n_actions), seed=1), draw((5, 16, 1), seed=2)]
    columns, half = choices(3, envs, 5, n_actions), envs // 2
    actor = implementation.CategoricalActor(implementation.Networks(layers, "tanh"), columns)
    ours, torchs = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    for t, rows in ((0, slice(None)), (2, slice(0, half)), (2, slice(half, envs))):
        actor.act(t, rows, ours)
        logits, values = reference.Networks(layers, "tanh").forward(columns.observations[t, rows])
        torch.testing.assert_close(columns.logits[t, rows], logits, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(columns.values[t, rows], values.flatten(), rtol=1e-5, atol=1e-6)
        if rows.stop == 0:
            continue
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=torchs)
        assert torch.equal(columns.actions[t, rows], drawn.squeeze(1))
        expected = logits.double().log_softmax(-1).gather(1, drawn).squeeze(1)
        torch.testing.assert_close(columns.log_prob[t, rows].double(), expected, rtol=2e-6, atol=2e-6)
    assert columns.logits[1].isnan().all()
    assert (columns.actions[1] == -1).all()
    assert columns.values[1].isnan().all()
    assert columns.log_prob[1].isnan().all()


@pytest.mark.parametrize("implementation", [reference, cpp_fused])
def test_actions_come_as_often_as_their_probabilities_say(implementation):
    envs, probabilities = 20_000, torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0])
    actor_layer = Layer(torch.zeros(5, 2), probabilities.log(), None, None)
    critic_layer = Layer(torch.zeros(1, 2), torch.zeros(1), None, None)
    columns = choices(1, envs, 2, 5)
    actor = implementation.CategoricalActor(implementation.Networks([[actor_layer], [critic_layer]], "tanh"), columns)
    actor.act(0, slice(None), torch.Generator().manual_seed(0))
    counts = columns.actions.flatten().bincount(minlength=5)
    assert counts[4] == 0
    # five standard deviations of a binomial count
    spread = 5 * (envs * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - envs * probabilities).abs() <= spread).all()


@pytest.mark.parametrize("implementation", [reference, cpp_fused])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_distribution_are_refused(implementation, wrong):
    layers, columns = [draw((5, 3), seed=1), draw((5, 1), seed=2)], choices(1, 6, 5, 3)
    layers[0][0].bias.fill_(wrong)
    actor = implementation.CategoricalActor(implementation.Networks(layers, "tanh"), columns)
    with pytest.raises(ValueError, match=r"logits: .* row 0; look at the policy's weights"):
        actor.act(0, slice(None))
    columns.observations[0, :4] = 0.0
    layers[0][0].bias.fill_(0.0)
    columns.observations[0, 4] = torch.inf
    with pytest.raises(ValueError, match="row 4"):
        actor.act(0, slice(None))


def test_an_actor_of_choices_refuses_what_it_would_misread():
    networks, columns = cpp_fused.Networks([draw((5, 4), seed=1), draw((5, 1), seed=2)], "tanh"), choices(2, 6, 5, 4)
    for wrong in ({"actions": columns.actions.int()}, {"logits": columns.logits[..., :3]}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cpp_fused.CategoricalActor(networks, columns._replace(**wrong))
    with pytest.raises(ValueError, match="t, rows"):
        cpp_fused.CategoricalActor(networks, columns).act(2, slice(None))
