"""A small student that answers for an exact prior, and says how far it is from it.

The student is distilled by exact KL on the exact prior's answers (Hinton et al., arXiv 1503.02531).
During training a sample of the live states is put to the exact prior too: that audit is measured before the
student learns from it, so the logged KL is of answers that were really given. When it exceeds a bound, the exact
prior answers instead, and teaches, until the student is below it again. Labelling the states that a learner visits
is DAgger's idea (Ross et al., arXiv 1011.0686).
Test: pytest tests/priors/test_amortised.py
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from lago_fast.errors import DemonstrationError, PriorMismatch
from lago_fast.priors import folder as folders
from lago_fast.priors import student_state
from lago_fast.priors.base import PriorOutput, check_frozen, check_query, prior_kl
from lago_fast.priors.chunks import answer_in_chunks
from lago_fast.priors.held_out import HeldOut
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.memory import Memory, pick_rows
from lago_fast.priors.rows import perturbation, whole_numbers
from lago_fast.priors.student import Student, StudentConfig, check_fit, trust_error

logger = logging.getLogger(__name__)

FALLBACK_PASSES = 4  # of the student over the rows that the exact prior answers in its place


class AmortisedPrior(nn.Module):
    """A student MLP in front of an exact prior; `fit` it before it is queried.

    Args:
        exact: the frozen prior that it stands in for; it is kept, for audits.
        config: sizes, audit and refitting.

    Raises TrainablePrior when `exact` is not frozen.
    """

    mode = "amortised"
    audit_kl_nats: float  # moving
    audited_rows: int  # since the fit, of the student's answers
    audited_kl_sum: float  # over them

    def __init__(self, exact: LatentActionPrior, config: StudentConfig | None = None) -> None:
        super().__init__()
        check_frozen(exact)
        self.exact, self.config = exact, config or StudentConfig()
        self.kind, self.state_dim, self.action_dim = exact.kind, exact.state_dim, exact.action_dim
        c, latent = self.config, exact.instruction_table().shape[1]
        sizes = self.state_dim, self.action_dim, latent
        self.student = Student(self.kind, *sizes, c, trusts=exact.demonstrated is not None)
        self.student.requires_grad_(False).to(self.device)
        self.heldout_kl_nats = math.nan
        self.metrics: dict[str, Any] = {}
        self.taught = Memory(0)  # what fit() asked the exact prior
        self.live = Memory(c.live_rows)  # what audits asked it
        self.held_out = HeldOut()
        self._generator = torch.Generator().manual_seed(c.seed)
        self._log: dict[str, float] = {}
        self._forget_audits()
        self._optimiser: torch.optim.Optimizer | None = None

    @property
    def instructions(self) -> list[str]:
        """Return the texts that an instruction id indexes."""
        return self.exact.instructions

    @property
    def device(self) -> torch.device:
        """Return where the prior answers."""
        return self.exact.table.device

    @property
    def digest(self) -> str:
        """Return the SHA-256 over the exact prior's digest and the student's configuration.

        The student's weights are left out: audits refit them, and the audit says how far they are.
        """
        about = json.dumps([self.exact.digest, asdict(self.config)], sort_keys=True)
        return hashlib.sha256(about.encode()).hexdigest()

    def instruction_table(self) -> Tensor:
        """Return the instruction latents [M, Z] float32 of the exact prior."""
        return self.exact.instruction_table()

    def extend_instructions(self, texts: Sequence[str]) -> None:
        """Add texts to the exact prior; the student reads their latents and learns them from its audits."""
        self.exact.extend_instructions(texts)

    def telemetry(self) -> dict[str, float]:
        """Return what happened since the last call.

        How many rows were put to the exact prior, the share of all rows that it answered in the student's place,
        how often the student learnt, and when an audit was due its mean KL and how far off the student's trust was.
        """
        log, self._log = self._log, dict.fromkeys(self._log, 0.0)
        found = {
            "prior/exact_queries": log["exact_queries"],
            "prior/exact_fallback": log["fallback_rows"] / max(1.0, log["answered_rows"]),
            "prior/student_refits": log["refits"],
        }
        if log["rows"]:
            found["prior/audit_kl_nats"] = log["kl_sum"] / log["rows"]
            if self.student.distance is not None:
                found["prior/audit_trust_error"] = log["trust_error_sum"] / log["rows"]
        return found

    # answering

    @torch.no_grad()
    def query(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Answer for raw states [B, S] float32 and instruction ids [B] int64 with the student.

        With `refresh`, while the moving audit is above `refresh_kl` and before the first one, it learns from the
        exact answers to a sample of the rows first. Another sample is audited afterwards. While the moving audit is
        above `fallback_kl`, the exact prior answers all rows, and with `refresh` the student learns from them.
        Raises PriorMismatch and NonFiniteError as the exact prior does, PriorMismatch before `fit`.
        """
        self._check_fitted()
        state, instruction_id = state.to(self.device), instruction_id.to(self.device)
        check_query(self, state, instruction_id)
        self._log["answered_rows"] += len(state)
        if self.falls_back:
            return self._fall_back(state, instruction_id)
        if self.config.refresh and (not self.audited_rows or self.audit_kl_nats > self.config.refresh_kl):
            self._catch_up(state, instruction_id)
        answer = self._student_answer(state, instruction_id)
        self._audit(state, instruction_id, answer)
        return answer

    def _check_fitted(self) -> None:
        if math.isnan(self.heldout_kl_nats):
            raise PriorMismatch("prior: the student was never fitted; call fit(states, instruction_id) first")

    def _student_answer(self, state: Tensor, ids: Tensor) -> PriorOutput:
        return answer_in_chunks(lambda s, i: self.exact.bounded(self(s, i)), state, ids, self.exact)

    @property
    def falls_back(self) -> bool:
        """Tell whether the exact prior answers in the student's place."""
        bound = self.config.fallback_kl
        return bound is not None and bool(self.audited_rows) and self.audit_kl_nats > bound

    def _fall_back(self, state: Tensor, ids: Tensor) -> PriorOutput:
        """Answer exactly; audit what the student would have said, and let it learn."""
        with torch.inference_mode(False), torch.no_grad():
            state, ids = state.clone(), ids.clone()
            exact = self._ask(state, ids)
            kl = float(prior_kl(self._student_answer(state, ids), exact).mean())
            if self.config.refresh:
                self._refresh(math.ceil(FALLBACK_PASSES * len(state) / self._live_batch))
        self._log["fallback_rows"] += len(state)
        self._move_audit(kl, 0)
        return exact

    def _move_audit(self, kl: float, rows: int) -> None:
        """Take a new audit, of answers given to so many rows, into the moving one; say who answers from then on."""
        before, first = self.falls_back, not self.audited_rows
        self.audited_rows += rows
        self.audited_kl_sum += kl * rows
        self.audit_kl_nats = kl if first else 0.5 * self.audit_kl_nats + 0.5 * kl
        if self.falls_back != before:
            who = "the exact prior" if self.falls_back else "the student"
            at, bound = self.audit_kl_nats, self.config.fallback_kl
            logger.info(f"audited KL of the student {at:.3f} nats, bound {bound}: {who} answers from here on")

    def forward(self, state: Tensor, instruction_id: Tensor) -> PriorOutput:
        """Return the student's unclamped, unfloored distribution for raw states [B, S] and ids [B]."""
        return self.student(self.exact.normalise(state), self.exact.table, instruction_id)

    # distilling

    def fit(
        self,
        states: ArrayLike,
        instruction_id: ArrayLike,
        *,
        episode_id: ArrayLike | None = None,
        epochs: int = 40,
        lr: float = 2e-3,
        noisy_copies: int = 2,
        noise: float = 1.0,
        val_fraction: float = 0.1,
        progress: Callable[[dict[str, float]], None] | None = None,
    ) -> "AmortisedPrior":
        """Distil the exact prior on states, asking it once per row.

        Args:
            states: [n, S], raw.
            instruction_id: [n] integers.
            episode_id: [n] integers; the held-out part is made of whole episodes. None: of rows. What one fit held out
                a later one does not teach: an id, or a row's number, means the same in all of them.
            epochs: passes over the taught rows.
            lr: largest learning rate of Adam; it falls to 0 along a cosine.
            noisy_copies: how many perturbed copies of each state are taught as well.
            noise: largest std of that perturbation, in normalised units; each row's is drawn evenly below it.
            val_fraction: share held out for `heldout_kl_nats`, KL(student || exact), of what no fit has seen.
            progress: called with {"epoch", "epochs", "train_loss", "seconds"}.

        Raises:
            DemonstrationError: empty or too few rows, or earlier fits leave none to hold out.
            PriorMismatch, NonFiniteError: rows that the exact prior refuses.
        """
        started = time.perf_counter()
        state = torch.as_tensor(states).float().to(self.device)
        ids = whole_numbers("instruction_id", instruction_id).to(self.device)
        check_fit(epochs=epochs, noisy_copies=noisy_copies, val_fraction=val_fraction)
        if len(state) < 2:
            raise DemonstrationError(f"states: {len(state)} rows; give at least 2, one of them is held out")
        out = self.held_out.split(episode_id, len(state), val_fraction, self._generator).to(self.device)

        taught, taught_ids = state[~out], ids[~out]
        size = noise * self.exact.std_state
        copies = [taught + size * perturbation(taught, self._generator) for _ in range(noisy_copies)]
        self.taught = Memory(len(taught) * (1 + noisy_copies))
        for part in (taught, *copies):
            self.taught.add(part, taught_ids, self.exact.query(part, taught_ids))
        if self.taught.answer.log_std is not None:
            self.student.start_at(self.taught.answer.log_std.mean(0))
        if self.student.distance is not None:
            self.student.distance.take_range(self.exact.normalise(self.taught.state))
        self._learn(epochs, lr, progress)
        self._forget_audits()
        with torch.no_grad():
            exact, answer = self.exact.query(state[out], ids[out]), self.exact.bounded(self(state[out], ids[out]))
            self.heldout_kl_nats = float(prior_kl(answer, exact).mean())
        self.metrics = {
            "heldout_kl_nats": self.heldout_kl_nats,
            "heldout_trust_error": trust_error(answer, exact),
            "rows": len(state),
            "rows_heldout": int(out.sum()),
            "exact_queries": self.taught.rows + int(out.sum()),
            "epochs": epochs,
            "seconds": time.perf_counter() - started,
        }
        return self

    def _learn(self, epochs: int, lr: float, progress: Callable[[dict[str, float]], None] | None) -> None:
        started, n, size = time.perf_counter(), self.taught.rows, self.config.batch_size
        self.student.requires_grad_(True)
        optimiser = torch.optim.Adam(self.student.parameters(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=epochs * math.ceil(n / size))
        try:
            for epoch in range(epochs):
                total = 0.0
                for index in torch.randperm(n, generator=self._generator).to(self.device).split(size):
                    total += self._step(optimiser, *self.taught.take(index)) * len(index)
                    schedule.step()
                if progress is not None:
                    figures = {"train_loss": total / n, "seconds": time.perf_counter() - started}
                    progress({"epoch": epoch + 1, "epochs": epochs, **figures})
        finally:
            self.student.requires_grad_(False)

    def _step(self, optimiser: torch.optim.Optimizer, state: Tensor, ids: Tensor, exact: PriorOutput) -> float:
        seen, low, high = self._seen(state, ids), self.exact.action_low, self.exact.action_high
        return self.student.step(optimiser, seen, exact, low, high, self.config.direction)

    def _seen(self, state: Tensor, ids: Tensor) -> Tensor:
        return self.student.seen(self.exact.normalise(state), self.exact.table, ids)

    # auditing

    def _forget_audits(self) -> None:
        self.audit_kl_nats, self.audited_rows, self.audited_kl_sum = 0.0, 0, 0.0
        self._audit_due = float(self.config.audit_batch)  # rows; the first answers are audited
        self._refresh_due = 0.0  # rows
        self._pending = Memory(self.config.audit_window)  # answered rows that wait for an audit
        names = ("rows", "kl_sum", "trust_error_sum", "exact_queries", "refits", "answered_rows", "fallback_rows")
        self._log = dict.fromkeys(names, 0.0)

    def _sample(self, due: float, rows: int) -> Tensor:
        """Return the indices of as many rows as are due, of so many."""
        return torch.randperm(rows, generator=self._generator)[: int(due)].to(self.device)

    def _ask(self, state: Tensor, ids: Tensor) -> PriorOutput:
        """Put rows to the exact prior, and keep its answers to learn from."""
        exact = self.exact.query(state, ids)
        self.live.add(state, ids, exact)
        self._log["exact_queries"] += len(state)
        return exact

    def _audit(self, state: Tensor, ids: Tensor, answer: PriorOutput) -> None:
        """Put a sample of answered rows aside, and to the exact prior once there are enough of them."""
        self._audit_due += len(state) * self.config.audit_rows / self.config.audit_window
        pick = self._sample(self._audit_due, len(state))
        if not len(pick):
            return
        self._audit_due -= len(pick)
        # a caller may collect under inference_mode, whose tensors can neither be kept nor learnt from
        with torch.inference_mode(False), torch.no_grad():
            self._pending.add(state[pick], ids[pick], pick_rows(answer, pick))
            if self._pending.rows < self.config.audit_batch:
                return
            rows, row_ids, given = self._pending.take(torch.arange(self._pending.rows, device=self.device))
            self._pending = Memory(self.config.audit_window)
            exact = self._ask(rows, row_ids)
            kl = float(prior_kl(given, exact).mean())
        self._move_audit(kl, len(rows))
        self._log["rows"] += len(rows)
        self._log["kl_sum"] += kl * len(rows)
        self._log["trust_error_sum"] += (trust_error(given, exact) or 0.0) * len(rows)

    def _catch_up(self, state: Tensor, ids: Tensor) -> None:
        """Learn from the exact answers to a sample of rows, once enough of them are due."""
        self._refresh_due += len(state) * self.config.refresh_rows / self.config.audit_window
        pick = self._sample(self._refresh_due, len(state))
        if len(pick) < min(self.config.audit_batch, len(state)):
            return
        self._refresh_due = 0.0
        with torch.inference_mode(False), torch.no_grad():
            self._ask(state[pick], ids[pick])
            self._refresh(math.ceil(self.config.refresh_steps * len(pick) / self.config.refresh_rows))

    def new_optimiser(self) -> torch.optim.Optimizer:
        """Return the optimiser of the refits, which has learnt nothing yet."""
        return torch.optim.Adam(self.student.parameters(), lr=self.config.refresh_lr)

    @property
    def _live_batch(self) -> int:
        return max(1, self.config.batch_size // 2)

    def _refresh(self, steps: int) -> None:
        """Take optimiser steps on live and taught rows, half and half."""
        half = self._live_batch
        with torch.enable_grad():
            self.student.requires_grad_(True)
            if self._optimiser is None:
                self._optimiser = self.new_optimiser()
            for _ in range(steps):
                live, taught = (m.sample(half, self._generator) for m in (self.live, self.taught))
                answer = (
                    None if a is None or b is None else torch.cat([a, b])
                    for a, b in zip(live[2], taught[2], strict=True)
                )
                state, ids = torch.cat([live[0], taught[0]]), torch.cat([live[1], taught[1]])
                self._step(self._optimiser, state, ids, PriorOutput(*answer))
            self.student.requires_grad_(False)
        self._log["refits"] += 1

    # keeping

    def learnt(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the student is and what it was taught, as `LearningPrior` asks."""
        return student_state.learnt(self)

    def take_back(self, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Become the student that `learnt` was asked of; raises PriorMismatch."""
        student_state.take_back(self, tensors, figures)

    def save(self, folder: str | Path, overwrite: bool = False) -> Path:
        """Write the student, what it was taught and the exact prior's folder (`exact/`).

        Raises RunExists when the folder is taken and `overwrite` is False, PriorMismatch before `fit`.
        """
        self._check_fitted()

        def fill(place: Path) -> None:
            kept = {**self.taught.tensors("taught"), **self.live.tensors("live"), **self.held_out.tensors()}
            folders.write_tensors(place / "student.safetensors", dict(self.student.state_dict()))
            folders.write_tensors(place / "memory.safetensors", kept)
            self.exact.save(place / "exact")

        about = {
            "class": "AmortisedPrior",
            "digest": self.digest,
            "student": asdict(self.config),
            "audit": [self.audit_kl_nats, self.audited_rows, self.audited_kl_sum],
        }
        return folders.write_folder(folder, about, self.metrics, fill, overwrite=overwrite)

    @classmethod
    @folders.typed_errors
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", *, backbone: str = "") -> "AmortisedPrior":
        """Read a saved student with its exact prior, frozen; arguments and errors as LatentActionPrior's."""
        folder, saved, metrics = folders.read_folder(folder, "AmortisedPrior")
        exact = LatentActionPrior.load(folder / "exact", device, backbone=backbone)
        prior = cls(exact, StudentConfig(**saved["student"]))
        prior.student.take(folders.read_tensors(folder / "student.safetensors"))
        kept = {name: t.to(device) for name, t in folders.read_tensors(folder / "memory.safetensors").items()}
        prior.taught = Memory(len(kept["taught.state"]))
        prior.taught.restore("taught", kept)
        prior.live.restore("live", kept)
        prior.held_out.restore(kept)
        prior.metrics, prior.heldout_kl_nats = metrics, metrics["heldout_kl_nats"]
        prior.audit_kl_nats, prior.audited_rows, prior.audited_kl_sum = saved["audit"]
        return prior
