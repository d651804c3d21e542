"""`lago audit`: what the prior said to a trained policy, as a table and as one HTML file."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lago_fast.cli import console, inputs
from lago_fast.cli.command import Command, by_default
from lago_fast.errors import PriorMismatch, RunExists, UnsupportedArgument
from lago_fast.presets import EnvSettings

if TYPE_CHECKING:
    from lago_fast.algorithms.fast_kl_ppo import FastKLPPO
    from lago_fast.audit import Comparison
    from lago_fast.envs.vec_env import ArrayVecEnv
    from lago_fast.priors.latent_action import LatentActionPrior

COLUMNS = ("task", "step", "instruction", "state", "prior", "policy", "KL", "trust", "solved")


@dataclass(frozen=True, kw_only=True)
class Audit(Command):
    """Compare a trained policy with its prior, state by state.

    Plays some episodes, and shows for sampled states the instruction, the state in words, what prior and policy
    would do, their KL and how far the prior may be trusted there; in the file also the prior's latents.
    """

    path: Annotated[Path, tyro.conf.Positional]
    """Folder of `lago train`."""
    prior: Annotated[Path | None, by_default("the run's own")] = None
    """Folder of the prior, where it has moved, or where the run was trained without one."""
    states: int = 300
    """States to sample, evenly over the tasks."""
    shown: int = 12
    """States of them in the table of the terminal; the file has all."""
    top_k: int = 3
    """Likeliest actions that are named, where actions are choices."""
    episodes: int = 5
    """Episodes per task that are played for them."""
    seed: int = 20_000
    """Decides start positions, goals, wording and the sample; keep it apart from the seeds of training."""
    device: str = "cpu"
    """cpu, cuda, or auto for CUDA where there is one."""
    out: Annotated[Path | None, by_default("audit.html in the run")] = None
    """The file."""
    overwrite: bool = False
    """Replace the file that is already there."""

    def run(self) -> None:
        """Play, ask both, print the table and write the file."""
        from lago_fast import runs
        from lago_fast.audit import audit
        from lago_fast.evaluate import make_evaluation_env

        out = self.out or self.path / runs.AUDIT
        if out.exists() and not self.overwrite:
            raise RunExists(f"out: {out} exists already; name another file, or replace it with --overwrite")
        if min(self.states, self.shown, self.top_k, self.episodes) < 1:
            raise UnsupportedArgument("states, shown, top_k, episodes: give at least 1 of each")
        device = inputs.check_device(self.device)
        config = runs.read_config(self.path)
        settings = runs.from_plain(EnvSettings, config["env"])
        model, table = inputs.read_policy(self.path, settings, device)
        env = make_evaluation_env(replace(settings, eval_tasks=()), self.episodes, self.seed, table)
        try:
            prior = self._read_prior(config, device)
            direction = config["train"]["kl_direction"]
            found = audit(model, prior, env, states=self.states, seed=self.seed, kl_direction=direction)
        finally:
            env.close()
        rows = table_rows(found, env, self.top_k)
        every = -(-len(rows) // self.shown)
        console.print_table(f"{self.path}: the prior and the policy", COLUMNS, rows[::every], texts=len(COLUMNS))
        console.print_facts("over all sampled states", summary(found, env))
        write_page(out, self._facts(config, model, direction), found, env, rows)
        console.say(f"written to {out}")

    def _read_prior(self, config: dict[str, Any], device: str) -> "LatentActionPrior":
        """Return the exact prior of the run; PriorMismatch where it is another."""
        recorded = config["prior"] or {}
        if self.prior is None and "folder" not in recorded:
            raise UnsupportedArgument(
                f"prior: the settings of {self.path} name no folder of one; name the one to compare with, --prior"
            )
        folder = self.prior or Path(recorded["folder"])
        prior = inputs.exact_of(inputs.read_prior(folder, "exact", device))
        if recorded.get("exact_digest", prior.digest) != prior.digest:
            raise PriorMismatch(
                f"prior: the one in {folder} is not the one that {self.path} was trained with; name the folder where "
                "that is now"
            )
        return prior

    def _facts(self, config: dict[str, Any], model: "FastKLPPO", direction: str) -> dict[str, str]:
        kl = "KL(policy || prior)" if direction == "policy_prior" else "KL(prior || policy)"
        asked = (
            " (in training a student answered for it)"
            if model.prior_digest and config["train"]["prior_mode"] == "amortised"
            else ""
        )
        return {
            "run": str(self.path),
            "arm": config["arm"],
            "steps trained": f"{model.num_timesteps:,}",
            "prior": f"{self.prior or config['prior']['folder']}{asked}",
            "KL": f"{kl}, exact, in nats",
            "trust": "1 where demonstrations are as near in the prior's latents as they are to each other, towards 0 "
            "further away",
            "episodes": f"{self.episodes} per task, deterministic actions, seed {self.seed}",
        }


def table_rows(found: "Comparison", env: "ArrayVecEnv", top_k: int) -> list[tuple[Any, ...]]:
    """Return a row of cells per sampled state."""
    from lago_fast.audit import in_words

    rows = found.rows
    trust = [None] * len(rows.state) if found.trust is None else found.trust.tolist()
    return list(
        zip(
            [env.tasks[k] for k in rows.task_id],
            rows.step.tolist(),
            [env.instructions[i] for i in rows.instruction_id],
            [env.describe_state(state) for state in rows.state],
            in_words(found.prior, env.action_names, top_k),
            in_words(found.policy, env.action_names, top_k),
            found.kl_nats.tolist(),
            trust,
            ["yes" if solved else "no" for solved in rows.success],
            strict=True,
        )
    )


def summary(found: "Comparison", env: "ArrayVecEnv") -> dict[str, Any]:
    """Return mean KL and trust per task."""
    facts = {}
    for k, task in enumerate(env.tasks):
        mine = found.rows.task_id == k
        facts[task] = {
            "states": int(mine.sum()),
            "KL, nats": float(found.kl_nats[mine].mean()),
            "trust": None if found.trust is None else float(found.trust[mine].mean()),
            "in solved episodes": console.percent(float(found.rows.success[mine].mean())),
        }
    return facts


def write_page(
    out: Path, facts: dict[str, str], found: "Comparison", env: "ArrayVecEnv", rows: list[tuple[Any, ...]]
) -> None:
    """Write the HTML file, whole or not at all."""
    from lago_fast.algorithms.atomic import replacing
    from lago_fast.audit_page import draw_kl, draw_latents, page

    seen = found.rows
    figures = [
        (
            "How far the policy is from the prior",
            draw_kl(seen.step, found.kl_nats, found.trust, seen.task_id, env.tasks),
        )
    ]
    if found.places is not None:
        latents = draw_latents(found.places, found.demonstrated, found.explained, seen.task_id, env.tasks, seen.success)
        figures.append(("The prior's latents", latents))
    for task, said in summary(found, env).items():
        facts[task] = ", ".join(f"{name} {console.figure(value)}" for name, value in said.items())
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as file:
        file.write(page(f"{out.parent.name}: the prior and the policy", facts, figures, COLUMNS, rows).encode())
