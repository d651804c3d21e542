"""The settings of a run of `lago train`, read back from its folder."""

from pathlib import Path
from typing import Any

from lago_fast.cli.prior_options import PriorOptions
from lago_fast.errors import UnsupportedArgument
from lago_fast.presets import EnvSettings, TrainSettings


def recorded_settings(folder: Path) -> dict[str, Any]:
    """Return the options of `lago train` that a run was made with, by name.

    Raises:
        UnsupportedArgument: no run is there, or another command made it.
    """
    from lago_fast import runs

    config = runs.read_config(folder)
    try:
        return {
            "arm": config["arm"],
            "seed": config["seed"],
            "prior": None if config["prior"] is None else Path(config["prior"]["folder"]),
            "demos": None if config["demos"] is None else Path(config["demos"]),
            "env": runs.from_plain(EnvSettings, config["env"]),
            "train": runs.from_plain(TrainSettings, config["train"]),
            "asking": runs.from_plain(PriorOptions, config["asking"]),
        }
    except (KeyError, TypeError) as error:
        raise UnsupportedArgument(
            f"resume: the run at {folder} was not made by `lago train` (its settings lack {error}); name one that was"
        ) from error
