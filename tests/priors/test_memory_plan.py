"""The plan counts what a fit holds, and refuses what the device cannot hold before anything is made."""

import logging
import re

import pytest
import torch

from lago_fast.errors import InsufficientMemory, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import memory_plan
from lago_fast.priors.backbone import Backbone, find_backbone
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.memory_plan import free_bytes, plan_memory, skeleton_of
from lago_fast.priors.tuning import checkpoint_layers

SIZES = {"rows": 4, "tokens": 5, "query_rows": 4}


def llama(**sizes):
    from transformers import LlamaConfig, LlamaModel

    with torch.device("meta"):
        return LlamaModel(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def llama_7b():
    return llama(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008, vocab_size=32000
    )


def test_a_7b_backbone_fits_24_gigabytes_by_qlora(llama_7b):
    batch = {"rows": 16, "tokens": 32, "query_rows": 256}
    parameters = sum(p.numel() for p in llama_7b.parameters())
    assert 6.5e9 < parameters < 6.7e9, "without its lm_head"
    plan = plan_memory(llama_7b, finetune="qlora", gradient_checkpointing=True, **batch)
    assert 3.3e9 + 0.5e9 < plan.weights < 3.5e9 + 0.6e9, "NF4, and the embeddings in float32"
    assert plan.total < 24e9
    assert plan_memory(llama_7b, finetune="lora", gradient_checkpointing=True, **batch).total > 24e9
    assert plan_memory(llama_7b, finetune="full", **batch).total > 100e9


def test_kept_instructions_cost_their_keys_and_values_and_save_the_reading(llama_7b):
    sizes = {"finetune": "frozen", "rows": 16, "tokens": 32, "query_rows": 1024}
    whole, kept = plan_memory(llama_7b, **sizes), plan_memory(llama_7b, **sizes, kept_texts=10)
    assert kept.instructions == 10 * 32 * 32 * 2 * 4096 * 4, "texts, layers, tokens, keys and values, width, bytes"
    assert whole.instructions == 0
    # of a row without gradients: both sides of the widest layer, norms, scores of 32 heads, gathered keys and values
    assert kept.activations == 4 * 1024 * (2 * (4096 + 11008) + 2 * 4096 + 32 * 32 + 2 * 32 * 4096)
    assert kept.activations < 0.2 * whole.activations


def test_checkpointing_and_small_parts_save_activations(llama_7b):
    sizes = {"finetune": "qlora", "tokens": 32, "query_rows": 1}
    plain, parts, checkpointed = (
        plan_memory(llama_7b, **sizes, rows=rows, gradient_checkpointing=c).activations
        for rows, c in ((64, False), (8, False), (64, True))
    )
    assert parts < 0.2 * plain
    assert checkpointed < 0.1 * plain


@pytest.mark.parametrize("finetune", ["lora", "full"])
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "qwen2", "gpt2"])
def test_what_is_counted_is_what_is_there(families, family, finetune, texts):
    backbone = find_backbone(families[family])
    config = PriorConfig("gaussian", 6, 2, (-1.0,) * 2, (1.0,) * 2, form="prompt", finetune=finetune)
    prior = LatentActionPrior(config, backbone, texts).train()
    trained = {n: p for n, p in prior.transformer.named_parameters() if p.requires_grad}
    plan = plan_memory(skeleton_of(backbone.model, None), finetune=finetune, **SIZES)
    held = sum(p.nbytes for n, p in prior.transformer.named_parameters() if "lora_" not in n)
    assert plan.weights == held
    assert plan.gradients == sum(p.nbytes for p in trained.values())
    assert plan.optimiser == 2 * plan.gradients

    found = kept_bytes(prior)
    assert found <= plan.activations <= 4 * found


def kept_bytes(prior):
    """Return what one pass over 4 rows of 5 tokens keeps for its gradients, weights left out."""
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage().data_ptr() for p in prior.parameters()}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    words = torch.randn(4, 5, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prior.transformer(inputs_embeds=words).last_hidden_state.sum()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_checkpointing_keeps_less(families, family, texts):
    backbone = find_backbone(families[family])
    config = PriorConfig("gaussian", 6, 2, (-1.0,) * 2, (1.0,) * 2, form="prompt", finetune="lora")
    prior = LatentActionPrior(config, backbone, texts).train()
    plain = kept_bytes(prior)
    checkpoint_layers(prior.transformer, True)
    saved = kept_bytes(prior)
    assert saved < 0.4 * plain
    plan = plan_memory(skeleton_of(backbone.model, None), finetune="lora", gradient_checkpointing=True, **SIZES)
    assert saved <= plan.activations
    checkpoint_layers(prior.transformer, False)
    assert kept_bytes(prior) == plain


def test_nf4_weights_are_counted_with_their_scales(families, texts):
    from lago_fast.priors.quantize import weights_bytes

    backbone = find_backbone(families["llama"])
    config = PriorConfig("gaussian", 6, 2, (-1.0,) * 2, (1.0,) * 2, form="prompt", finetune="qlora")
    prior = LatentActionPrior(config, backbone, texts)
    plan = plan_memory(skeleton_of(backbone.model, None), finetune="qlora", **SIZES)
    adapters = sum(p.nbytes for n, p in prior.transformer.named_parameters() if "lora_" in n)
    assert plan.trained == adapters
    # the scales of so small matrices fill less than their block of 256
    assert plan.weights == pytest.approx(weights_bytes(prior.transformer) - adapters, rel=0.05)


def test_a_skeleton_costs_nothing_and_draws_nothing(families):
    model, state = find_backbone(families["gpt2"]).model, torch.get_rng_state()
    skeleton = skeleton_of(model, 1)
    assert {p.device.type for p in skeleton.parameters()} == {"meta"}
    assert (len(skeleton.h), len(model.h), model.config.n_layer) == (1, 2, 2)
    assert torch.equal(state, torch.get_rng_state())


def test_the_plan_is_logged_and_too_little_memory_refused_before_weights_are_read(
    clones, families, texts, monkeypatch, caplog
):
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: 10_000)
    monkeypatch.setattr(backbones, "hash_weights", lambda _: pytest.fail("the weights were read"))
    monkeypatch.setattr(LatentActionPrior, "__init__", lambda *_, **__: pytest.fail("a prior was made"))
    with (
        caplog.at_level(logging.INFO, logger=memory_plan.__name__),
        pytest.raises(InsufficientMemory, match=r"about .* GB more on cpu, where 1e-05 GB are free .*qlora"),
    ):
        fit_prior(*clones, texts, backbone=families["llama"], finetune="lora")
    assert re.fullmatch(r"memory plan: .*optimiser .* on cpu, and .* GB on cpu for the weights .*", caplog.messages[0])


def test_an_unknown_amount_refuses_nothing(clones, families, texts, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: None)
    fit_prior(*clones, texts, backbone=families["bert"], epochs=1)


def test_the_cpu_has_the_weights_twice_where_they_are_cut_or_go_to_another_device(families, texts, monkeypatch):
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: None)
    seen: dict[str, int] = {}
    outlines: list[Backbone] = []
    monkeypatch.setattr(
        memory_plan, "check_memory", lambda _, needed: seen.update({str(d): n for d, n in needed.items()})
    )
    backbone = find_backbone(families["bert"], before_weights=outlines.append)
    read = sum(p.nbytes for p in backbone.model.parameters())

    def plan(of, layers=None, device="cpu"):
        config = PriorConfig("gaussian", 6, 2, (-1.0,) * 2, (1.0,) * 2, layers=layers)
        given = {"rows": 4, "query_rows": 4, "gradient_checkpointing": False, "device": torch.device(device)}
        return memory_plan.plan_fit(config, of, texts, **given)

    for of, reads in ((backbone, 0), (outlines[0], read)):
        total = plan(of).total
        assert seen == {"cpu": total - read + reads}
        total = plan(of, layers=1).total
        assert seen == {"cpu": total + reads}
        total = plan(of, device="cuda").total
        assert seen == {"cuda": total, "cpu": reads}
        seen.clear()


def test_this_machine_knows_its_free_memory():
    assert 1 << 26 < free_bytes(torch.device("cpu")) < 1 << 45
    assert free_bytes(torch.device("meta")) is None


def test_a_backbone_without_checkpointing_is_refused(clones, families, texts, monkeypatch):
    backbone = find_backbone(families["bert"])
    monkeypatch.setattr(type(backbone.model), "supports_gradient_checkpointing", False)
    with pytest.raises(UnsupportedArgument, match=r"gradient_checkpointing: .* has none"):
        fit_prior(*clones, texts, backbone=backbone, finetune="lora", gradient_checkpointing=True)
