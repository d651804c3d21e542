"""The GPU-hour comparison: a ladder from a first user's program to this package's, the same work on every rung.

    python -m bench.gpu_hours.compare OUT.json [--rounds 5] [--rungs 1 2 ...] [--peers] [--sbx-python PYTHON]
    python -m bench.gpu_hours.report OUT.json

protocol.md says what is fixed, what is inside the clock and how each trap is handled. Every arm is opened before the
clock starts and warmed up by one slice, whose time is kept apart; then the arms take turns, round by round. What there
is so far is written after each warm-up and each round, so that a run that is stopped keeps it.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.gpu_hours import accounting
from bench.gpu_hours.rungs import Arm, Measured, ladder, peers, side_row
from bench.gpu_hours.work import Stage, Work, add_work, fitted, plain, shaped, work_of
from lago_fast import runs
from lago_fast.cores import usable_cores
from lago_fast.priors.quantize import weights_bytes

FASTER_ROUNDS = 5  # of asking the prior of rungs 3 and 4, before the later rungs take the faster one


def as_json(one: Measured) -> dict[str, Any]:
    """Return a measured iteration as JSON holds it."""
    parts = [{"name": part.name, "times": part.times, **asdict(part.cost)} for part in one.parts]
    return {"parts": parts, "env_steps": one.env_steps, **asdict(one.cost)}


def faster(stage: Stage, work: Work) -> str:
    """Return which of rungs 3 and 4 answers sooner: "shared" or "quantized"."""
    states = torch.randn(work.slice_rows, stage.shared.prior.state_dim, device=work.device)
    ids = torch.zeros(work.slice_rows, dtype=torch.int64, device=work.device)
    best = {"shared": float("inf"), "quantized": float("inf")}
    for _ in range(FASTER_ROUNDS + 1):
        for name in best:
            started = time.perf_counter()
            getattr(stage, name).prior.query(states, ids)
            if work.device != "cpu":
                torch.cuda.synchronize()
            best[name] = min(best[name], time.perf_counter() - started)
    return min(best, key=lambda name: best[name])


def agree(stage: Stage, work: Work) -> float:
    """Return the largest difference between the first user's prior and ours, of a mean; refuse to time two priors."""
    from bench.gpu_hours.first_user import AutoModelPrior

    states = torch.randn(16, stage.prompt.prior.state_dim, device=work.device)
    ids = torch.zeros(16, dtype=torch.int64, device=work.device)
    mean, std = AutoModelPrior(stage.prompt.prior)(states, ids)
    ours = stage.prompt.prior.query(states, ids)
    torch.testing.assert_close(mean, ours.mean, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(std, ours.log_std.exp(), atol=1e-3, rtol=1e-3)
    return float((mean - ours.mean).abs().max())


def audited(stage: Stage | None) -> float | None:
    """Return the student's mean KL to the exact prior in nats, over the rows that were audited while it was timed."""
    student = None if stage is None else stage.student.prior
    return student.audited_kl_sum / student.audited_rows if student is not None and student.audited_rows else None


def upon(work: Work, stage: Stage, carry: str, *, python_envs: bool) -> tuple[str, list[Arm]]:
    """Return the form that rungs 5 to 7 ask, and the ladder with its side rows.

    Args:
        work: of an iteration.
        stage: forms of the prior.
        carry: "shared", "quantized", or "faster" for the one that answers sooner here.
        python_envs: as for `ladder`.
    """
    carried = faster(stage, work) if carry == "faster" else carry
    arms = ladder(work, stage, carried, python_envs=python_envs)
    side = [side_row(work, stage, carried)]
    if carry == "shared":  # by wish, however fast rung 4 is
        arms[3] = arms[3]._replace(adds="fewer bits (not carried on, as it was asked)")
        other = ladder(work, stage, "quantized", python_envs=python_envs)[6]
        side.append(other._replace(name="side row: 7 upon rung 4", adds="rung 7, with the prior of rung 4"))
    return carried, [*arms, *side]


def is_wanted(arm: Arm, rungs: Sequence[int]) -> bool:
    """Tell whether an arm of the ladder is of the rungs that were asked for; side rows stand beside rung 7."""
    return (int(arm.name.split()[0]) if arm.name[0].isdigit() else 7) in rungs


def measure(arms: list[Arm], rounds: int, seconds: float, skipped: list[str]) -> Iterator[dict[str, Any]]:
    """Open and warm up every arm, let them take turns, and yield all results so far after each warm-up and round.

    Args:
        arms: the rungs and peers.
        rounds: turns of each, at most.
        seconds: from the start of opening; no further arm is opened and no further round begins after them.
        skipped: to which the arms are added that were not opened.
    """
    results: dict[str, Any] = {}
    begun = time.perf_counter()
    with ExitStack() as opened:
        slices = {}
        for arm in arms:
            if time.perf_counter() - begun > seconds:
                skipped.append(f"{arm.name}: not opened, {seconds:.0f} s were over")
                continue
            before, started = accounting.peak_memory_bytes(), time.perf_counter()
            slices[arm.name] = opened.enter_context(arm.open())
            warm = as_json(slices[arm.name]())
            results[arm.name] = {
                "adds": arm.adds,
                "tag": arm.tag,
                "facts": arm.facts,
                "warm_up": warm,
                "opening_and_warm_up_s": time.perf_counter() - started,
                "peak_memory_grew_bytes": accounting.peak_memory_bytes() - before,
                "rounds": [],
            }
            print(f"ready: {arm.name}", file=sys.stderr, flush=True)
            yield results
        for k in range(rounds):
            for name, slice_ in slices.items():
                results[name]["rounds"].append(as_json(slice_()))
            print(f"round {k + 1} of {rounds}", file=sys.stderr, flush=True)
            yield results
            if time.perf_counter() - begun > seconds:
                break


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600, help="no further arm or round once so many are over")
    parser.add_argument("--rungs", type=int, nargs="*", default=list(range(1, 9)))
    parser.add_argument("--stage", type=Path, default=Path("runs/gpu_hours"), help="where stage 1 is, or is to be kept")
    parser.add_argument("--prepare", action="store_true", help="run stage 1 and measure nothing")
    parser.add_argument("--peers", action="store_true", help="plain PPO, by us and others, besides")
    parser.add_argument("--sbx-python", help="an interpreter with sbx-rl and this package")
    parser.add_argument("--skrl-python", help="an interpreter with skrl and this package")
    parser.add_argument(
        "--carry", default="faster", choices=["faster", "shared", "quantized"], help="onto rungs 5 to 7"
    )
    parser.add_argument("--quantization", default="bf16", choices=["bf16", "int8", "nf4", "fp8"])
    parser.add_argument("--backbone-shape", type=Path, help="a folder with config.json: random weights of that shape")
    add_work(parser, Work())
    options = parser.parse_args(words)
    work = work_of(options)
    torch.set_num_threads(usable_cores())
    python_envs = find_spec("metaworld") is not None
    arms: list[Arm] = []
    stage: Stage | None = None
    record: dict[str, Any] = {"skipped": [] if python_envs else ["Python Meta-World is not installed"]}
    if options.rungs:
        if options.backbone_shape is None:
            options.stage.mkdir(parents=True, exist_ok=True)
            stage = fitted(work, options.quantization, options.stage)
            if options.prepare:
                return
        else:
            stage = shaped(work, options.backbone_shape, options.quantization)
        carried, every = upon(work, stage, options.carry, python_envs=python_envs)
        arms += [arm for arm in every if is_wanted(arm, options.rungs)]
        record |= {
            "backbone": stage.backbone,
            "weights": stage.weights,
            "weights_bytes": weights_bytes(stage.prompt.prior.transformer),
            "carried": carried,
            "first_users_prior_differs_by": agree(stage, work),
        }
    if options.peers:
        others = {"sbx": options.sbx_python, "skrl": options.skrl_python}
        record["skipped"] += [
            f"{name}: no --{name}-python was given" for name, where in others.items() if where is None
        ]
        arms += peers(work, *others.values(), python_envs=python_envs)
    record |= {
        "work": plain(work),
        "torch_threads": torch.get_num_threads(),
        "cores": usable_cores(),
        "devices": torch.cuda.device_count() if work.device != "cpu" else 0,
        **runs.provenance(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for results in measure(arms, options.rounds, options.seconds, record["skipped"]):
        now = {
            "arms": results,
            "student_audit_kl_nats": audited(stage),
            "load_average": os.getloadavg(),
            "peak_memory_bytes": accounting.peak_memory_bytes(),
        }
        whole = options.out.with_name(f"{options.out.name}.new")  # a run that is stopped here keeps the last one
        whole.write_text(json.dumps({**record, **now}, indent=1) + "\n", encoding="utf-8")
        whole.replace(options.out)


if __name__ == "__main__":
    main()
