"""A task that is learnt in seconds: move a point to the origin; with an array lane of its own, and a scripted prior."""

import gymnasium as gym
import numpy as np
import torch

from lago_fast.priors.base import PriorOutput


class PointEnv(gym.Env):
    """State: position in [-1, 1]^2; action: velocity; reward: minus the distance; truncated after 16 steps."""

    observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.position = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        self.t = 0
        return self.position.copy(), {}

    def step(self, action):
        self.position = np.clip(self.position + 0.2 * action, -2, 2).astype(np.float32)
        self.t += 1
        return self.position.copy(), -float(np.linalg.norm(self.position)), False, self.t >= 16, {}


class DiscretePointEnv(PointEnv):
    """The same with four pushes."""

    action_space = gym.spaces.Discrete(4)

    def step(self, action):
        return super().step(np.array([(1, 0), (-1, 0), (0, 1), (0, -1)][int(action)], np.float32))


class ScriptedPrior:
    """Steers to the origin; `sign` -1 steers away."""

    state_dim, instructions = 2, ["move to the origin"]

    def __init__(self, kind="gaussian", sign=1.0, digest="scripted"):
        self.kind, self.sign, self.digest = kind, sign, digest
        self.action_dim = 2 if kind == "gaussian" else 4
        self.weight = torch.nn.Parameter(torch.ones(1), requires_grad=False)
        self.queried = 0

    def query(self, state, instruction_id):
        assert len(instruction_id) == len(state)
        self.queried += len(state)
        if self.kind == "gaussian":
            return PriorOutput(mean=(-2 * self.sign * state).clamp(-1, 1), log_std=torch.full_like(state, -1.5))
        x, y = (2 * self.sign * state).unbind(-1)
        return PriorOutput(log_probs=torch.stack([-x, x, -y, y], dim=-1).log_softmax(-1))

    def instruction_table(self):
        return torch.ones(1, 1)

    def telemetry(self):
        return {"prior/queried": float(self.queried)}

    def parameters(self):
        return [self.weight]
