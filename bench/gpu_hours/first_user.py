"""LaGO as it is written without this package: Stable-Baselines3's PPO, AutoModel, and a KL by torch.distributions.

The first user asks the language model about every minibatch of every epoch. The careful one asks once per step, when
the rollout is there, and keeps the answers. Both get the weights of the same fitted prior.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import RolloutBuffer
from stable_baselines3.common.type_aliases import RolloutBufferSamples
from stable_baselines3.common.utils import explained_variance
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

Ask = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # states, ids -> mean, std


class AutoModelPrior:
    """The full prompt through AutoModel for every state: the instruction's tokens, then one of the state.

    Args:
        prior: a fitted `LatentActionPrior` in the "prompt" form, whose transformer AutoModel made.
    """

    def __init__(self, prior: Any) -> None:
        self.prior = prior
        self.model, self.tokenizer, self.texts = prior.transformer, prior._backbone.tokenizer, prior.instructions
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token

    @torch.no_grad()
    def __call__(self, states: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prior's mean and std [B, D] for states [B, S] and instruction ids [B]."""
        device = states.device
        prompts = [self.texts[i] for i in ids.tolist()]
        words = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right").to(device)
        token = self.prior.projector(self.prior.normalise(states)) * self.prior.token_rms
        ends = words["attention_mask"].sum(1)
        embedded = self.model.get_input_embeddings()(words["input_ids"])
        rows = torch.arange(len(states), device=device)
        whole = torch.cat([embedded, embedded.new_zeros(len(states), 1, embedded.shape[2])], 1)
        whole[rows, ends] = token.to(whole.dtype)
        mask = torch.cat([words["attention_mask"], torch.zeros_like(ends)[:, None]], 1)
        mask[rows, ends] = 1
        latent = self.model(inputs_embeds=whole, attention_mask=mask).last_hidden_state[rows, ends].float()
        answer = self.prior.bounded(self.prior._distribution(latent))
        return answer.mean, answer.log_std.exp()


class IndexedBuffer(RolloutBuffer):
    """SB3's buffer, which remembers the rows of its last minibatch."""

    picked: np.ndarray

    def _get_samples(self, batch_inds: np.ndarray, env: Any = None) -> RolloutBufferSamples:
        self.picked = batch_inds
        return super()._get_samples(batch_inds, env)


class PriorPPO(PPO):
    """PPO with `kl_coef` times the exact KL(policy || prior) in the loss, in eager PyTorch.

    Args:
        ask: the prior.
        kl_coef: weight of the KL.
        in_every_minibatch: ask there, else once per rollout.
        settings: of SB3's PPO.
    """

    def __init__(self, *args: Any, ask: Ask, kl_coef: float, in_every_minibatch: bool, **settings: Any) -> None:
        super().__init__(*args, rollout_buffer_class=IndexedBuffer, **settings)
        self.ask, self.kl_coef, self.in_every_minibatch = ask, kl_coef, in_every_minibatch

    def ask_once(self, rows: int | None = None, chunk: int = 512) -> None:
        """Ask about the collected states, in the buffer's flat order; `rows`: only the first so many."""
        buffer = self.rollout_buffer
        # SB3 flattens its arrays in place before the first minibatch
        flat = buffer.observations if buffer.generator_ready else buffer.swap_and_flatten(buffer.observations)
        states = torch.as_tensor(flat[:rows], device=self.device)
        parts = [self.ask(part, torch.zeros(len(part), dtype=torch.int64)) for part in states.split(chunk)]
        self.prior_mean, self.prior_std = (torch.cat(column) for column in zip(*parts, strict=True))

    def repeat_answers(self, rows: int) -> None:
        """Answer for all rows with the answers to a few: an update costs the same whatever the prior says."""
        times = -(-rows // len(self.prior_mean))
        self.prior_mean, self.prior_std = (c.repeat(times, 1)[:rows] for c in (self.prior_mean, self.prior_std))

    def minibatches(self) -> Iterator[RolloutBufferSamples]:
        """Yield the minibatches of all epochs."""
        for _ in range(self.n_epochs):
            yield from self.rollout_buffer.get(self.batch_size)

    def train(self, limit: int | None = None) -> None:
        """Update the policy; with `limit`, by so many minibatches and no more."""
        self.policy.set_training_mode(True)
        self._update_learning_rate(self.policy.optimizer)
        clip = self.clip_range(self._current_progress_remaining)
        losses, kls, fractions = [], [], []
        for k, batch in enumerate(self.minibatches()):
            if k == limit:
                break
            values, log_prob, entropy = self.policy.evaluate_actions(batch.observations, batch.actions)
            advantages = batch.advantages
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            ratio = torch.exp(log_prob - batch.old_log_prob)
            clipped = torch.clamp(ratio, 1 - clip, 1 + clip)
            policy_loss = -torch.min(advantages * ratio, advantages * clipped).mean()
            value_loss = F.mse_loss(batch.returns, values.flatten())
            if self.in_every_minibatch:
                ids = torch.zeros(len(ratio), dtype=torch.int64, device=self.device)
                prior_mean, prior_std = self.ask(batch.observations, ids)
            else:
                picked = torch.as_tensor(self.rollout_buffer.picked, device=self.device)
                prior_mean, prior_std = self.prior_mean[picked], self.prior_std[picked]
            own = self.policy.get_distribution(batch.observations).distribution
            kl = kl_divergence(own, Normal(prior_mean, prior_std)).sum(-1).mean()
            loss = policy_loss - self.ent_coef * entropy.mean() + self.vf_coef * value_loss + self.kl_coef * kl
            self.policy.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            self.policy.optimizer.step()
            losses.append(loss.item())
            kls.append(kl.item())
            fractions.append((torch.abs(ratio - 1) > clip).float().mean().item())
        self._n_updates += self.n_epochs
        self.logger.record("train/loss", np.mean(losses))
        self.logger.record("train/prior_kl", np.mean(kls))
        self.logger.record("train/clip_fraction", np.mean(fractions))
        buffer = self.rollout_buffer
        explained = explained_variance(buffer.values.flatten(), buffer.returns.flatten())
        self.logger.record("train/explained_variance", explained)
