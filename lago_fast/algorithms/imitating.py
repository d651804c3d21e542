"""Fitting the policy to its prior by their KL: on a first rollout, on the prior's own episodes, or on given rows.

What is fitted at length is called distillation (Hinton et al., arXiv 1503.02531; of policies, arXiv 1511.06295).
Test: pytest tests/algorithms/test_imitating.py
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lago_fast.algorithms.collecting import CollectingPPO
from lago_fast.algorithms.flat_adam import FlatAdam
from lago_fast.algorithms.heads import PolicysOwnHead
from lago_fast.algorithms.lanes import array_lane_of
from lago_fast.algorithms.micro_batches import MicroBatches
from lago_fast.algorithms.prior_query import query_prior
from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import NonFiniteError, NonFiniteLoss, UnsupportedArgument

LEARNING_RATE = 1e-3  # of Adam on given rows, falling to 0 along a cosine

Parameters = list[torch.nn.Parameter]


class GivenRows(NamedTuple):
    observations: Tensor  # [n, O]
    instruction_id: Tensor  # [n] int64, as the env counts
    task_id: Tensor  # [n] int64, as the env counts; zeros where it has one task or none
    passes: int


class ImitatingPPO(CollectingPPO):
    """PPO whose policy may be fitted to its prior before, or beside, what it learns from rewards."""

    warm_start: bool
    _micro_batches: MicroBatches
    _given: GivenRows | None
    _fitted_groups: list[int]  # of the guard, to whose rows the policy was fitted in the update under way

    def imitate_on(
        self, observations: np.ndarray, instruction_id: np.ndarray, task_id: np.ndarray | None = None, passes: int = 20
    ) -> None:
        """Have the policy fitted to the prior on these rows, once; it takes gradient steps and no env steps.

        With a guard that is done when the prior of a task (or instruction) has come to count fully, on the rows of all
        that do, and takes the place of imitating the prior's own episodes; an instruction without rows is not imitated.
        Without a guard it takes the place of the first update. What Adam knows of the gradients then is forgotten.
        Checkpoints hold no rows: they are to be given again before `restore`, with a guard after `resume` will do.

        Args:
            observations: [n, O], as the policy sees them; they begin with the raw state that the prior reads.
            instruction_id: [n] integers, as the env counts.
            task_id: [n] integers, as the env counts; may be left out where it has one task.
            passes: over the rows.

        Raises:
            UnsupportedArgument: there is no prior, no env, or none is to be imitated; without a guard, the model has
                been trained already; an argument is out of range, or a task that is guarded has no rows.
            NonFiniteError: NaN or infinity in an observation.
        """
        if self.prior is None or (self.guard is not None and not self.guard["imitate"]):
            raise UnsupportedArgument(
                "imitate_on: there is no prior to imitate; pass prior=, and imitate=True to a guard"
            )
        if self.env is None:
            raise UnsupportedArgument("imitate_on: instructions are counted by the env; call set_env() first")
        if self.guard is None and self._n_updates > 0:
            raise UnsupportedArgument("imitate_on: the first update is over; call it before the first learn()")
        about = array_lane_of(self.env) or self.env
        tasks = getattr(about, "tasks", [""]) if hasattr(about, "task_id") else [""]
        if task_id is None and self.guard is not None and len(tasks) > 1:
            raise UnsupportedArgument(f"task_id: the guard judges {len(tasks)} tasks one by one; say whose each row is")
        n, shape = len(instruction_id), self.observation_space.shape
        ids = np.asarray(instruction_id, dtype=np.int64)
        of_task = np.zeros(n, dtype=np.int64) if task_id is None else np.asarray(task_id, dtype=np.int64)
        if n == 0 or observations.shape != (n, *(shape or ())) or ids.shape != (n,) or of_task.shape != (n,):
            raise UnsupportedArgument(
                f"observations, instruction_id, task_id: shapes {observations.shape}, {ids.shape}, {of_task.shape}; "
                f"give at least one row, of observations {shape}"
            )
        for name, given, count in (("instruction_id", ids, len(self._prior_ids)), ("task_id", of_task, len(tasks))):
            if not 0 <= given.min() <= given.max() < count:
                raise UnsupportedArgument(
                    f"{name}: from {given.min()} to {given.max()}; this env counts 0..{count - 1}"
                )
        missing = sorted(set(range(len(tasks))) - set(of_task.tolist()))
        if missing and self.guard is not None:
            raise UnsupportedArgument(f"task_id: no rows of {', '.join(tasks[k] for k in missing)}; give some of each")
        if passes < 1:
            raise UnsupportedArgument(f"passes={passes}: at least 1")
        if not np.isfinite(observations).all():
            raise NonFiniteError("observations: NaN or infinity; leave such rows out")
        device = self.device
        self._given = GivenRows(
            torch.as_tensor(observations, dtype=torch.float32, device=device),
            torch.as_tensor(ids, device=device),
            torch.as_tensor(of_task, device=device),
            passes,
        )

    def _starts_from_prior(self) -> bool:
        """Tell whether the update to come is no PPO update, but fits the policy to the prior."""
        return self._n_updates == 0 and (self.warm_start or (self._given is not None and self.guard is None))

    def _start_from_prior(self, parameters: Parameters) -> float:
        """Fit the policy to the prior in place of the first update; return the KL in nats of the last minibatch."""
        kl = math.nan
        if self._given is not None and self.guard is None:
            kl = self._fit_to_given(self._given, torch.ones_like(self._given.task_id, dtype=torch.bool), parameters)
        if self.warm_start:
            kl = self._fit_to_prior(self._buffer, parameters)
        return kl

    def _imitates(self) -> bool:
        """Tell whether the policy is to be fitted, after the update to come, to a prior that the guard lets count."""
        if self._given is None or self._guard is None:
            return self._played is not None
        return bool(self._guard.to_imitate())

    def _imitate_prior(self, parameters: Parameters) -> None:
        """Fit the policy to a prior that the guard lets count; log the KL in nats of the last minibatch."""
        assert self._guard is not None
        played, self._played = self._played, None
        if self._given is None:
            assert played is not None
            self.logger.record("prior/imitation_kl", self._fit_to_prior(played, parameters))
            return
        self._fitted_groups = self._guard.to_imitate()
        of_row = self._given.instruction_id if self._guard.env_group is None else self._given.task_id
        # all of them: a network that is fitted to one task alone forgets the others
        rows = torch.isin(of_row, torch.tensor(self._fitted_groups, device=self.device))
        if rows.any():
            self.logger.record("prior/imitation_kl", self._fit_to_given(self._given, rows, parameters))

    def _note_imitated(self) -> None:
        """Have the guard know, once an update has passed, which groups' rows were imitated in it."""
        if self._guard is not None and self._fitted_groups:
            for g in self._fitted_groups:
                self._guard.imitated[g] = 1.0
            self.guard_state = self._guard.state
        self._fitted_groups = []

    def _fit_to_given(self, given: GivenRows, wanted: Tensor, parameters: Parameters) -> float:
        """Ask the prior about given rows where `wanted` [n], and fit the policy to it; return the last KL."""
        assert self.prior is not None
        assert not isinstance(self._head, PolicysOwnHead)
        at = wanted.nonzero().flatten()
        n_steps = -(-len(at) // self.n_envs)
        at = at[torch.arange(n_steps * self.n_envs, device=at.device) % len(at)]  # a few rows twice, to fill up
        buffer = self._new_buffer(n_steps)
        assert isinstance(buffer.observations, Tensor)
        buffer.observations.copy_(given.observations[at].view_as(buffer.observations))
        buffer.instruction_id.copy_(given.instruction_id[at].view_as(buffer.instruction_id))
        buffer.valid.fill_(True)
        try:
            query_prior(self.prior, buffer, self._head, self._prior_ids, self._prior_rows)
        except NonFiniteError as error:
            rows = {"observations": given.observations[at], "instruction_id": given.instruction_id[at]}
            raise NonFiniteLoss(
                "imitate_on: the prior's answer to a given row is NaN or infinite; leave it out, or check the prior's "
                "files with `lago info`",
                None,
                rows,
            ) from error
        kl = self._fit_to_prior(buffer, parameters, passes=given.passes, learning_rate=LEARNING_RATE)
        # its second moments are of gradients that grew small; the policy's are large again
        optimizer = self.policy.optimizer
        optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
        self._look_at_policy()
        return kl

    def _fit_to_prior(
        self,
        buffer: RolloutBuffer,
        parameters: Parameters,
        passes: int | None = None,
        learning_rate: float | None = None,
    ) -> float:
        """Fit the policy to what the prior said in the states of a buffer; ratios stored before it are stale.

        Args:
            buffer: whose rows.
            parameters: of the policy.
            passes: over them; None: `n_epochs`.
            learning_rate: the first; it falls to 0 along a cosine. None: the policy's own, which stays.

        Returns:
            The KL in nats of the last minibatch.
        """
        passes = passes or self.n_epochs
        steps = passes * -(-buffer.n_steps * buffer.n_envs // self.batch_size)
        groups = self.policy.optimizer.param_groups
        before, taken = [group["lr"] for group in groups], 0
        for _ in range(passes):
            for batch in buffer.get(self.batch_size, reuse=True, impl=self.impls["take_rows"]):
                if learning_rate is not None:
                    for group in groups:
                        group["lr"] = 0.5 * learning_rate * (1 + math.cos(math.pi * taken / steps))
                said, values = self._micro_batches.evaluate(self._head, batch)
                outputs = tuple(output.requires_grad_() for output in said)
                kl = (
                    self._prior_kl(outputs, batch.prior, batch.observations) * batch.weight
                ).sum() / batch.weight.sum().clamp(min=1)
                grads = (*torch.autograd.grad(kl, outputs), torch.zeros_like(values))
                self._micro_batches.backward(self._head, batch, grads)
                self._optimize(parameters)
                taken += 1
            self._n_updates += 1
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
        if not all(bool(torch.isfinite(p).all()) for p in parameters):
            raise NonFiniteLoss("prior: the policy that is fitted to it has become NaN or infinite; look at both", None)
        return kl.item()

    def _optimize(self, parameters: Parameters) -> None:
        """Clip the gradients and take a step."""
        optimizer = self.policy.optimizer
        if isinstance(optimizer, FlatAdam):
            optimizer.clipped_step(self.max_grad_norm)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
            optimizer.step()
