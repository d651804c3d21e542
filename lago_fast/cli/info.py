"""`lago info`: what is installed here, or what a folder holds."""

import importlib.metadata
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from lago_fast.cli import console
from lago_fast.cli.command import Command, by_default
from lago_fast.cli.compare import print_report
from lago_fast.errors import ImplUnavailable, UnsupportedArgument


@dataclass(frozen=True, kw_only=True)
class Info(Command):
    """Show what is installed here; with a path, what a run, a prior or a dataset of demonstrations holds.

    The files of a prior are checked against their recorded hashes.
    """

    path: Annotated[Path | None, tyro.conf.Positional, by_default("this installation")] = None
    """Folder of a run, a prior or demonstrations."""

    def run(self) -> None:
        """Look, and print."""
        from lago_fast import runs

        if self.path is None:
            _show_installation()
        elif runs.is_run(self.path):
            _show_run(self.path)
        elif (self.path / "data" / "metadata.json").is_file():
            _show_demos(self.path)
        elif (self.path / "config.json").is_file():
            _show_prior(self.path)
        else:
            raise UnsupportedArgument(f"path: {self.path} is no run, no prior and no dataset; name the folder of one")


def _show_installation() -> None:
    from lago_fast import runs

    console.print_facts("versions", runs.versions())
    console.print_facts("code", runs.code_version())
    console.print_facts("hardware", runs.hardware())
    rows = [(extra, ", ".join(have) or None, ", ".join(lack) or None) for extra, have, lack in extras()]
    console.print_table("extras", ("extra", "installed", "missing"), rows, texts=3)
    title = "what impl='auto' means here"
    console.print_table(title, ("op", "device", "implementation"), implementations(), texts=3)


def extras() -> list[tuple[str, list[str], list[str]]]:
    """Return for each optional part of the package what of it is installed and what is missing."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for requirement in importlib.metadata.requires("lago_fast") or []:
        extra = re.search(r"extra\s*==\s*[\"']([\w-]+)[\"']", requirement)
        name = re.match(r"[\w.-]+", requirement)
        if extra is None or name is None:
            continue
        installed, missing = found.setdefault(extra[1], ([], []))
        try:
            importlib.metadata.version(name[0])
            installed.append(name[0])
        except importlib.metadata.PackageNotFoundError:
            missing.append(name[0])
    return [(extra, *lists) for extra, lists in found.items()]


def implementations() -> list[tuple[str, str, str]]:
    """Return (op, device, implementation or why there is none) for each op on each device that is here."""
    import torch

    from lago_fast import ops

    rows = []
    for op in ops.IMPLEMENTATIONS:
        for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
            try:
                impl = ops.resolve(op, device)[0]
            except (ImplUnavailable, ImportError) as error:
                impl = f"none: {error}"
            rows.append((op, device, impl))
    return rows


def _show_run(folder: Path) -> None:
    from lago_fast import runs

    console.print_facts("settings", runs.read_config(folder))
    provenance = runs.read_json(folder / runs.PROVENANCE)
    provenance["command_line"] = shlex.join(provenance["command_line"])
    console.print_facts("provenance", provenance)
    if (folder / runs.REPORT).is_file():
        print_report(runs.read_json(folder / runs.REPORT))
    if (folder / runs.CURVE).is_file():
        console.print_training(runs.read_json(folder / runs.CURVE))
    files = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    sizes = {path.name: "folder" if path.is_dir() else f"{path.stat().st_size:,} bytes" for path in files}
    console.print_facts("files", sizes)


def _show_demos(path: Path) -> None:
    from lago_fast import runs
    from lago_fast.demos import load_demos

    demos = load_demos(path)
    steps, state_dim = demos.states.shape
    facts: dict[str, Any] = {
        "episodes": len(demos.success),
        "steps": steps,
        "state numbers": state_dim,
        **(
            {"action numbers": demos.actions.shape[1]}
            if demos.num_actions is None
            else {"discrete actions": demos.num_actions}
        ),
        "tasks": demos.tasks,
        "wordings": len(demos.instructions),
        "success": console.percent(float(demos.success.mean())),
    }
    console.print_facts("demonstrations", facts)
    console.print_facts("recorded with", runs.read_json(path / "data" / "metadata.json").get("lago", {}))


def _show_prior(folder: Path) -> None:
    from lago_fast import runs
    from lago_fast.priors.folder import read_folder

    kind = str(runs.read_json(folder / "config.json").get("class"))
    _, config, metrics = read_folder(folder, kind)
    instructions = config.pop("instructions", None)
    if instructions is not None:
        config["instructions"] = f"{len(instructions)}, for example {instructions[0]!r}"
    console.print_facts("prior", config)
    console.print_facts("measured", metrics)
    console.say("every file has its recorded hash")
