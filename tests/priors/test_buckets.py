"""Static shapes answer as any others do, in few sizes and without a value that decides a shape."""

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.buckets import Buckets, bucket_of
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.latent_action import LatentActionPrior
from tests.algorithms.test_captured import FakeCuda

BOX = ((-1.0, -1.0), (1.0, 1.0))
FORMS = {"llama": "prompt", "qwen2": "prompt", "gpt2": "prompt", "bert": "pooled", "t5": "pooled", "prefix": "pooled"}


def build(families, family, texts, **options) -> LatentActionPrior:
    torch.manual_seed(0)
    config = PriorConfig("gaussian", 6, 2, *BOX, form=FORMS[family])
    if family == "prefix":
        family, config = "bert", replace(config, attention="prefix")
    return LatentActionPrior(config, find_backbone(families[family]), texts, **options).freeze()


def batch(rows, texts, device="cpu"):
    return torch.randn(rows, 6, device=device), torch.arange(rows, device=device) % len(texts)


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (8, 8), (9, 16), (64, 64), (65, 100), (100, 100)])
def test_sizes_are_powers_of_two_and_the_largest(rows, size):
    assert bucket_of(rows, 100) == size


def test_padding_is_zeros_and_is_cut_off():
    seen = []

    def run(state, ids):
        seen.append((state.clone(), ids.clone()))
        return state + ids[:, None]

    state, ids = torch.ones(3, 2), torch.tensor([5, 6, 7])
    assert torch.equal(Buckets(run, 64)(state, ids), state + ids[:, None])
    assert seen[0][0].shape == (8, 2)
    assert seen[0][0][3:].abs().sum() == seen[0][1][3:].sum() == 0


@pytest.mark.parametrize("family", list(FORMS))
def test_answers_are_those_of_other_shapes(families, family, texts):
    prior = build(families, family, texts)
    state, ids = batch(7, texts)
    expected = prior.query(state, ids)
    sizes = []
    prior.transformer.register_forward_pre_hook(
        lambda _, __, kwargs: sizes.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    prior.buckets = True
    for rows in (7, 1, 4):
        answer = prior.query(state[:rows], ids[:rows])
        torch.testing.assert_close(answer.latent, expected.latent[:rows], atol=2e-5, rtol=1e-5)
    assert set(sizes) == {8}
    prior.query_batch_size = 3  # which also chunks are made by
    torch.testing.assert_close(prior.query(state, ids).mean, expected.mean, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", list(FORMS))
def test_no_value_decides_a_shape(families, family, texts):
    prior = build(families, family, texts)
    prior.buckets = True
    static_pass = prior._ready_now().run
    # a tensor without numbers cannot be read by the host; neither can one while a graph is captured
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        state, ids = (mode.from_tensor(column) for column in batch(8, texts))
        assert static_pass(state, ids).shape == (8, 32)


def test_a_changed_weight_is_noticed(families, texts):
    prior = build(families, "llama", texts)
    prior.buckets = True
    state, ids = batch(5, texts)
    before = prior.query(state, ids).latent
    with torch.no_grad():
        next(prior.transformer.layers[0].self_attn.v_proj.parameters()).mul_(1.5)
        expected = prior(state, ids).latent
    assert (before - expected).abs().max() > 1e-2
    torch.testing.assert_close(prior.query(state, ids).latent, expected, atol=2e-5, rtol=1e-5)


def test_the_full_prompt_has_no_static_shape(families, texts):
    prior = build(families, "llama", texts, prefix_kv=False)
    prior.buckets = True
    with pytest.raises(UnsupportedArgument, match="buckets: the full prompt has no static shape"):
        prior.query(*batch(5, texts))


def test_a_capture_that_breaks_says_why_and_leaves_the_stream(monkeypatch):
    cuda = FakeCuda(monkeypatch, breaks=True)

    def run(state, _):
        if cuda.captured_on:
            raise torch.OutOfMemoryError("injected")
        return state

    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        Buckets(run, 8)._capture(*batch(8, "a"))
    assert cuda.captured_on == cuda.selected == [torch.device("cpu")]
    assert cuda.current is cuda.before


@pytest.mark.gpu
@pytest.mark.parametrize("family", list(FORMS))
def test_graphs_answer_as_the_pass_does(families, family, texts):
    prior = build(families, family, texts).to("cuda")
    state, ids = batch(100, texts, "cuda")
    expected = prior.query(state, ids).latent
    prior.buckets = True
    for rows in (100, 3, 100, 64, 3):
        found = prior.query(state[-rows:], ids[-rows:]).latent
        torch.testing.assert_close(found, expected[-rows:], atol=1e-4, rtol=1e-4)
    assert sorted(prior._ready_now()._captured) == [8, 64, 128]


@pytest.mark.gpu
def test_graphs_are_replayed_with_what_is_asked(families, texts):
    prior = build(families, "llama", texts).to("cuda")
    prior.buckets = True
    state, ids = batch(8, texts, "cuda")
    first = prior.query(state, ids)
    second = prior.query(state.flip(0), ids.flip(0))
    torch.testing.assert_close(second.latent, first.latent.flip(0), atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
def test_a_pass_that_breaks_a_capture_leaves_the_stream():
    before = torch.cuda.current_stream()

    def run(state, ids):
        return state * ids.sum().item()  # which waits for the host

    with pytest.raises(RuntimeError, match="captur"):
        Buckets(run, 8)(*batch(8, "a", "cuda"))
    assert torch.cuda.current_stream() == before


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_graph_on_another_device_than_the_current_one_answers():
    buckets = Buckets(lambda state, ids: state + ids[:, None], 8)
    for _ in range(2):
        state, ids = batch(5, "abc", "cuda:1")
        assert torch.equal(buckets(state, ids), state + ids[:, None])
