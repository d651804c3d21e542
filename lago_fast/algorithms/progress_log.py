"""Logs that go on in one piece where a checkpoint was written: progress.csv cut back to it, TensorBoard told to.

Stable-Baselines3's own csv writer empties its file when it is opened, and rewrites it in place for a new column.
Test: pytest tests/algorithms/test_progress_log.py
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

from stable_baselines3.common.logger import (
    CSVOutputFormat,
    KVWriter,
    Logger,
    TensorBoardOutputFormat,
    filter_excluded_keys,
    make_output_format,
)

from lago_fast.algorithms.atomic import replacing
from lago_fast.errors import UnsupportedArgument

STEPS = "time/total_timesteps"  # which Stable-Baselines3 logs in every row


class ProgressCSV(CSVOutputFormat):
    """Rows of figures in a csv file; a new column replaces the file in one step, so that a crash loses no row.

    Args:
        path: of the file.
        since: rows of more env steps are dropped from a file that is there; 0 begins anew.
    """

    def __init__(self, path: Path, since: int = 0) -> None:
        self.path = path
        for rest in path.parent.glob(f".{path.name}.*"):  # of a writer that was killed
            rest.unlink(missing_ok=True)
        self.keys, rows = _rows_until(path, since) if since else ([], [])
        self._replace(rows)

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Append a row; figures and texts alone can be written."""
        del step
        row = filter_excluded_keys(key_values, key_excluded, "csv")
        fresh = sorted(row.keys() - self.keys)
        if fresh:
            self.file.close()
            rows = _read(self.path)[1:]
            self.keys += fresh
            self._replace([[*old, *[""] * len(fresh)] for old in rows])
        csv.writer(self.file, lineterminator="\n").writerow(["" if row.get(k) is None else row[k] for k in self.keys])
        self.file.flush()

    def _replace(self, rows: list[list[str]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.keys, *rows] if self.keys else [])
        with replacing(self.path) as file:
            file.write(text.getvalue().encode())
        self.file = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115  close() closes it


class ContinuedTensorBoard(TensorBoardOutputFormat):
    """TensorBoard's event files; what was logged after `since` env steps is hidden, for it is logged again."""

    def __init__(self, folder: Path, since: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(log_dir=str(folder), purge_step=since + 1)
        self._is_closed = False


def progress_logger(folder: str | os.PathLike[str], formats: list[str], since: int = 0) -> Logger:
    """Return a logger for `model.set_logger`, as Stable-Baselines3's `configure` does, that can go on.

    Args:
        folder: of the files; made where it is missing.
        formats: of "csv", "tensorboard", "stdout", "log", "json".
        since: env steps of the checkpoint that training goes on from (`model.num_timesteps`); later rows are dropped
            from progress.csv and hidden in TensorBoard. 0 begins anew.

    Raises:
        UnsupportedArgument: a format that cannot be continued, with `since`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lost = sorted({"log", "json"} & set(formats)) if since else []
    if lost:
        raise UnsupportedArgument(f"formats: {', '.join(lost)} cannot be cut back to a checkpoint; leave it out")

    def writer(name: str) -> KVWriter:
        if name == "csv":
            return ProgressCSV(folder / "progress.csv", since)
        if name == "tensorboard" and since:
            return ContinuedTensorBoard(folder, since)
        return make_output_format(name, str(folder))

    return Logger(folder=str(folder), output_formats=[writer(name) for name in formats])


def _read(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        return list(csv.reader(file))


def _rows_until(path: Path, steps: int) -> tuple[list[str], list[list[str]]]:
    """Return the columns of a file and its whole rows of at most so many env steps; none where there is no file."""
    rows = _read(path) if path.is_file() else []
    if not rows or STEPS not in rows[0]:
        return [], []
    keys, place = rows[0], rows[0].index(STEPS)
    kept = [row for row in rows[1:] if len(row) == len(keys) and row[place].isdigit() and int(row[place]) <= steps]
    return keys, kept
