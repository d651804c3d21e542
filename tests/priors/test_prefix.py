"""Kept keys and values answer as the full recompute does, in every family of decoders, and are never stale."""

from dataclasses import replace
from functools import wraps

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior, PriorConfig

DECODERS = ["llama", "qwen2", "gpt2"]
PROMPT = PriorConfig("gaussian", 6, 2, (-1.0, -1.0), (1.0, 1.0), form="prompt")


def build(name, texts, config=PROMPT, **options):
    torch.manual_seed(0)
    return LatentActionPrior(config, find_backbone(name), texts, **options).freeze()


def batch(texts, rows=7):
    return torch.randn(rows, 6), torch.arange(rows) % len(texts)


def recomputed(prior, state, ids):
    with torch.no_grad():
        return prior(state, ids).latent


def assert_equal_to_recompute(prior, state, ids, **tolerance):
    expected = recomputed(prior, state, ids)
    assert expected.std() > 0.1, "a latent that says nothing proves nothing"
    torch.testing.assert_close(prior.query(state, ids).latent, expected, **(tolerance or {"atol": 2e-5, "rtol": 1e-5}))


@pytest.mark.parametrize("layers", [None, 1])
@pytest.mark.parametrize("family", DECODERS)
def test_it_equals_the_full_recompute_with_mixed_instructions(families, family, layers, texts):
    lengths = {len(text.split()) for text in texts}
    assert len(lengths) > 1, "prefixes of different lengths are padded"
    prior = build(families[family], texts, replace(PROMPT, layers=layers))
    assert prior.prefix_kv
    state, ids = batch(texts)
    assert_equal_to_recompute(prior, state, ids)
    for only in range(len(texts)):  # one instruction is not padded, or to its own length
        assert_equal_to_recompute(prior, state, torch.full_like(ids, only))


@pytest.mark.parametrize("family", DECODERS)
def test_an_answer_does_not_depend_on_its_neighbours(families, family, texts):
    prior = build(families[family], texts)
    state, ids = batch(texts)
    together = prior.query(state, ids).latent
    alone = torch.cat([prior.query(state[i : i + 1], ids[i : i + 1]).latent for i in range(len(ids))])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    prior.query_batch_size = 2
    torch.testing.assert_close(prior.query(state, ids).latent, together, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_one_token_is_read_per_state(families, family, texts):
    prior = build(families[family], texts)
    state, ids = batch(texts)
    prior.query(state, ids)
    calls = []
    prior.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    prior.query(state, ids)
    assert [tuple(call["inputs_embeds"].shape) for call in calls] == [(7, 1, 32)]
    assert calls[0]["position_ids"].flatten().tolist() == prior.lengths[ids].tolist()


@pytest.mark.parametrize("family", DECODERS)
def test_fitted_adapters_are_in_the_prefix(families, family, clones, texts, tmp_path):
    prior = fit_prior(*clones, texts, backbone=families[family], finetune="lora", epochs=1, lr=3e-2)
    few = clones.states[:9], clones.instruction_id[:9]
    assert_equal_to_recompute(prior, *few)
    with prior.transformer.disable_adapter():
        untuned = recomputed(prior, *few)
    assert (untuned - recomputed(prior, *few)).abs().max() > 1e-3, "the adapters do something"
    again = LatentActionPrior.load(prior.save(tmp_path / "prior"))
    torch.testing.assert_close(again.query(*few).latent, prior.query(*few).latent)


def test_bfloat16_is_within_its_tolerance(families, texts):
    prior = build(families["llama"], texts)
    prior.become_quantized("bf16", 1.0)
    state, ids = batch(texts)
    assert_equal_to_recompute(prior, state, ids, atol=0.05, rtol=0.05)


def test_a_changed_weight_or_instruction_is_noticed(families, texts):
    prior = build(families["llama"], texts)
    state, ids = batch(texts)
    before = prior.query(state, ids).latent
    with torch.no_grad():
        next(prior.transformer.layers[0].self_attn.v_proj.parameters()).mul_(1.5)
    assert (prior.query(state, ids).latent - before).abs().max() > 1e-2
    assert_equal_to_recompute(prior, state, ids)
    weights = {name: tensor.clone() for name, tensor in prior.transformer.state_dict().items()}
    prior.transformer.load_state_dict({name: 0.9 * tensor for name, tensor in weights.items()})
    assert_equal_to_recompute(prior, state, ids)
    prior.extend_instructions(["pull the door slowly"])
    assert_equal_to_recompute(prior, state, torch.full_like(ids, 3))


def test_the_prefix_is_read_once(families, texts, monkeypatch):
    prior, built = build(families["llama"], texts), []
    build_once = prefixes.build
    monkeypatch.setattr(prefixes, "build", lambda *args: built.append(1) or build_once(*args))
    for _ in range(3):
        prior.query(*batch(texts))
    assert len(built) == 1


def test_a_prefix_made_under_inference_mode_serves_later_queries(families, texts):
    prior = build(families["llama"], texts)
    state, ids = batch(texts)
    with torch.inference_mode():
        prior.query(state, ids)
    assert_equal_to_recompute(prior, state, ids)


def test_it_can_be_turned_off_and_is_remembered(families, texts, tmp_path):
    prior = build(families["gpt2"], texts, prefix_kv=False)
    calls = []
    prior.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    state, ids = batch(texts)
    prior.query(state, ids)
    assert calls[0]["inputs_embeds"].shape[1] == 5
    folder = prior.save(tmp_path / "prior")
    assert LatentActionPrior.load(folder).prefix_kv is False
    again = LatentActionPrior.load(folder, prefix_kv=True)
    assert again.prefix_kv is True
    assert again.digest == prior.digest
    torch.testing.assert_close(again.query(state, ids).mean, prior.query(state, ids).mean, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "form"), [("bert", "prompt"), ("t5", "prompt"), ("llama", "pooled")])
def test_where_it_cannot_be_it_is_refused(families, family, form, texts):
    config = replace(PROMPT, form=form)
    assert build(families[family], texts, config).prefix_kv is False
    with pytest.raises(UnsupportedArgument, match=r"prefix_kv: .* leave prefix_kv=None"):
        build(families[family], texts, config, prefix_kv=True)


def test_a_model_without_past_keys_is_refused():
    with pytest.raises(UnsupportedArgument, match=r"past_key_values and no position_ids; pass prefix_kv=False"):
        prefixes.check_supported(torch.nn.Linear(1, 1))


def test_both_names_of_the_keys_and_values_are_known():
    class Before:
        def forward(self, past_key_values, position_ids):
            return past_key_values, position_ids

    class After:
        def forward(self, cache, position_ids):
            return cache, position_ids

    for model, name in ((Before(), "past_key_values"), (After(), "cache")):
        assert prefixes.cache_name(model) == name
        prefixes.check_supported(model)


def test_a_model_that_places_states_by_itself_is_noticed(families, texts, monkeypatch):
    prior = build(families["llama"], texts)
    forward = prior.transformer.forward

    @wraps(forward)
    def one_place_off(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None if position_ids is None else position_ids + 1, **kwargs)

    monkeypatch.setattr(prior.transformer, "forward", one_place_off)
    with pytest.raises(UnsupportedArgument, match=r"off the full recompute; pass prefix_kv=False"):
        prior.query(*batch(texts))
