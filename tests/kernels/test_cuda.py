"""The CUDA kernels on a GPU, in a build with -DLAGO_CUDA=ON: figures, synchronisation, captured graphs, streams.

Shapes are those at which another kernel or another layout begins; the rest is proved without a GPU, in
test_cuda_emulated.py. `make sanitizer` runs this file under compute-sanitizer.
"""

from importlib.util import find_spec

import pytest
import torch

from lago_fast import ops
from lago_fast.kernels.gae.reference import gae as gae_reference
from tests.kernels.cuda_cases import (
    HALVES,
    assert_close,
    assert_same_bits,
    coefficients,
    converted,
    draw_categorical,
    draw_gaussian,
    eager_of,
    poisoned,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(find_spec("lago_fast._cuda") is None, reason="built without LAGO_CUDA=ON: make cuda"),
]

DEVICE = "cuda"
direction = pytest.mark.parametrize("kl_direction", ["policy_prior", "prior_policy"])
either_loss = pytest.mark.parametrize("draw", [lambda n: draw_categorical(n, 40), lambda n: draw_gaussian(n, 4)])


def moved(named):
    """Move the tensors of a NamedTuple to the GPU."""
    return type(named)(*(None if t is None else t.to(DEVICE) for t in named))


def entries_of(x):
    """Return the two entries of the loss that takes these inputs: the differentiable one, and loss and gradients."""
    name = "ppo_kl_categorical" if hasattr(x, "logits") else "ppo_kl_gaussian"
    return getattr(ops, name), getattr(ops, f"{name}_loss_and_grads")


def assert_loss(x, c, *, rtol: float = 2e-6, **options) -> None:
    """Compare a loss on the GPU with float64 on the CPU, beside eager float32."""
    eager = eager_of(x)
    wide = converted(x, torch.float64), converted(c, torch.float64)
    truth = [t for part in eager.loss_and_grads(*wide, **options) for t in part]
    plain = [t for part in eager.loss_and_grads(x, c, **options) for t in part]
    on_gpu = moved(x)
    result = entries_of(x)[1](on_gpu, moved(c), impl="cuda", out=poisoned(on_gpu), **options)
    got = [t.cpu() for part in result for t in part]
    assert_close((*eager.Outputs._fields, *eager.Grads._fields), truth, plain, got, rtol)


@direction
@pytest.mark.parametrize("n_actions", [2, 3, 4, 8, 18, 40, 96, 127, 257, 384, 1000, 1001, 1500, 32000])
def test_categorical_shapes(n_actions, kl_direction):
    for rows in (0, 1, 63, 2049 if n_actions <= 40 else 70):
        x = draw_categorical(rows, n_actions, masked=n_actions % 2 == 0)
        assert_loss(x, coefficients(), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3, 4, 8, 17, 40, 65, 384])
def test_gaussian_shapes(dims, per_row, kl_direction):
    for rows in (0, 1, 63, 2049):
        x = draw_gaussian(rows, dims, std_per_row=per_row, prior_per_row=not per_row)
        assert_loss(x, coefficients(0.1, 0.02, 0.7, 0.5, 0.6, 0.1), kl_direction=kl_direction)


@direction
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("n", [3, 4, 40, 1500])
def test_a_weight_of_each_rows_kl(n, dtype, kl_direction):
    x = converted(draw_categorical(70, n, kl_weighted=True), dtype)
    assert_loss(x, coefficients(), rtol=1e-5, kl_direction=kl_direction)
    if n <= 40:
        y = converted(draw_gaussian(70, n, kl_weighted=True), dtype)
        assert_loss(y, coefficients(), rtol=1e-5, kl_direction=kl_direction)


@either_loss
def test_many_rows(draw):
    assert_loss(draw(65537), coefficients())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("n", [3, 4, 40, 1200])
def test_half_types(dtype, n):
    assert_loss(converted(draw_categorical(65, n), dtype), coefficients(), rtol=1e-5)
    if n <= 40:
        assert_loss(converted(draw_gaussian(65, n), dtype), coefficients(), rtol=1e-5)


@either_loss
def test_same_input_same_bits(draw):
    x, c = moved(draw(40_000)), moved(coefficients())
    first = entries_of(x)[1](x, c, impl="cuda")
    for _ in range(5):
        assert_same_bits(entries_of(x)[1](x, c, impl="cuda", out=poisoned(x)), first)


@either_loss
def test_neither_entry_synchronises(draw):
    x, c = moved(draw(512)), moved(coefficients())
    names = eager_of(x).Grads._fields
    leaves = x._replace(**{name: getattr(x, name).clone().requires_grad_() for name in names})
    differentiable, loss_and_grads = entries_of(x)
    try:
        torch.cuda.set_sync_debug_mode("error")
        (2 * differentiable(leaves, c, impl="cuda").loss).backward()
        grads = loss_and_grads(x, c, impl="cuda")[1]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, grad in grads._asdict().items():
        torch.testing.assert_close(getattr(leaves, name).grad, 2 * grad)


@either_loss
def test_a_graph_follows_inputs_and_coefficients(draw):
    x, c = moved(draw(3000)), moved(coefficients())
    loss_and_grads, out = entries_of(x)[1], poisoned(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        loss_and_grads(x, c, impl="cuda", out=out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = loss_and_grads(x, c, impl="cuda", out=out)
    seen = []
    for step in range(3):
        for tensor in c[:5]:
            tensor.mul_(1.3)
        x.advantages.add_(torch.randn_like(x.advantages))
        x.weight[step] = 0
        graph.replay()
        replayed = [type(part)(*(t.clone() for t in part)) for part in captured]
        assert_same_bits(replayed, loss_and_grads(x, c, impl="cuda"))
        seen.append(float(replayed[0].loss))
    assert len(set(seen)) == 3


@either_loss
def test_two_streams_at_once(draw):
    batches = [moved(draw(20_000)) for _ in range(2)]
    c = moved(coefficients())
    expected = [entries_of(x)[1](x, c, impl="cuda") for x in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    got = []
    for x, stream in zip(batches, streams, strict=True):
        with torch.cuda.stream(stream):
            got.append(entries_of(x)[1](x, c, impl="cuda"))
    torch.cuda.synchronize()
    for one, other in zip(got, expected, strict=True):
        assert_same_bits(one, other)


@direction
@pytest.mark.parametrize("n_actions", [3, 40, 1500])
def test_prior_kl_and_sample_of_categoricals(n_actions, kl_direction):
    x = draw_categorical(300, n_actions, masked=True)
    state = torch.tensor([7, 3])
    names = {"action_mask": x.action_mask, "prior_temperature": torch.tensor(1.5)}

    def both(convert, impl):
        logits, prior, at = convert(x.logits), convert(x.prior_log_probs), convert(state)
        named = {name: convert(t) for name, t in names.items()} | {"kl_direction": kl_direction, "impl": impl}
        leaf = logits.clone().requires_grad_()
        kl = ops.prior_kl_categorical(leaf, prior, **named)
        drawn = ops.sample_categorical(logits, at, prior_log_probs=prior, **named)
        return (
            kl.detach(),
            *torch.autograd.grad(kl.sum(), leaf),
            drawn.log_prob,
            drawn.entropy,
            drawn.prior_kl,
            drawn.actions,
        )

    *got, actions = (t.cpu() for t in both(lambda t: t.to(DEVICE), "cuda"))
    *truth, true_actions = both(lambda t: t.double() if t.is_floating_point() else t, "reference")
    same = actions == true_actions
    assert same.float().mean() > 0.98
    for actual, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(actual.double()[same], expected[same], rtol=1e-5, atol=1e-5)


@direction
@pytest.mark.parametrize("dims", [1, 4, 17])
def test_prior_kl_and_sample_of_gaussians(dims, kl_direction):
    x = draw_gaussian(300, dims)
    state = torch.tensor([7, 3])

    def both(convert, impl):
        mean, log_std, prior_mean, prior_log_std, at, temperature = map(
            convert, (x.mean, x.log_std, x.prior_mean, x.prior_log_std, state, torch.tensor(0.7))
        )
        leaves = [t.clone().requires_grad_() for t in (mean, log_std)]
        named = {"prior_temperature": temperature, "kl_direction": kl_direction, "impl": impl}
        kl = ops.prior_kl_gaussian(*leaves, prior_mean, prior_log_std, **named)
        drawn = ops.sample_gaussian(mean, log_std, at, prior_mean=prior_mean, prior_log_std=prior_log_std, **named)
        return kl.detach(), *torch.autograd.grad(kl.sum(), leaves), *drawn

    truth = both(lambda t: t.double() if t.is_floating_point() else t, "reference")
    for actual, expected in zip(both(lambda t: t.to(DEVICE), "cuda"), truth, strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=2e-5)


def test_gae():
    ended, by_time = torch.rand(2, 65, 130) < 0.3
    valid = torch.rand(65, 130) < 0.8
    arrays = (*torch.randn(3, 65, 130), ended & ~by_time, ended & by_time, valid)
    truth = gae_reference(*(t.double() if t.is_floating_point() else t for t in arrays), 0.99, 0.95)
    got = ops.gae(*(t.to(DEVICE) for t in arrays), gamma=0.99, gae_lambda=0.95, impl="cuda")
    for actual, expected in zip(got, truth, strict=True):
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=1e-5, atol=1e-5)


def test_tensors_on_the_cpu_are_refused():
    from lago_fast.kernels.ppo_kl_categorical import cuda_fused

    x = draw_categorical(4, 3)
    with pytest.raises(ValueError, match=r"^logits: expected a CUDA tensor"):
        cuda_fused.loss_and_grads(x, coefficients())
    with pytest.raises(ValueError, match=r"^values: expected a tensor on cuda"):
        cuda_fused.loss_and_grads(moved(x)._replace(values=x.values), moved(coefficients()))
