"""A quantized prior is taken within its bound, and found behind a student and a cache too."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stable_baselines3.common.vec_env import DummyVecEnv, VecCheckNan, VecMonitor, VecNormalize

from lago_fast import FastKLPPO
from lago_fast.algorithms.guard import GuardSettings
from lago_fast.algorithms.prior_match import check_quantization, match_env
from lago_fast.errors import PriorMismatch, QuantizedTooFar, UnsupportedArgument
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior


def prior(kl: float, bound: float = 0.05, quantization: str = "nf4") -> Any:
    return SimpleNamespace(quantization=quantization, quantization_kl_nats=kl, max_quantization_kl=bound)


def behind(inner: Any) -> list[Any]:
    return [inner, SimpleNamespace(exact=inner), SimpleNamespace(inner=inner), SimpleNamespace(exact=None, inner=inner)]


@pytest.mark.parametrize("taken", [prior(0.05), prior(0.2, bound=0.2), prior(math.nan, bound=math.inf)])
def test_within_its_bound_it_is_taken(taken):
    for asked in behind(taken):
        check_quantization(asked)


def test_an_exact_prior_is_taken():
    for asked in [*behind(prior(math.nan, quantization="none")), SimpleNamespace()]:
        check_quantization(asked)


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (prior(0.051), r"nf4, its KL from the exact prior is 0\.051 nats .* at most 0\.05 .* max_quantization_kl"),
        (prior(0.3, bound=0.2), r"at most 0\.2"),
        (prior(math.nan), "was never measured"),
    ],
)
def test_beyond_its_bound_it_is_refused(refused, says):
    for asked in behind(refused):
        with pytest.raises(QuantizedTooFar, match=says):
            check_quantization(asked)


@pytest.mark.parametrize("wrap", [lambda env: env, VecMonitor, VecCheckNan])
def test_normalised_states_are_refused_whatever_stands_before_them(wrap):
    env = wrap(VecNormalize(DummyVecEnv([PointEnv]), norm_obs=True))
    with pytest.raises(UnsupportedArgument, match="raw states"):
        match_env(ScriptedPrior(), env)
    assert match_env(ScriptedPrior(), wrap(VecNormalize(DummyVecEnv([PointEnv]), norm_obs=False))).tolist() == [0]


def model_with(prior, **options):
    settings = {"n_steps": 32, "batch_size": 32, "n_epochs": 1, "device": "cpu", "seed": 0}
    env = PointEnv if prior.kind == "gaussian" else DiscretePointEnv
    return FastKLPPO("MlpPolicy", env(), **{**settings, **options}, prior=prior)


@pytest.mark.parametrize(
    ("prior", "says"),
    [
        ("runs/prior", r"a path; load .*LatentActionPrior\.load\('runs/prior'\)"),
        (lambda: None, r"function has no action_dim, digest, .* query"),
    ],
)
def test_what_is_no_prior_is_refused_with_what_it_lacks(prior, says):
    with pytest.raises(UnsupportedArgument, match=says):
        FastKLPPO("MlpPolicy", PointEnv(), device="cpu", prior=prior)


class Answering(ScriptedPrior):
    """Answers with what a test makes of the right answer."""

    def __init__(self, change, kind="gaussian"):
        super().__init__(kind)
        self.change = change

    def query(self, state, instruction_id):
        return self.change(super().query(state, instruction_id))


@pytest.mark.parametrize("guard", [None, GuardSettings(episodes=2, window=2, probe_share=1.0)])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda answer: answer.mean, r"returned a Tensor; return a lago_fast.priors.PriorOutput"),
        (
            lambda answer: answer._replace(mean=answer.mean[:1]),
            r"with \(1, 2\); the policy reads a tensor of \(\d+, 2\)",
        ),
        (lambda answer: answer._replace(mean=answer.mean.repeat(1, 2)[:, :3]), r"with \(\d+, 3\)"),
        (lambda answer: answer._replace(trust=torch.full((len(answer.mean),), 5.0)), r"trust .* outside of 0 to 1"),
        (lambda answer: answer._replace(trust=torch.ones(1, 1)), r"with \(1, 1\)"),
    ],
)
def test_an_answer_of_the_wrong_form_is_named(change, says, guard):
    with pytest.raises(PriorMismatch, match=says):
        model_with(Answering(change), guard=guard).learn(32)


def test_an_answer_in_numpy_is_named():
    def in_numpy(answer):
        return answer._replace(log_probs=answer.log_probs.numpy())

    with pytest.raises(PriorMismatch, match="with ndarray; the policy reads a tensor of"):
        model_with(Answering(in_numpy, "categorical")).learn(32)


def test_an_action_without_a_chance_is_named_where_the_kl_is_infinite():
    def impossible(answer):
        log_probs = answer.log_probs.clone()
        log_probs[3, 2] = -torch.inf
        return answer._replace(log_probs=log_probs)

    with pytest.raises(PriorMismatch, match=r"env 0 at step 3 .* action 2 has probability 0"):
        model_with(Answering(impossible, "categorical")).learn(32)
    model_with(Answering(impossible, "categorical"), kl_direction="prior_policy").learn(32)
