"""Out of GPU memory: parts of the work, the same result, said once. Memory runs out here by an injected error."""

import copy

import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3.common.env_util import make_vec_env

from lago_fast import FastKLPPO
from lago_fast.algorithms.micro_batches import Halving
from tests.algorithms.point_env import DiscretePointEnv, PointEnv, ScriptedPrior
from tests.algorithms.test_every_space import DICT, Noise

OPTIONS = {"n_steps": 25, "batch_size": 64, "n_epochs": 2, "device": "cpu", "seed": 0}  # minibatches of 64 and 36 rows

CASES = {
    "gaussian": (PointEnv, {"prior": ScriptedPrior}),
    "categorical": (DiscretePointEnv, {"prior": lambda: ScriptedPrior("categorical")}),
    "dictionary": (lambda: Noise(DICT, spaces.MultiDiscrete([2, 3])), {"policy": "MultiInputPolicy"}),
    "gSDE": (PointEnv, {"use_sde": True}),
}


class Full:
    """A policy whose network fits only so many rows, forward or backward."""

    def __init__(self, policy, rows, where):
        self.rows, self.failures = rows, 0

        def limited(_module, _inputs, hidden):
            if where == "forward":
                self.check(len(hidden[0]))
            elif hidden[0].requires_grad:
                hidden[0].register_hook(lambda grad: self.check(len(grad)))

        policy.mlp_extractor.register_forward_hook(limited)

    def check(self, count):
        if count > self.rows:
            self.failures += 1
            raise torch.OutOfMemoryError("injected")


def model_of(case, **options):
    env, own = CASES[case]
    arguments = {"policy": "MlpPolicy", **OPTIONS, **own, **options}
    if "prior" in own:
        arguments["prior"] = own["prior"]()
    return FastKLPPO(env=make_vec_env(env, n_envs=4, seed=0), **arguments)


def gradients_of_one_update(model):
    found = []
    step = model._optimize
    model._optimize = lambda parameters: (found.append([p.grad.clone() for p in parameters]), step(parameters))
    model.train()
    return found


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")  # the smaller one is meant
@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_the_whole_minibatch(case, where, caplog):
    whole = model_of(case)
    whole.learn(100)
    parts = model_of(case)
    parts.learn(100)
    for model in (whole, parts):
        # invalid rows, so that parts have different counts of valid ones
        model.rollout_buffer.valid[3:9, 1:3] = False
    states = [copy.deepcopy(whole.policy.state_dict())]
    parts.policy.load_state_dict(states[0])
    full = None
    found = []
    for model in (whole, parts):
        if model is parts:
            full = Full(parts.policy, 16, where)
        np.random.seed(5)  # noqa: NPY002
        found.append(gradients_of_one_update(model))
    assert full.failures in (2, 3)  # 64, 32, and never again; a failed backward pass was asked for at 64 and 32
    assert parts._micro_batches.halving.rows == 16
    first, second = found[0][0], found[1][0]
    assert max(float(g.abs().max()) for g in first) > 1e-4
    for expected, got in zip(first, second, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)
    for name, tensor in whole.policy.state_dict().items():
        torch.testing.assert_close(parts.policy.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    said = [r.message for r in caplog.records if "out of GPU memory" in r.message]
    assert said == ["out of GPU memory in a minibatch of 64 rows: going on with parts of it"]


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_a_prior_is_asked_in_parts(caplog):
    class Small(ScriptedPrior):
        def query(self, state, instruction_id):
            if len(state) > 30:
                raise torch.OutOfMemoryError("injected")
            return super().query(state, instruction_id)

    models, weights = [], []
    for prior in (ScriptedPrior, Small):
        env = make_vec_env(PointEnv, n_envs=4, seed=0)
        models.append(FastKLPPO("MlpPolicy", env, prior=prior(), **OPTIONS).learn(200))
        weights.append(models[-1].policy.state_dict())
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor)
    assert [r.message for r in caplog.records if "memory" in r.message] == [
        "out of GPU memory in a prior query of 100 rows: going on with parts of it"
    ]
    assert models[1]._prior_rows.rows == 25


@pytest.mark.filterwarnings("ignore:You have specified a mini-batch size")
def test_the_warm_start_is_done_in_parts_too():
    weights = []
    for rows in (1000, 16):
        model = model_of("gaussian", warm_start=True)
        full = Full(model.policy, rows, "backward")
        weights.append(model.learn(100).policy.state_dict())
        assert full.failures == (0 if rows == 1000 else 2)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-3, atol=1e-5)


def test_one_row_that_does_not_fit_is_an_error():
    def never(at_once):
        raise torch.OutOfMemoryError(f"{at_once} rows")

    halving = Halving("work")
    with pytest.raises(torch.OutOfMemoryError, match="1 rows"):
        halving(never, 9)
    assert Halving("work")(lambda at_once: at_once, 9) == 9
