"""Quantized priors: near the exact one, honest about how near, smaller, and kept by reference."""

import math
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from lago_fast.errors import DeviceUnavailable, HashMismatch, MissingExtra, UnsupportedArgument
from lago_fast.priors import quantize
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.base import PriorOutput, check_frozen, prior_kl
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.quantize import (
    fidelity,
    linear_layers,
    quantize_prior,
    quantize_transformer,
    replaceable_layers,
    weights_bytes,
)

# of these random weights, whose errors nothing averages out
KL_NATS = {"bf16": 0.01, "int8": 0.05, "nf4": 0.8}
BYTES_PER_WEIGHT = {"bf16": 2, "int8": 1, "nf4": 0.5}


@pytest.fixture(scope="module")
def priors(families, clones, texts) -> dict[str, LatentActionPrior]:
    """Return a fitted prior of every family."""
    return {name: fit_prior(*clones, texts, backbone=path, epochs=3, lr=1e-2) for name, path in families.items()}


def rows(clones):
    return clones.states[:64], clones.instruction_id[:64]


class Packed(torch.Tensor):
    """A weight that says it is in bfloat16, and holds 8-bit numbers with a scale per row, as torchao's fp8."""

    @staticmethod
    def __new__(cls, numbers, scales):
        packed = torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.bfloat16)
        packed.numbers, packed.scales = numbers, scales
        return packed

    def __tensor_flatten__(self):
        return ["numbers", "scales"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return args[0] if func is torch.ops.aten.detach.default else NotImplemented


def test_the_bytes_of_a_packed_weight_are_those_of_what_it_holds():
    module = torch.nn.Module()
    numbers, scales = torch.zeros(3, 8, dtype=torch.int8), torch.ones(3)
    module.weight = torch.nn.Parameter(Packed(numbers, scales), requires_grad=False)
    module.bias = torch.nn.Parameter(torch.zeros(3))
    assert weights_bytes(module) == 3 * 8 + 3 * 4 + 3 * 4


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="nf4 needs bitsandbytes")
def test_nf4_computes_in_what_suits_the_device(priors, clones):
    state, ids = rows(clones)
    quantized = quantize_prior(priors["llama"], "nf4", state, ids)
    layer = next(m for m in quantized.transformer.modules() if type(m).__name__ == "Nf4Linear")
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16), ("cpu", torch.float32)):
        quantized.to(device).query(state.to(device), ids.to(device))
        assert layer.compute_dtype == dtype


@pytest.mark.parametrize("name", list(KL_NATS))
@pytest.mark.parametrize("family", ["bert", "t5", "llama", "qwen2", "gpt2"])
def test_it_answers_nearly_the_same_in_less_memory(priors, clones, family, name):
    exact, (state, ids) = priors[family], rows(clones)
    before = exact.digest, exact.query(state, ids).mean
    quantized = quantize_prior(exact, name, state, ids)
    answer, found = quantized.query(state, ids), quantized.metrics["quantization"]
    assert found["name"] == quantized.quantization == name
    assert 0 < found["kl_nats"] < KL_NATS[name]
    assert found["kl_nats"] == quantized.quantization_kl_nats
    assert found["kl_nats"] == pytest.approx(float(prior_kl(exact.query(state, ids), answer).mean()), rel=1e-4)
    assert (found["states"], found["std_floor"], found["calibration_states"]) == (64, 0.2, 0)
    linear = sum(layer.weight.numel() for layer in replaceable_layers(exact.transformer).values())
    assert found["exact_weights_bytes"] == weights_bytes(exact.transformer)
    saved = (found["exact_weights_bytes"] - found["weights_bytes"]) / linear
    scales = 0.3  # bytes per weight of matrices this small; of bf16 the other weights shrink too
    assert 4 - BYTES_PER_WEIGHT[name] - scales < saved < 4 - BYTES_PER_WEIGHT[name] + (1 if name == "bf16" else 0.05)
    check_frozen(quantized)
    assert quantized.digest != exact.digest
    assert exact.digest == before[0]
    assert torch.equal(exact.query(state, ids).mean, before[1]), "the exact prior stays as it is"
    assert {type(layer) for layer in linear_layers(exact.transformer).values()} <= {nn.Linear, *_conv1d()}


def _conv1d():
    from transformers.pytorch_utils import Conv1D

    return {Conv1D}


@pytest.mark.parametrize("name", list(KL_NATS))
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_an_answer_does_not_depend_on_its_neighbours(priors, clones, family, name):
    state, ids = rows(clones)
    quantized = quantize_prior(priors[family], name, state, ids)
    together = quantized.query(state[:8], ids[:8]).latent
    alone = torch.cat([quantized.query(state[i : i + 1], ids[i : i + 1]).latent for i in range(8)])
    # a rounding of the inputs of int8 may fall on the other side
    tolerance = {"bf16": 0.05, "int8": 0.02, "nf4": 1e-4}[name]
    torch.testing.assert_close(together, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("name", list(KL_NATS))
def test_many_threads_get_the_same_answers(priors, clones, name):
    state, ids = clones.states, clones.instruction_id
    first = quantize_prior(priors["bert"], name, state[:9], ids[:9])
    first.query_batch_size = 50
    expected = torch.cat([first.query(s, i).mean for s, i in zip(state.split(50), ids.split(50), strict=True)])
    fresh = quantize_prior(priors["bert"], name, state[:9], ids[:9])
    fresh.query_batch_size = 50
    assert torch.equal(fresh.query(state, ids).mean, expected)


@pytest.mark.parametrize("name", list(KL_NATS))
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_it_is_kept_by_reference(priors, clones, family, name, tmp_path):
    state, ids = rows(clones)
    quantized = quantize_prior(priors[family], name, state, ids, max_quantization_kl=3.0)
    folder = quantized.save(tmp_path / "prior")
    assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.json", "prior.safetensors"}
    again = LatentActionPrior.load(folder)
    assert (again.quantization, again.digest, again.metrics) == (name, quantized.digest, quantized.metrics)
    assert again.max_quantization_kl == 3.0
    assert torch.equal(again.query(state, ids).mean, quantized.query(state, ids).mean)
    with pytest.raises(UnsupportedArgument, match=f"made for '{name}', not 'none'; give the exact prior"):
        LatentActionPrior.load(folder, quantization="none")


def test_an_exact_prior_can_be_quantized_as_it_is_loaded(priors, clones, tmp_path):
    state, ids = rows(clones)
    folder = priors["bert"].save(tmp_path / "prior")
    loaded = LatentActionPrior.load(folder, quantization="int8", max_quantization_kl=math.inf)
    made = quantize_prior(priors["bert"], "int8", state, ids)
    assert torch.equal(loaded.query(state, ids).mean, made.query(state, ids).mean)
    assert loaded.digest == made.digest
    assert math.isnan(loaded.quantization_kl_nats)
    again = LatentActionPrior.load(loaded.save(tmp_path / "loaded"))
    assert loaded.max_quantization_kl == again.max_quantization_kl == math.inf


def test_an_edited_quantization_is_refused(priors, clones, tmp_path):
    folder = quantize_prior(priors["bert"], "int8", *rows(clones)).save(tmp_path / "prior")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"quantization": "int8"', '"quantization": "bf16"'))
    with pytest.raises(HashMismatch, match="altered"):
        LatentActionPrior.load(folder)


@pytest.mark.parametrize("hidden", [None, 8])
def test_a_calibrated_head_is_nearer(clones, families, texts, hidden):
    exact = fit_prior(*clones, texts, backbone=families["bert"], epochs=3, lr=1e-2, head_hidden=hidden)
    state, ids = rows(clones)
    plain = quantize_prior(exact, "nf4", state, ids)
    calibrated = quantize_prior(
        exact, "nf4", state, ids, calibration_states=clones.states[64:], calibration_ids=clones.instruction_id[64:]
    )
    assert calibrated.quantization_kl_nats < 0.6 * plain.quantization_kl_nats
    assert calibrated.metrics["quantization"]["calibration_states"] == 800 - 64
    assert calibrated.digest != plain.digest
    check_frozen(calibrated)


def test_calibration_takes_a_share_of_many_states(priors, clones, monkeypatch):
    monkeypatch.setattr(quantize, "CALIBRATION_ROWS", 100)
    few = rows(clones)
    kept = {"calibration_states": clones.states, "calibration_ids": clones.instruction_id}
    first, again = (quantize_prior(priors["bert"], "nf4", *few, **kept) for _ in range(2))
    assert first.metrics["quantization"]["calibration_states"] == 100
    assert first.digest == again.digest, "the same states make the same head"


def test_categorical_priors_are_quantized_too(choices, families, texts):
    exact = fit_prior(*choices, texts, backbone=families["bert"], epochs=3, lr=1e-2)
    state, ids = rows(choices)
    found = quantize_prior(exact, "int8", state, ids).metrics["quantization"]
    assert found["kl_nats"] < 0.05
    assert found["agreement"] > 0.9


def test_adapters_stay_as_they_are(clones, families, texts, tmp_path):
    exact = fit_prior(*clones, texts, backbone=families["llama"], finetune="lora", epochs=1, lr=1e-2)
    state, ids = rows(clones)
    quantized = quantize_prior(exact, "nf4", state, ids)
    adapters = {n: p for n, p in exact.transformer.named_parameters() if "lora_" in n}
    assert len(adapters) == 2 * 2 * 7, "of seven linear layers in each of two blocks"
    after = dict(quantized.transformer.named_parameters())
    assert all(torch.equal(p, after[name]) for name, p in adapters.items())
    again = LatentActionPrior.load(quantized.save(tmp_path / "prior"))
    assert torch.equal(again.query(state, ids).mean, quantized.query(state, ids).mean)


def test_texts_can_be_added(priors, clones):
    quantized = quantize_prior(priors["llama"], "int8", *rows(clones))
    quantized.extend_instructions(["pull the door"])
    few = clones.states[:2], torch.tensor([3, 3])
    with torch.no_grad():
        torch.testing.assert_close(quantized.query(*few).latent, quantized(*few).latent, atol=0.02, rtol=0.02)


def test_fidelity_by_hand():
    zero = torch.zeros(3, 2)
    exact = PriorOutput(mean=zero, log_std=torch.full((3, 2), 0.2).log())
    near = exact._replace(mean=torch.tensor([[0.0, 0.0], [0.04, -0.05], [0.0, 0.2]]))
    kl = (0.04**2 + 0.05**2 + 0.2**2) / (2 * 0.04) / 3
    assert fidelity(exact, near) == {"kl_nats": pytest.approx(kl), "agreement": pytest.approx(2 / 3), "states": 3}
    a, b = (PriorOutput(log_probs=torch.tensor(p).log()) for p in ([[0.6, 0.4], [0.6, 0.4]], [[0.7, 0.3], [0.4, 0.6]]))
    assert fidelity(a, b)["agreement"] == 0.5


def test_what_cannot_be_quantized_is_refused(priors, clones, families, texts, monkeypatch):
    exact, (state, ids) = priors["bert"], rows(clones)
    with pytest.raises(UnsupportedArgument, match="quantization: 'int3'; choose one of 'bf16'"):
        quantize_prior(exact, "int3", state, ids)
    with pytest.raises(UnsupportedArgument, match="heldout_states: empty"):
        quantize_prior(exact, "int8", state[:0], ids[:0])
    with pytest.raises(UnsupportedArgument, match="give both, or neither"):
        quantize_prior(exact, "int8", state, ids, calibration_states=state)
    with pytest.raises(UnsupportedArgument, match="calibration_states: empty"):
        quantize_prior(exact, "int8", state, ids, calibration_states=state[:0], calibration_ids=ids[:0])
    with pytest.raises(UnsupportedArgument, match="quantized already"):
        quantize_prior(quantize_prior(exact, "bf16", state, ids), "int8", state, ids)
    full = fit_prior(*clones, texts, backbone=families["bert"], finetune="full", epochs=1)
    with pytest.raises(UnsupportedArgument, match='fit it with "lora"'):
        quantize_prior(full, "int8", state, ids)
    found = quantize.importlib.util.find_spec
    monkeypatch.setattr(
        quantize.importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name)
    )
    with pytest.raises(MissingExtra, match="needs bitsandbytes"):
        quantize_prior(exact, "nf4", state, ids)


def test_fp8_needs_its_device_and_its_package(priors, clones, monkeypatch):
    with pytest.raises(DeviceUnavailable, match=r"capability 8\.9 or later, the prior is on cpu; use 'bf16'"):
        quantize_prior(priors["bert"], "fp8", *rows(clones))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(quantize.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtra, match="needs torchao"):
        quantize.check_fp8(torch.device("cuda"))


@pytest.mark.parametrize("name", list(KL_NATS))
def test_what_a_model_wants_in_float32_stays(priors, clones, name):
    quantized = quantize_prior(priors["t5"], name, *rows(clones))
    assert {layer.wo.weight.dtype for layer in _feed_forwards(quantized)} == {torch.float32}
    assert torch.float32 not in {layer.wi.weight.dtype for layer in _feed_forwards(quantized)}


def _feed_forwards(prior):
    return [m for m in prior.transformer.modules() if hasattr(m, "wo") and hasattr(m, "wi")]


def test_bfloat16_keeps_the_positions_of_rope_exact(families):
    model = find_backbone(families["llama"]).model
    before = model.rotary_emb.inv_freq.clone()
    quantize_transformer(model, "bf16")
    assert model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.equal(model.rotary_emb.inv_freq, before)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("bound", [-0.1, math.nan])
def test_a_bound_that_nothing_can_be_held_against_is_refused(bound, clones, priors, texts):
    with pytest.raises(UnsupportedArgument, match="max_quantization_kl"):
        quantize_prior(next(iter(priors.values())), "int8", *rows(clones), max_quantization_kl=bound)
    with pytest.raises(UnsupportedArgument, match="max_quantization_kl"):
        fit_prior(*clones, texts, backbone="never read", max_quantization_kl=bound)
