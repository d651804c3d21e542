"""The command line: `lago demos | fit-prior | train | eval | compare | plot | audit | bench | info`.

Each command is a dataclass whose fields are its options. What is heavy is imported when a command runs, so
that help answers at once. Test: pytest tests/test_cli.py
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from lago_fast.cli import console
from lago_fast.cli.audit import Audit
from lago_fast.cli.bench import Bench
from lago_fast.cli.command import Command
from lago_fast.cli.compare import Compare
from lago_fast.cli.demos import Demos
from lago_fast.cli.evaluate import Evaluate
from lago_fast.cli.fit_prior import FitPrior
from lago_fast.cli.info import Info
from lago_fast.cli.plot import Plot
from lago_fast.cli.train import Train
from lago_fast.errors import LagoError
from lago_fast.presets import EnvSettings

COMMANDS: dict[str, type[Command]] = {
    "demos": Demos,
    "fit-prior": FitPrior,
    "train": Train,
    "eval": Evaluate,
    "compare": Compare,
    "plot": Plot,
    "audit": Audit,
    "bench": Bench,
    "info": Info,
}
USER_ERROR, INTERRUPTED = 2, 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 for an error that the user can mend, 130 after Ctrl-C.

    Args:
        args: the words after `lago`; None: those of the process.

    Raises:
        SystemExit: from the parser, for --help (0) and for options that do not parse (2).
    """
    words = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in words
    try:
        command = parse(words)
        with console.log_of_the_package():
            command.run()
    except KeyboardInterrupt:
        console.complain("Interrupted", "what was finished before is kept")
        return INTERRUPTED
    except (LagoError, OSError) as error:
        if debug:
            raise
        console.complain(type(error).__name__, str(error))
        return USER_ERROR
    return 0


def parse(words: Sequence[str]) -> Command:
    """Return the command that the words describe; it starts from the preset or the environment that they name."""
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--preset", default=Compare.preset)
    asked.add_argument("--env", default=EnvSettings.env)
    found = asked.parse_known_args(words)[0]
    named = words[0] if words and words[0] in COMMANDS else None
    union: Any = None
    for name, kind in COMMANDS.items():
        # a preset or an environment that is unknown is the named command's to refuse
        start = kind.start(*((found.preset, found.env) if name == named else (Compare.preset, EnvSettings.env)))
        options: dict[str, Any] = {} if start is None else {"default": start}
        if named is None:
            options["description"] = (kind.__doc__ or "").splitlines()[0]
        one = Annotated[kind, tyro.conf.subcommand(name=name, **options)]  # type: ignore[valid-type]  # made at run time
        union = one if union is None else union | one
    return tyro.cli(
        union,
        prog="lago",
        description="Reinforcement learning guided by a frozen language-model prior, on Meta-World and CLEVR-Robot.",
        args=words,
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.DisallowNone),
    )
