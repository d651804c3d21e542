"""The autograd entry: a fused implementation backpropagates what PyTorch's own autograd does."""

import pytest
import torch

from lago_fast import ops

B, A, D = 7, 5, 3


def categorical_inputs() -> ops.CategoricalInputs:
    generator = torch.Generator().manual_seed(0)
    logits, prior = torch.randn(2, B, A, generator=generator)
    rows = torch.randn(5, B, generator=generator)
    actions = torch.randint(A, (B,), generator=generator)
    old_log_prob = logits.log_softmax(-1).gather(1, actions[:, None]).squeeze(1) + 0.3 * rows[4]
    weight = (torch.arange(B) % 3 != 2).float()
    return ops.CategoricalInputs(logits, rows[0], actions, old_log_prob, *rows[1:4], weight, prior)


def gaussian_inputs() -> ops.GaussianInputs:
    generator = torch.Generator().manual_seed(0)
    mean, actions, prior_mean = torch.randn(3, B, D, generator=generator)
    rows = torch.randn(5, B, generator=generator)
    old_log_prob = -0.5 * (actions - mean).square().sum(-1) - 0.92 * D + 0.3 * rows[4]
    weight = (torch.arange(B) % 3 != 2).float()
    log_stds = torch.zeros(D), torch.full((D,), -0.5)
    return ops.GaussianInputs(
        mean, log_stds[0], rows[0], actions, old_log_prob, *rows[1:4], weight, prior_mean, log_stds[1]
    )


CASES = {
    "categorical": (ops.ppo_kl_categorical, ops.CategoricalCoefficients, categorical_inputs, ("logits", "values")),
    "gaussian": (ops.ppo_kl_gaussian, ops.GaussianCoefficients, gaussian_inputs, ("mean", "log_std", "values")),
}


def on_cpu(op: str) -> list[str]:
    return [name for name in ops.IMPLEMENTATIONS[op] if "cpu" in ops.DEVICES[name]]


# torch.compile looks at .grad of the tensors that it is given, whether they are leaves or not
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
@pytest.mark.parametrize(
    ("kind", "impl"), [(kind, impl) for kind in CASES for impl in on_cpu(f"ppo_kl_{kind}") if impl != "reference"]
)
def test_loss_backpropagates_the_upstream_gradient(kind, impl):
    op, coefficients, make, names = CASES[kind]
    c = coefficients(**ops.coefficients_on(torch.device("cpu"), **dict.fromkeys(coefficients._fields[:5], 0.3)))

    def gradients(impl: str) -> list[torch.Tensor]:
        x = make()
        weights = [torch.full_like(getattr(x, name), 0.5).requires_grad_() for name in names]
        # the inputs are functions of other leaves, as a network's outputs are
        x = x._replace(**{name: getattr(x, name) * 2 * w for name, w in zip(names, weights, strict=True)})
        out = op(x, c, impl=impl)
        assert not any(statistic.requires_grad for statistic in out[5:])
        (3 * out.loss).backward()
        return [w.grad for w in weights]

    for got, expected in zip(gradients(impl), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", CASES)
def test_a_graph_of_the_gradients_is_refused_where_it_would_be_used(kind):
    op, coefficients, make, names = CASES[kind]
    c = coefficients(**ops.coefficients_on(torch.device("cpu"), **dict.fromkeys(coefficients._fields[:5], 0.3)))
    x = make()
    leaves = [getattr(x, name).clone().requires_grad_() for name in names]
    loss = op(x._replace(**dict(zip(names, leaves, strict=True))), c, impl="cpp").loss
    gradients = torch.autograd.grad(loss * leaves[-1].sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].sum().backward()


@pytest.mark.parametrize("kind", CASES)
def test_twice_through_the_same_loss_gives_twice_the_gradient(kind):
    op, coefficients, make, names = CASES[kind]
    c = coefficients(**ops.coefficients_on(torch.device("cpu"), **dict.fromkeys(coefficients._fields[:5], 0.3)))
    x = make()
    leaf = getattr(x, names[0]).requires_grad_()
    loss = op(x, c).loss
    loss.backward(retain_graph=True)
    once = leaf.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, 2 * once)
    # what has been added up is not what the graph keeps
    loss.backward()
    torch.testing.assert_close(leaf.grad, 3 * once)


@pytest.mark.parametrize("impl", [name for name in on_cpu("prior_kl") if name != "reference"])
@pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])
def test_prior_kl_backpropagates_row_by_row(impl, kl_direction):
    x, g = categorical_inputs(), gaussian_inputs()
    upstream = torch.linspace(-1, 2, B)

    def gradients(impl: str) -> list[torch.Tensor]:
        logits, mean, log_std = (t.clone().requires_grad_() for t in (x.logits, g.mean, g.log_std))
        options = {"prior_temperature": 1.5, "kl_direction": kl_direction, "impl": impl}
        ops.prior_kl_categorical(logits, x.prior_log_probs, **options).backward(upstream)
        ops.prior_kl_gaussian(mean, log_std, g.prior_mean, g.prior_log_std, **options).backward(upstream)
        return [logits.grad, mean.grad, log_std.grad]

    for got, expected in zip(gradients(impl), gradients("reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_without_a_gradient_asked_for_there_is_none():
    x = categorical_inputs()
    assert not ops.prior_kl_categorical(x.logits, x.prior_log_probs).requires_grad
    with torch.no_grad():
        assert not ops.prior_kl_categorical(x.logits.requires_grad_(), x.prior_log_probs).requires_grad
