"""Behaviour cloning on a tiny backbone: it recovers an expert that listens, and keeps its best epoch."""

import math

import pytest
import torch

from lago_fast.errors import DemonstrationError, PriorMismatch, TrainablePrior, UnsupportedArgument
from lago_fast.priors import finetune, fit_passes
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.base import PriorOutput, check_frozen
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.fit_passes import nll, one_cycle

QUICK = {"epochs": 25, "batch_size": 64, "lr": 3e-2, "patience": 25}


@pytest.mark.parametrize("form", ["pooled", "prompt"])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_an_expert_that_listens_is_recovered(family, form, clones, texts, request):
    prior = fit_prior(*clones, texts, backbone=request.getfixturevalue(family), form=form, std_floor=0.01, **QUICK)
    spread = clones.actions.var(dim=0)
    deaf = float((0.5 * (2 * math.pi * spread).log() + 0.5).sum())  # nats, of a Gaussian that reads nothing
    m = prior.metrics
    assert m["val_nll"] < deaf - 1.5
    assert m["val_nll_shuffled_instructions"] > m["val_nll"] + 5, "the words matter"
    assert m["val_mse"] < 0.35 * float(spread.mean())
    check_frozen(prior)


def test_discrete_actions_are_recovered(choices, encoder, texts):
    prior = fit_prior(*choices, texts, backbone=encoder, **QUICK)
    assert (prior.kind, prior.action_dim) == ("categorical", 4)
    answer = prior.query(choices.states, choices.instruction_id)
    torch.testing.assert_close(answer.log_probs.exp().sum(1), torch.ones(800))
    assert (answer.log_probs.argmax(1) == choices.actions).float().mean() > 0.8
    assert prior.metrics["val_nll_shuffled_instructions"] > prior.metrics["val_nll"] + 0.5
    assert prior.metrics["val_mse"] is None


def test_a_head_that_reads_the_state_is_fitted_in_several_wordings(choices, encoder, texts):
    wordings = torch.stack([choices.instruction_id, choices.instruction_id], dim=1)
    wrong = torch.stack([choices.instruction_id, (choices.instruction_id + 1) % len(texts)], dim=1)
    nats = {}
    for name, ids in (("same", wordings), ("half of them wrong", wrong)):
        rows = choices._replace(instruction_id=ids)
        prior = fit_prior(*rows, texts, backbone=encoder, state_path="token_and_head", head_hidden=32, **QUICK)
        nats[name] = prior.metrics["val_nll"]
    answer = prior.query(choices.states, choices.instruction_id)
    assert answer.latent.shape[1] == prior.table.shape[1] + choices.states.shape[1]
    assert nats["same"] < nats["half of them wrong"] - 0.3


def test_words_that_drown_in_noise_are_not_relied_upon(choices, encoder, texts):
    heard = []
    for noise in (0.0, 30.0):
        prior = fit_prior(*choices, texts, backbone=encoder, **QUICK, wording_noise=noise)
        heard.append(prior.metrics["val_nll_shuffled_instructions"] - prior.metrics["val_nll"])
    assert heard[0] > 0.5
    assert heard[1] < 0.2 * heard[0]


def test_noise_on_the_words_is_drawn_from_the_seed_and_refused_where_there_are_no_latents(clones, encoder, texts):
    digests = [
        fit_prior(*clones, texts, backbone=encoder, epochs=2, wording_noise=noise, seed=s).digest
        for noise, s in ((0.1, 0), (0.1, 0), (0.1, 1), (0.0, 0))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    with pytest.raises(UnsupportedArgument, match='wording_noise: form="prompt"'):
        fit_prior(*clones, texts, backbone=encoder, form="prompt", wording_noise=0.1)
    with pytest.raises(UnsupportedArgument, match="wording_noise"):
        fit_prior(*clones, texts, backbone=encoder, wording_noise=-0.1)


def test_squared_error_takes_its_std_from_the_residuals(clones, encoder, texts):
    prior = fit_prior(*clones, texts, backbone=encoder, loss="mse", std_floor=0.0, **QUICK)
    assert prior.metrics["val_mse"] < 0.35 * float(clones.actions.var(dim=0).mean())
    out = prior.query(clones.states, clones.instruction_id)
    residual = (out.mean - clones.actions).square().mean(0).sqrt()
    torch.testing.assert_close(out.log_std[0].exp(), residual, rtol=0.3, atol=0)
    fixed = fit_prior(*clones, texts, backbone=encoder, loss="mse", std="fixed", std_init=0.3, epochs=1)
    assert fixed.query(clones.states[:1], clones.instruction_id[:1]).log_std.exp().tolist()[0] == pytest.approx(
        [0.3] * 2
    )


def test_a_std_can_depend_on_the_state(clones, encoder, texts):
    prior = fit_prior(*clones, texts, backbone=encoder, std="state_dependent", std_floor=0.0, **QUICK)
    assert prior.query(clones.states, clones.instruction_id).log_std.std(0).min() > 0


def test_the_best_epoch_is_restored_and_patience_ends_the_fit(clones, encoder, texts, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5, 2.6, 0.0])
    seen = []

    def validate(fit):
        seen.append({n: p.detach().clone() for n, p in fit.trained.items()})
        return next(losses)

    monkeypatch.setattr(fit_passes.Fit, "_validate", validate)
    prior = fit_prior(*clones, texts, backbone=encoder, epochs=9, patience=3)
    assert (prior.metrics["epochs"], prior.metrics["best_epoch"]) == (5, 2)
    kept = dict(prior.named_parameters())
    assert all(torch.equal(kept[name], value) for name, value in seen[1].items())
    assert not all(torch.equal(kept[name], value) for name, value in seen[4].items())


def test_a_fit_is_a_function_of_its_seed(clones, encoder, texts):
    first, again, other = (
        fit_prior(*clones, texts, backbone=encoder, epochs=2, input_noise=0.1, seed=s).digest for s in (0, 0, 1)
    )
    assert first == again != other


def test_a_backbone_that_is_handed_over_stays_as_it_is(clones, encoder, texts):
    backbone = find_backbone(encoder)
    before = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    fit_prior(*clones, texts, backbone=backbone, finetune="full", layers=1, epochs=1)
    after = backbone.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_progress_is_reported_and_time_ends_the_fit(clones, encoder, texts):
    calls = []
    prior = fit_prior(*clones, texts, backbone=encoder, epochs=100_000, max_seconds=0.5, progress=calls.append)
    assert 1 <= len(calls) < 100_000
    assert calls[0].keys() == {"epoch", "epochs", "train_loss", "val_loss", "seconds"}
    assert prior.metrics["epochs"] == len(calls)


def test_without_validation_the_last_epoch_counts(clones, encoder, texts):
    prior = fit_prior(*clones, texts, backbone=encoder, epochs=3, val_fraction=0, patience=1)
    assert (prior.metrics["epochs"], prior.metrics["best_epoch"], prior.metrics["val_nll"]) == (3, 3, None)


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "qwen2", "gpt2"])
def test_adapters_on_nf4_weights_are_fitted_and_kept(family, clones, families, texts, tmp_path):
    import bitsandbytes as bnb

    few = clones._replace(**{name: column[:400] for name, column in clones._asdict().items()})
    backbone = find_backbone(families[family])
    before = {n: t.clone() for n, t in backbone.model.state_dict().items()}
    prior = fit_prior(*few, texts, backbone=backbone, finetune="qlora", epochs=2, lr=1e-2, gradient_checkpointing=True)
    assert all(torch.equal(before[n], t) for n, t in backbone.model.state_dict().items())
    layers = [m for n, m in prior.transformer.named_modules() if n.endswith("base_layer") and ".wo." not in n]
    assert layers
    assert all(isinstance(layer, bnb.nn.Linear4bit) for layer in layers)
    adapters = [p for n, p in prior.transformer.named_parameters() if "lora_B" in n]
    assert any(p.abs().max() > 0 for p in adapters), "they start at zero"
    check_frozen(prior)
    assert not prior.transformer.is_gradient_checkpointing
    folder = prior.save(tmp_path / "prior")
    assert {p.name for p in folder.iterdir()} == {"config.json", "metrics.json", "prior.safetensors", "adapter"}
    again = finetune.LatentActionPrior.load(folder)
    assert again.digest == prior.digest
    assert torch.equal(again.query(*few[:1], few.instruction_id).mean, prior.query(*few[:1], few.instruction_id).mean)


def test_a_batch_read_in_parts_makes_the_same_step(clones, encoder, texts):
    whole, parts = (
        fit_prior(*clones, texts, backbone=encoder, epochs=2, batch_size=100, gradient_accumulation_steps=n)
        for n in (1, 3)
    )
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
    assert whole.metrics["val_nll"] == pytest.approx(parts.metrics["val_nll"], abs=1e-3)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_checkpointing_changes_nothing_but_memory(family, clones, families, texts):
    few = clones._replace(**{name: column[:200] for name, column in clones._asdict().items()})
    backbone = find_backbone(families[family])
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # which would draw anew
    plain, saved = (
        fit_prior(*few, texts, backbone=backbone, finetune="lora", epochs=1, gradient_checkpointing=c)
        for c in (False, True)
    )
    for (name, a), b in zip(plain.named_parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("finetune", ["frozen", "lora"])
def test_a_fit_can_end_quantized(finetune, clones, encoder, texts):
    prior = fit_prior(
        *clones, texts, backbone=encoder, finetune=finetune, epochs=2, quantization="int8", max_quantization_kl=0.2
    )
    found = prior.metrics["quantization"]
    assert (prior.quantization, prior.max_quantization_kl) == ("int8", 0.2)
    assert (found["states"], found["calibration_states"]) == (
        prior.metrics["rows_val"],
        800 - prior.metrics["rows_val"],
    )
    assert 0 < found["kl_nats"] < 0.2
    check_frozen(prior)


def test_a_random_control_is_declared(clones, encoder, texts):
    prior = fit_prior(*clones, texts, backbone=encoder, random_init=True, epochs=1)
    assert prior.reference["random_init"] is True
    assert prior.metrics["backbone_random_init"] is True


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "l1"}, "loss: 'l1'"),
        ({"loss": "mse", "std": "state_dependent"}, "state_independent"),
        ({"std": "none"}, "std: 'none'"),
        ({"epochs": 0}, "epochs"),
        ({"max_seconds": 0.0}, "max_seconds"),
        ({"val_fraction": 1.0}, "val_fraction"),
        ({"layers": 7}, "1 to 2"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing: a frozen backbone"),
        ({"quantization": "int3"}, "quantization: 'int3'"),
        ({"quantization": "int8", "finetune": "full"}, "its own weights"),
        ({"quantization": "int8", "finetune": "qlora"}, "NF4 weights"),
        ({"quantization": "int8", "val_fraction": 0.0}, "val_fraction > 0"),
    ],
)
def test_values_that_cannot_be_honoured_are_refused(changes, says, clones, encoder, texts):
    with pytest.raises(UnsupportedArgument, match=says):
        fit_prior(*clones, texts, backbone=encoder, **changes)


@pytest.mark.parametrize(
    "gaussian", [{"std": "fixed"}, {"std_init": 9.0}, {"std_floor": 0.0}, {"action_low": -7.0}, {"action_high": [1.0]}]
)
def test_settings_of_a_gaussian_are_refused_for_choices(gaussian, choices, encoder, texts):
    with pytest.raises(UnsupportedArgument, match=f"{next(iter(gaussian))}: .*categorical"):
        fit_prior(*choices, texts, backbone=encoder, **gaussian)


def test_bad_demonstrations_are_refused(clones, encoder, texts):
    with pytest.raises(DemonstrationError, match="outside of action_low"):
        fit_prior(*clones._replace(actions=clones.actions * 3), texts, backbone=encoder)
    with pytest.raises(PriorMismatch, match="instructions: one text alone"):
        fit_prior(*clones, "stir", backbone=encoder)
    with pytest.raises(UnsupportedArgument, match="by name"):
        fit_prior(*clones, texts, backbone=find_backbone(encoder), random_init=True)


def test_nll_by_hand():
    gaussian = PriorOutput(mean=torch.tensor([[1.0, 0.0]]), log_std=torch.tensor([[0.0, math.log(2.0)]]))
    # 0.5 * 2^2 + 0.5 * 1^2 + log 2 + log(2 pi)
    assert nll(gaussian, torch.tensor([[3.0, 2.0]])).item() == pytest.approx(2.5 + math.log(2) + math.log(2 * math.pi))
    categorical = PriorOutput(log_probs=torch.tensor([[0.25, 0.75]]).log())
    assert nll(categorical, torch.tensor([1])).item() == pytest.approx(-math.log(0.75))


def test_the_learning_rate_rises_and_falls():
    factors = [one_cycle(x / 100) for x in range(101)]
    assert factors[0] > 0
    assert max(factors) == pytest.approx(1.0, abs=0.01)
    assert factors.index(max(factors)) == 10
    assert factors[-1] == pytest.approx(0, abs=1e-6)


def test_a_prior_in_the_making_is_refused_by_trainers(encoder, texts):
    config = finetune.PriorConfig("gaussian", 6, 2, (-1.0, -1.0), (1.0, 1.0))
    with pytest.raises(TrainablePrior):
        check_frozen(finetune.LatentActionPrior(config, find_backbone(encoder), texts))
