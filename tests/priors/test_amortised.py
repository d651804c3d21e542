"""The student: close to its exact prior where it was taught, honest about where it is not."""

import copy
from dataclasses import replace

import pytest
import torch

from lago_fast.cores import torch_threads
from lago_fast.errors import (
    DemonstrationError,
    HashMismatch,
    NonFiniteError,
    PriorMismatch,
    TrainablePrior,
    UnsupportedArgument,
)
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.base import ActionPrior, PriorOutput, check_frozen, prior_kl
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.memory import Memory
from lago_fast.priors.student import Student, StudentConfig, distillation_kl

SMALL = StudentConfig(
    hidden=64, instruction_width=8, audit_rows=64, audit_window=1024, refresh_rows=256, refresh_steps=50
)
TEACH = {"epochs": 30, "lr": 5e-3, "noisy_copies": 4, "noise": 0.3}


@pytest.fixture(scope="module")
def exact(encoder, clones, texts) -> LatentActionPrior:
    return fit_prior(*clones, texts, backbone=encoder, epochs=10, batch_size=64, lr=3e-2)


@pytest.fixture(scope="module")
def taught(exact, clones) -> AmortisedPrior:
    return AmortisedPrior(exact, SMALL).fit(clones.states, clones.instruction_id, episode_id=clones.episode_id, **TEACH)


@pytest.fixture
def student(taught) -> AmortisedPrior:
    """Return a student of one's own."""
    return copy.deepcopy(taught)


def far_off(clones):
    """States 4 standard deviations from the demonstrations."""
    return clones.states + 8.0, clones.instruction_id


def exact_kl(student, state, ids):
    with torch.no_grad():
        return float(prior_kl(student.exact.bounded(student(state, ids)), student.exact.query(state, ids)).mean())


def test_it_is_close_to_its_teacher_and_says_how_close(student, clones):
    assert isinstance(student, ActionPrior)
    assert student.mode == "amortised"
    assert 0 < student.heldout_kl_nats < 0.15
    assert student.metrics["exact_queries"] == 5 * (800 - 80) + 80
    assert exact_kl(student, clones.states, clones.instruction_id) < 0.15
    answer = student.query(clones.states, clones.instruction_id)
    assert answer.mean.abs().max() <= 1
    assert answer.log_std.exp().min() >= 0.2 - 1e-6
    check_frozen(student)


def test_a_categorical_prior_has_students_too(encoder, choices, texts):
    exact = fit_prior(*choices, texts, backbone=encoder, epochs=5, batch_size=64, lr=3e-2)
    student = AmortisedPrior(exact, SMALL).fit(choices.states, choices.instruction_id, **TEACH)
    assert student.heldout_kl_nats < 0.15
    answer = student.query(choices.states[:5], choices.instruction_id[:5])
    torch.testing.assert_close(answer.log_probs.exp().sum(1), torch.ones(5))


def test_a_student_answers_the_same_however_many_words_it_knows():
    student = Student("categorical", 3, 5, 8, StudentConfig(hidden=16, instruction_width=4), trusts=True)
    generator = torch.Generator().manual_seed(0)
    normal, table = torch.randn(6, 3, generator=generator), torch.randn(50, 8, generator=generator)
    ids = torch.tensor([0, 3, 3, 1, 2, 0])
    # 50 rows of words are more than the 6 that are asked about, 4 are fewer
    many, few = student(normal, table, ids), student(normal, table[:4], ids)
    torch.testing.assert_close(many.log_probs, few.log_probs)
    torch.testing.assert_close(many.trust, few.trust)


def test_several_threads_teach_the_same_student_every_time():
    rows, generator = 2048, torch.Generator().manual_seed(0)
    state, table = torch.randn(rows, 6, generator=generator), torch.randn(3, 16, generator=generator)
    ids = torch.randint(3, (rows,), generator=generator)
    wanted = PriorOutput(mean=torch.rand(rows, 2, generator=generator), log_std=torch.full((rows, 2), -1.0))
    box = torch.full((2,), -1.0), torch.full((2,), 1.0)

    def taught() -> list[torch.Tensor]:
        student = Student("gaussian", 6, 2, 16, StudentConfig(), trusts=False)
        optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
        for _ in range(8):
            student.step(optimiser, student.seen(state, table, ids), wanted, *box, "exact_student")
        return list(student.state_dict().values())

    with torch_threads(4):
        first, *others = (taught() for _ in range(4))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_it_learns_how_far_its_teacher_is_to_be_trusted(student, clones):
    state, ids = torch.cat([clones.states[:200], far_off(clones)[0][:200]]), clones.instruction_id[:200].repeat(2)
    with torch.no_grad():
        exact, answer = student.exact.query(state, ids).trust, student(state, ids).trust
    for trust in (exact, answer):
        assert trust[:200].mean() - trust[200:].mean() > 0.3
    assert (answer - exact)[:200].abs().mean() < 0.05
    assert answer[200:].max() < 0.1, "what is far from everything that was taught is not trusted"
    assert 0 < student.metrics["heldout_trust_error"] < 0.1
    student.config = replace(student.config, fallback_kl=None)
    student.query(state, ids)
    assert 0 < student.telemetry()["prior/audit_trust_error"] < 0.5


def test_trust_has_no_say_in_the_answers(exact, taught, clones):
    without = copy.deepcopy(exact)
    without.demonstrated = None
    plain = AmortisedPrior(without, SMALL)
    plain.fit(clones.states, clones.instruction_id, episode_id=clones.episode_id, **TEACH)
    few = clones.states[:9], clones.instruction_id[:9]
    with torch.no_grad():
        assert torch.equal(plain(*few).mean, taught(*few).mean)
    assert plain.query(*few).trust is None
    assert "prior/audit_trust_error" not in plain.telemetry()
    assert plain.metrics["heldout_trust_error"] is None


def test_the_other_direction_can_be_distilled(exact, clones):
    config = StudentConfig(hidden=64, direction="student_exact")
    student = AmortisedPrior(exact, config).fit(clones.states, clones.instruction_id, **TEACH)
    assert student.heldout_kl_nats < 0.15


def test_the_audit_is_of_the_answers_that_were_given(student, clones):
    state, ids = (column[:256] for column in far_off(clones))
    student.config = replace(student.config, fallback_kl=None)
    student._audit_due = 256.0  # every row is audited, so that the audit can be compared
    for _ in range(2):
        answer = student.query(state, ids)
        given = float(prior_kl(answer, student.exact.query(state, ids)).mean())
        assert student.telemetry()["prior/audit_kl_nats"] == pytest.approx(given, rel=1e-4)
        student._audit_due = 256.0


def test_it_learns_from_other_rows_than_it_is_audited_on(student, clones, monkeypatch):
    asked = []
    query = student.exact.query
    monkeypatch.setattr(student.exact, "query", lambda s, i: (asked.append(s.clone()), query(s, i))[1])
    student.query(*far_off(clones))
    learnt, audited = asked
    assert len(learnt) == SMALL.refresh_rows * 800 // SMALL.audit_window
    assert len(audited) == SMALL.audit_batch + SMALL.audit_rows * 800 // SMALL.audit_window
    log = student.telemetry()
    assert log["prior/exact_queries"] == len(learnt) + len(audited)
    assert log["prior/student_refits"] == 1
    assert student.telemetry() == dict.fromkeys(log.keys() - {"prior/audit_kl_nats", "prior/audit_trust_error"}, 0.0)


def test_drift_is_seen_and_learnt_from_until_the_audit_is_low(student, clones):
    state, ids = far_off(clones)
    before = exact_kl(student, state, ids)
    for _ in range(8):
        student.query(state, ids)
    assert exact_kl(student, state, ids) < 0.3 * before
    check_frozen(student)
    student.audit_kl_nats = 0.5 * student.config.refresh_kl
    student.telemetry()
    student.query(state, ids)
    assert student.telemetry()["prior/student_refits"] == 0


def test_the_exact_prior_answers_while_the_student_is_too_far_off(student, exact, clones, caplog):
    state, ids = far_off(clones)
    bound = student.config.fallback_kl
    with caplog.at_level("INFO", logger="lago_fast.priors.amortised"):
        assert not torch.equal(student.query(state, ids).mean, exact.query(state, ids).mean)
        log = student.telemetry()
        assert log["prior/exact_fallback"] == 0
        assert student.audit_kl_nats == log["prior/audit_kl_nats"] > bound == 0.1
        answered = []
        for _ in range(30):
            before = exact_kl(student, state, ids)
            answered.append(torch.equal(student.query(state, ids).mean, exact.query(state, ids).mean))
            log = student.telemetry()
            assert log["prior/exact_fallback"] == float(answered[-1])
            if not answered[-1]:
                break
            assert log["prior/exact_queries"] == 800
            assert log["prior/student_refits"] == 1
            assert "prior/audit_kl_nats" not in log, "answers were exact, and none of them was audited"
    assert answered == [True] * (len(answered) - 1) + [False], "first the exact prior, then the student again"
    assert len(answered) > 1
    assert before < bound, "it is the student's own distance that lets it answer again"
    handed_over = [r.message for r in caplog.records]
    assert len(handed_over) == 2
    assert "bound 0.1: the exact prior answers from here on" in handed_over[0]
    assert "bound 0.1: the student answers from here on" in handed_over[1]
    check_frozen(student)


def test_without_refreshing_it_falls_back_and_does_not_learn(exact, clones):
    student = AmortisedPrior(exact, replace(SMALL, refresh=False)).fit(clones.states, clones.instruction_id, epochs=1)
    weights = [p.clone() for p in student.parameters()]
    for _ in range(3):
        answer = student.query(*far_off(clones))
    assert torch.equal(answer.mean, exact.query(*far_off(clones)).mean)
    assert student.telemetry()["prior/exact_fallback"] == pytest.approx(2 / 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))


def test_falling_back_can_be_turned_off(exact, clones):
    config = replace(SMALL, refresh=False, fallback_kl=None)
    student = AmortisedPrior(exact, config).fit(clones.states, clones.instruction_id, epochs=1)
    for _ in range(3):
        student.query(*far_off(clones))
    assert student.audit_kl_nats > 0.1
    assert student.telemetry()["prior/exact_fallback"] == 0


def test_refreshing_can_be_turned_off(exact, clones):
    config = replace(SMALL, refresh=False)
    student = AmortisedPrior(exact, config).fit(clones.states, clones.instruction_id, epochs=1)
    weights = [p.clone() for p in student.parameters()]
    student.query(*far_off(clones))
    assert student.telemetry()["prior/student_refits"] == 0
    assert student.audit_kl_nats > 0.03
    assert all(torch.equal(a, b) for a, b in zip(weights, student.parameters(), strict=True))


def test_the_audit_keeps_to_its_budget_however_the_rows_come(exact, clones):
    config = replace(SMALL, refresh=False, fallback_kl=None)
    for rows in (8, 100, 800):
        student = AmortisedPrior(exact, config).fit(clones.states, clones.instruction_id, epochs=1)
        for start in range(0, 800, rows):
            student.query(clones.states[start : start + rows], clones.instruction_id[start : start + rows])
        due = 32 + 800 * 64 / 1024  # the first answers are audited at once
        assert due - 32 <= student.telemetry()["prior/exact_queries"] <= due


def test_audits_are_a_function_of_the_seed(exact, clones):
    found = []
    for _ in range(2):
        student = AmortisedPrior(exact, SMALL).fit(clones.states, clones.instruction_id, epochs=2)
        student.query(*far_off(clones))
        found.append((student.telemetry(), student.query(clones.states, clones.instruction_id).mean))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_it_learns_under_inference_mode_too(student, clones):
    with torch.inference_mode():
        for _ in range(3):
            student.query(*far_off(clones))
    student.query(*far_off(clones))
    assert student.telemetry()["prior/student_refits"] > 0


def test_saved_and_loaded_it_answers_the_same(student, exact, clones, tmp_path):
    student.query(*far_off(clones))
    folder = student.save(tmp_path / "student")
    again = AmortisedPrior.load(folder)
    assert again.digest == student.digest != exact.digest
    assert again.exact.digest == exact.digest
    assert again.heldout_kl_nats == student.heldout_kl_nats
    assert (again.audited_rows, again.audit_kl_nats) == (student.audited_rows, student.audit_kl_nats)
    assert again.live.rows == student.live.rows
    assert again.taught.rows == student.taught.rows
    check_frozen(again)
    with torch.no_grad():
        assert torch.equal(
            again(clones.states, clones.instruction_id).mean, student(clones.states, clones.instruction_id).mean
        )
    again.query(*far_off(clones))
    with pytest.raises(PriorMismatch, match="holds AmortisedPrior"):
        LatentActionPrior.load(folder)


def test_altered_students_are_refused(student, tmp_path):
    folder = student.save(tmp_path / "student")
    content = bytearray((folder / "student.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "student.safetensors").write_bytes(content)
    with pytest.raises(HashMismatch, match=r"student\.safetensors"):
        AmortisedPrior.load(folder)


def test_the_digest_covers_the_exact_prior_and_the_settings(exact):
    assert AmortisedPrior(exact).digest == AmortisedPrior(exact).digest
    assert AmortisedPrior(exact).digest != AmortisedPrior(exact, SMALL).digest


def test_bad_input_is_refused(exact, student, clones, encoder, texts, tmp_path):
    with pytest.raises(PriorMismatch, match="never fitted"):
        AmortisedPrior(exact).save(tmp_path / "student")
    assert not [*tmp_path.iterdir()]
    with pytest.raises(PriorMismatch, match="never fitted"):
        AmortisedPrior(exact).query(clones.states, clones.instruction_id)
    with pytest.raises(NonFiniteError):
        student.query(torch.full((1, 6), torch.nan), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(PriorMismatch, match="rows of 6"):
        student.query(torch.zeros(1, 5), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(DemonstrationError, match="at least 2"):
        AmortisedPrior(exact).fit(clones.states[:1], clones.instruction_id[:1])
    with pytest.raises(DemonstrationError, match="at least 2 episodes"):
        AmortisedPrior(exact).fit(clones.states, clones.instruction_id, episode_id=torch.zeros(800))
    with pytest.raises(UnsupportedArgument, match="batch <= rows <= window"):
        StudentConfig(audit_rows=10, audit_window=5)
    with pytest.raises(UnsupportedArgument, match=r"fallback_kl: 0\.0; give positive nats, or None"):
        StudentConfig(fallback_kl=0.0)
    with pytest.raises(UnsupportedArgument, match="direction"):
        StudentConfig(direction="both")
    with pytest.raises(TrainablePrior):
        AmortisedPrior(fit_prior(*clones, texts, backbone=encoder, epochs=1).requires_grad_(True))


def test_texts_can_be_added(exact, clones, texts, tmp_path):
    own = LatentActionPrior.load(exact.save(tmp_path / "prior"))
    student = AmortisedPrior(own, SMALL).fit(clones.states, clones.instruction_id, epochs=1)
    student.extend_instructions(["pull the door"])
    assert student.instructions == [*texts, "pull the door"]
    assert student.instruction_table().shape == (4, 16)
    student.query(clones.states[:2], torch.tensor([3, 3]))


def test_beyond_the_box_a_clamped_mean_is_right():
    low, high = -torch.ones(1), torch.ones(1)
    std = torch.zeros(3, 1)
    target = PriorOutput(mean=torch.tensor([[1.0], [1.0], [0.5]]), log_std=std)
    mean = torch.tensor([[3.0], [0.5], [3.0]], requires_grad=True)
    kl = distillation_kl(PriorOutput(mean=mean, log_std=std), target, low, high, "exact_student")
    clamped = 0.5 * (target.mean - mean.clamp(-1, 1))[:2].square().sum(dim=-1)  # of unit stds
    torch.testing.assert_close(kl[:2], clamped)
    kl.sum().backward()
    assert mean.grad.flatten().tolist() == pytest.approx([0.0, -0.5, 2.5])


def test_a_memory_overwrites_its_oldest_rows():
    memory = Memory(4)
    for value in range(3):
        rows = torch.full((3, 2), float(value)) + torch.tensor([[0.0], [0.1], [0.2]])
        memory.add(rows, torch.full((3,), value), PriorOutput(mean=rows, latent=rows))
    assert memory.rows == 4
    kept = memory.tensors("x")
    assert set(kept) == {"x.state", "x.ids", "x.mean"}
    assert kept["x.state"][:, 0].tolist() == pytest.approx([1.2, 2.0, 2.1, 2.2])
    again = Memory(4)
    again.restore("x", kept)
    assert torch.equal(again.tensors("x")["x.mean"], kept["x.mean"])
    assert Memory(4).tensors("x") == {}
