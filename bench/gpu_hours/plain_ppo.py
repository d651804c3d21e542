"""Plain PPO in one file of eager PyTorch, in the manner of CleanRL: what many users start from.

Rows after an episode's end are no transitions on this lane; they are left out of the count and of the loss.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.gpu_hours.work import Work


def net(inputs: int, widths: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Return linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class PlainPPO:
    """Actor, critic, rollout and update.

    Args:
        lane: array lane of the env.
        work: settings.
    """

    def __init__(self, lane: Any, work: Work) -> None:
        torch.manual_seed(work.seed)
        self.lane, self.work, self.num_timesteps = lane, work, 0
        inputs, self.width = lane.observation_space.shape[0], lane.action_space.shape[0]
        self.actor, self.critic = (net(inputs, work.net_arch, n).to(work.device) for n in (self.width, 1))
        self.log_std = nn.Parameter(torch.full((self.width,), work.log_std_init, device=work.device))
        self.parameters = [*self.actor.parameters(), *self.critic.parameters(), self.log_std]
        self.optimizer = torch.optim.Adam(self.parameters, lr=work.learning_rate, eps=1e-5)
        self.observation = lane.reset().observation

    def _dist(self, seen: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.actor(seen), self.log_std.exp())

    def learn(self, total_timesteps: int, *, log_interval: int, reset_num_timesteps: bool) -> None:
        """Run iterations until so many steps more are done; the arguments are Stable-Baselines3's."""
        del log_interval  # it logs nothing
        target = (0 if reset_num_timesteps else self.num_timesteps) + total_timesteps
        while self.num_timesteps < target:
            self._update(*self._collect())

    def _collect(self) -> tuple[Tensor, ...]:
        work, device = self.work, self.work.device
        shape = (work.n_steps, work.num_envs)
        seen = torch.zeros(*shape, self.observation.shape[1], device=device)
        actions = torch.zeros(*shape, self.width, device=device)
        log_probs, rewards, values, ends, valid = torch.zeros(5, *shape, device=device)
        next_values = torch.zeros(shape, device=device)
        for t in range(work.n_steps):
            seen[t] = torch.as_tensor(self.observation, device=device)
            with torch.no_grad():
                dist = self._dist(seen[t])
                actions[t] = dist.sample()
                log_probs[t] = dist.log_prob(actions[t]).sum(-1)
                values[t] = self.critic(seen[t]).flatten()
            step = self.lane.step(actions[t].cpu().numpy().clip(-1, 1))
            rewards[t] = torch.as_tensor(step.reward, device=device)
            ends[t] = torch.as_tensor((step.terminated | step.truncated).astype(np.float32), device=device)
            valid[t] = torch.as_tensor(step.valid.astype(np.float32), device=device)
            self.observation = step.observation
            self.num_timesteps += int(step.valid.sum())
        # the next row's observation is the true last one of an episode that ended
        next_values[:-1] = values[1:]
        with torch.no_grad():
            next_values[-1] = self.critic(torch.as_tensor(self.observation, device=device)).flatten()
        advantages, last = torch.zeros_like(rewards), torch.zeros(work.num_envs, device=device)
        for t in reversed(range(work.n_steps)):
            delta = rewards[t] + work.gamma * next_values[t] - values[t]
            last = delta + work.gamma * 0.95 * (1 - ends[t]) * last
            advantages[t] = last
        columns = (seen, actions, log_probs, advantages, advantages + values)
        kept = valid.flatten() > 0
        return tuple(column.flatten(0, 1)[kept] for column in columns)

    def _update(self, seen: Tensor, actions: Tensor, old: Tensor, advantages: Tensor, returns: Tensor) -> None:
        for _ in range(self.work.n_epochs):
            for rows in torch.randperm(len(seen), device=seen.device).split(self.work.batch_size):
                dist = self._dist(seen[rows])
                ratio = (dist.log_prob(actions[rows]).sum(-1) - old[rows]).exp()
                a = advantages[rows]
                a = (a - a.mean()) / (a.std() + 1e-8)
                policy_loss = torch.max(-a * ratio, -a * ratio.clamp(0.8, 1.2)).mean()
                value_loss = (self.critic(seen[rows]).flatten() - returns[rows]).square().mean()
                loss = policy_loss + 0.5 * value_loss
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.parameters, 0.5)
                self.optimizer.step()
