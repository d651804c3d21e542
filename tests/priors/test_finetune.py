"""Behaviour cloning on a tiny backbone: it recovers an expert that listens, and keeps its best epoch."""

import math

import pytest
import torch

from lago_fast.errors import DemonstrationError, TrainablePrior, UnsupportedArgument
from lago_fast.priors import finetune
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.base import PriorOutput, check_frozen
from lago_fast.priors.finetune import fit_prior, nll, one_cycle

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

    monkeypatch.setattr(finetune._Fit, "_validate", validate)
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
    ],
)
def test_values_that_cannot_be_honoured_are_refused(changes, says, clones, encoder, texts):
    with pytest.raises(UnsupportedArgument, match=says):
        fit_prior(*clones, texts, backbone=encoder, **changes)


def test_bad_demonstrations_are_refused(clones, encoder, texts):
    with pytest.raises(DemonstrationError, match="outside of action_low"):
        fit_prior(*clones._replace(actions=clones.actions * 3), texts, backbone=encoder)
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
