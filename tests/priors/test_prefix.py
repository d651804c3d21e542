"""Kept keys and values answer as the full recompute does, in every family that has them, and are never stale."""

import json
from dataclasses import asdict, replace
from functools import partial, wraps

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.hashes import hash_tensors
from lago_fast.priors.latent_action import LatentActionPrior, PriorConfig

PROMPT = PriorConfig("gaussian", 6, 2, (-1.0, -1.0), (1.0, 1.0), form="prompt")
PREFIX, POOLED = replace(PROMPT, attention="prefix"), replace(PROMPT, attention="prefix", form="pooled")
KEPT = pytest.mark.parametrize(
    ("family", "config"),
    [("llama", PROMPT), ("qwen2", PROMPT), ("gpt2", PROMPT), ("bert", PREFIX), ("bert", POOLED), ("roberta", PREFIX)],
    ids=["llama", "qwen2", "gpt2", "bert prompt", "bert pooled", "roberta"],
)


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
@KEPT
def test_it_equals_the_full_recompute_with_mixed_instructions(families, family, config, layers, texts):
    lengths = {len(text.split()) for text in texts}
    assert len(lengths) > 1, "prefixes of different lengths are padded"
    prior = build(families[family], texts, replace(config, layers=layers))
    assert prior.prefix_kv
    state, ids = batch(texts)
    assert_equal_to_recompute(prior, state, ids)
    for only in range(len(texts)):  # one instruction is not padded, or to its own length
        assert_equal_to_recompute(prior, state, torch.full_like(ids, only))


@KEPT
def test_an_answer_does_not_depend_on_its_neighbours(families, family, config, texts):
    prior = build(families[family], texts, config)
    state, ids = batch(texts)
    together = prior.query(state, ids).latent
    alone = torch.cat([prior.query(state[i : i + 1], ids[i : i + 1]).latent for i in range(len(ids))])
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-5)
    prior.query_batch_size = 2
    torch.testing.assert_close(prior.query(state, ids).latent, together, atol=2e-5, rtol=1e-5)


@KEPT
def test_one_token_is_read_per_state(families, family, config, texts):
    prior = build(families[family], texts, config)
    state, ids = batch(texts)
    prior.query(state, ids)
    calls = []
    prior.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    prior.query(state, ids)
    assert [tuple(call["inputs_embeds"].shape) for call in calls] == [(7, 1, 32)]
    lengths = prior.lengths[ids] if config.form == "prompt" else torch.ones_like(ids)
    first = 2 if family == "roberta" else 0  # behind its padding's number, 1
    assert calls[0]["position_ids"].flatten().tolist() == (first + lengths).tolist()


@KEPT
def test_a_fit_may_read_what_is_kept(families, family, config, texts):
    prior = build(families[family], texts, replace(config, instruction_adapter=False))
    assert prior.is_text_fixed
    state, ids = batch(texts)
    gradients = []
    for kept in (False, True):
        for weights in (prior.projector.parameters(), prior.head.parameters()):
            for weight in weights:
                weight.requires_grad_(True).grad = None
        prior(state, ids, kept=kept).mean.square().sum().backward()
        gradients.append([w.grad for part in (prior.projector, prior.head) for w in part.parameters()])
    assert min(g.abs().max() for g in gradients[0]) > 1e-3
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-4, rtol=1e-4)


def test_what_is_kept_is_refused_to_a_fit_that_changes_it(families, texts):
    state, ids = batch(texts)
    for config, noise in ((POOLED, 0.0), (replace(POOLED, instruction_adapter=False), 0.1)):
        with pytest.raises(UnsupportedArgument, match=r"kept: .* leave kept=False"):
            build(families["bert"], texts, config)(state, ids, wording_noise=noise, kept=True)


def test_a_fit_of_a_frozen_decoder_reads_each_text_once_and_learns_the_same(families, clones, texts, monkeypatch):
    def fitted():
        return fit_prior(*clones, texts, backbone=families["llama"], epochs=2, batch_size=64, lr=1e-2)

    built, build_once = [], prefixes.build
    monkeypatch.setattr(prefixes, "build", lambda *args, **how: built.append(1) or build_once(*args, **how))
    monkeypatch.setattr(prefixes, "read_whole", partial(counted, prefixes.read_whole))
    counted.rows = 0
    with_kept = fitted()
    assert len(built) == 1
    assert counted.rows == 2, "the shortest and the longest text, to compare"
    monkeypatch.setattr(LatentActionPrior, "is_text_fixed", False)
    whole = fitted()
    assert counted.rows > len(clones.states)
    for name, weight in whole.own_tensors().items():
        torch.testing.assert_close(with_kept.own_tensors()[name], weight, atol=1e-3, rtol=1e-3)
    assert with_kept.metrics["val_nll"] == pytest.approx(whole.metrics["val_nll"], abs=1e-3)


def counted(read_whole, transformer, words, *rest, **how):
    counted.rows += len(words)
    return read_whole(transformer, words, *rest, **how)


@KEPT
def test_fitted_adapters_are_in_the_prefix(families, family, config, clones, texts, tmp_path):
    asked = {"form": config.form, "attention": config.attention}
    prior = fit_prior(*clones, texts, backbone=families[family], finetune="lora", epochs=1, lr=3e-2, **asked)
    assert prior.prefix_kv
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
    monkeypatch.setattr(prefixes, "build", lambda *args, **how: built.append(1) or build_once(*args, **how))
    for _ in range(3):
        prior.query(*batch(texts))
    assert len(built) == 1


def test_a_prefix_made_under_inference_mode_serves_later_queries(families, texts):
    prior = build(families["llama"], texts)
    state, ids = batch(texts)
    with torch.inference_mode():
        prior.query(state, ids)
    assert_equal_to_recompute(prior, state, ids)


@pytest.mark.parametrize("quantization", ["bf16", "int8"])
def test_a_quantized_encoder_keeps_them_too(families, quantization, texts):
    prior = build(families["bert"], texts, POOLED)
    state, ids = batch(texts)
    exact = prior.query(state, ids).latent
    prior.become_quantized(quantization, 1.0)
    assert_equal_to_recompute(prior, state, ids, atol=0.05, rtol=0.05)
    assert (prior.query(state, ids).latent - exact).abs().max() > 1e-4, "fewer bits do something"


def test_what_a_pooled_instruction_became_in_its_adapter_is_noticed(families, texts):
    prior = build(families["bert"], texts, POOLED)
    state, ids = batch(texts)
    before = prior.query(state, ids).latent
    with torch.no_grad():
        prior.adapter.weight.mul_(-1.0)
    assert (prior.query(state, ids).latent - before).abs().max() > 1e-2
    assert_equal_to_recompute(prior, state, ids)
    prior.extend_instructions(["pull the door slowly"])
    assert_equal_to_recompute(prior, state, torch.full_like(ids, 3))


@pytest.mark.parametrize("form", ["prompt", "pooled"])
def test_with_prefix_attention_a_text_sees_itself_and_not_the_state(families, form, texts):
    hidden = {}
    for attention in ("own", "prefix"):
        prior = build(families["bert"], texts, replace(PROMPT, form=form, attention=attention))
        ids = torch.arange(len(texts))
        words, lengths = prior._words(ids)
        mask = (torch.arange(words.shape[1]) < lengths[:, None]).long()
        alone = prior.transformer(inputs_embeds=words, attention_mask=mask).last_hidden_state
        seen = []
        prior.transformer.register_forward_hook(lambda *call, seen=seen: seen.append(call[-1].last_hidden_state))
        recomputed(prior, torch.randn(len(texts), 6), ids)
        hidden[attention] = [
            (seen[0][row, :length] - alone[row, :length]).abs().max() for row, length in enumerate(lengths)
        ]
    assert max(hidden["prefix"]) < 1e-5
    assert min(hidden["own"]) > 1e-2


def test_prefix_attention_is_kept_and_a_prior_of_before_is_read(families, texts, tmp_path):
    state, ids = batch(texts)
    for attention in ("own", "prefix"):
        prior = build(families["bert"], texts, replace(PROMPT, form="pooled", attention=attention))
        again = LatentActionPrior.load(prior.save(tmp_path / attention))
        assert again.prefix_kv is (attention == "prefix")
        torch.testing.assert_close(again.query(state, ids).mean, prior.query(state, ids).mean)
    file = tmp_path / "own" / "config.json"
    config = json.loads(file.read_text())
    del config["prior"]["attention"], config["sha256"]
    file.write_text(json.dumps(config))
    assert LatentActionPrior.load(tmp_path / "own").digest == config["digest"]


def test_a_prior_of_before_keeps_its_digest(families, texts):
    prior = build(families["bert"], texts, replace(PROMPT, form="pooled"))
    config = asdict(prior.config)
    for name, came_with in (("attention", "own"), ("state_path", "token")):
        assert config.pop(name) == came_with
    about = {"backbone": prior.reference["sha256"], "config": config, "texts": texts}
    packed = torch.tensor(list(json.dumps(about, sort_keys=True).encode()), dtype=torch.uint8)
    assert prior.digest == hash_tensors({**prior.own_tensors(), "about": packed})


def test_prefix_attention_is_refused_where_it_cannot_be(families, texts):
    with pytest.raises(UnsupportedArgument, match="attention: 'both'"):
        replace(PROMPT, attention="both")
    with pytest.raises(UnsupportedArgument, match=r"attention: a decoder's text .*leave attention=\"own\""):
        build(families["llama"], texts, PREFIX)
    with pytest.raises(UnsupportedArgument, match=r"prefix_kv: .* leave prefix_kv=None"):
        build(families["bert"], texts, PREFIX, prefix_kv=False)
    with pytest.raises(UnsupportedArgument, match=r'T5Stack takes no position_ids; leave attention="own"'):
        build(families["t5"], texts, PREFIX)


def test_an_encoder_that_reads_texts_both_ways_all_the_same_is_noticed(families, texts, monkeypatch):
    backbone = find_backbone(families["bert"])
    forward = backbone.model.forward

    @wraps(forward)
    def without_mask(*args, **kwargs):
        return forward(*args, **{**kwargs, "attention_mask": None})

    monkeypatch.setattr(backbone.model, "forward", without_mask)
    with pytest.raises(UnsupportedArgument, match=r'off the full recompute; leave attention="own"'):
        LatentActionPrior(POOLED, backbone, texts)


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
