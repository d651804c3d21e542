"""skrl's PPO as a worker (`bench.gpu_hours.worker`), for an interpreter that has skrl and this package.

The loop is that of skrl's SequentialTrainer. Its minibatches are taken in order, not permuted, and it learns from the
row after an episode's end, which is no transition, as from any other; such rows are not counted as env steps.
"""

from typing import Any

import torch
from skrl.agents.torch.ppo import PPO
from skrl.memories.torch import RandomMemory
from skrl.models.torch import DeterministicMixin, GaussianMixin, Model
from torch import Tensor, nn

from bench.gpu_hours.plain_ppo import net
from bench.gpu_hours.rungs import make_env
from bench.gpu_hours.work import Work
from bench.gpu_hours.worker import serve


class Policy(GaussianMixin, Model):
    """Mean by the network, one log std per action."""

    def __init__(self, lane: Any, work: Work) -> None:
        spaces = {"observation_space": lane.observation_space, "action_space": lane.action_space}
        Model.__init__(self, **spaces, device=work.device)
        GaussianMixin.__init__(self)
        self.net = net(lane.observation_space.shape[0], work.net_arch, lane.action_space.shape[0])
        self.log_std = nn.Parameter(torch.full((lane.action_space.shape[0],), work.log_std_init))

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:
        """Return the mean [B, D], and the log std [D] by its name."""
        del role
        return self.net(inputs["observations"]), {"log_std": self.log_std}


class Value(DeterministicMixin, Model):
    """The critic."""

    def __init__(self, lane: Any, work: Work) -> None:
        spaces = {"observation_space": lane.observation_space, "action_space": lane.action_space}
        Model.__init__(self, **spaces, device=work.device)
        DeterministicMixin.__init__(self)
        self.net = net(lane.observation_space.shape[0], work.net_arch, 1)

    def compute(self, inputs: dict[str, Any], role: str = "") -> tuple[Tensor, dict[str, Any]]:
        """Return values [B, 1]."""
        del role
        return self.net(inputs["observations"]), {}


class Skrl:
    """skrl's agent and the loop around it, with the two members of a model that `rungs.iteration` reads."""

    def __init__(self, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.work, self.lane, self.num_timesteps, self.t = work, make_env(work).array_lane, 0, 0
        spaces = {"observation_space": self.lane.observation_space, "action_space": self.lane.action_space}
        settings = {
            "rollouts": work.n_steps,
            "learning_epochs": work.n_epochs,
            "mini_batches": work.env_steps // work.batch_size,
            "discount_factor": work.gamma,
            "learning_rate": work.learning_rate,
            "value_loss_scale": 0.5,
            "value_clip": 0.0,
            "time_limit_bootstrap": True,
            "experiment": {"write_interval": 0, "checkpoint_interval": 0},
        }
        self.agent = PPO(
            models={"policy": Policy(self.lane, work), "value": Value(self.lane, work)},
            memory=RandomMemory(memory_size=work.n_steps, num_envs=work.num_envs, device=work.device),
            **spaces,
            device=work.device,
            cfg=settings,
        )
        self.agent.init()
        self.agent.enable_training_mode(True)
        self.seen = torch.tensor(self.lane.reset().observation, device=work.device)

    def learn(self, total_timesteps: int, *, log_interval: int, reset_num_timesteps: bool) -> None:
        """Collect one rollout and learn from it; the arguments are Stable-Baselines3's."""
        del total_timesteps, log_interval, reset_num_timesteps  # one iteration, whatever they say
        at: dict[str, Any]
        for _ in range(self.work.n_steps):
            at = {"timestep": self.t, "timesteps": self.t + 1}
            self.agent.pre_interaction(**at)
            with torch.no_grad():
                actions, _ = self.agent.act(self.seen, None, **at)
                step = self.lane.step(actions.cpu().numpy().clip(-1, 1))
                columns = (step.observation, step.reward, step.terminated, step.truncated)
                after, *said = (torch.tensor(column, device=self.work.device) for column in columns)
                reward, terminated, truncated = (column[:, None] for column in said)
                self.agent.record_transition(
                    observations=self.seen,
                    states=None,
                    actions=actions,
                    rewards=reward.float(),
                    next_observations=after,
                    next_states=None,
                    terminated=terminated,
                    truncated=truncated,
                    infos={},
                    **at,
                )
            self.agent.post_interaction(**at)
            self.seen, self.t = after, self.t + 1
            self.num_timesteps += int(step.valid.sum())


if __name__ == "__main__":
    serve(Skrl)
