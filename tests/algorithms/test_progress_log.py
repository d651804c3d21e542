"""Logs that are continued: rows after the checkpoint go, those before stay, whatever was torn."""

import csv

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lago_fast import errors
from lago_fast.algorithms.progress_log import STEPS, progress_logger


def log(folder, steps, since=0, formats=("csv",), **more):
    logger = progress_logger(folder, list(formats), since)
    for step in steps:
        logger.record(STEPS, step, exclude="tensorboard")
        for name, value in more.items():
            logger.record(name, value(step))
        logger.dump(step)
    logger.close()


def rows(folder):
    return list(csv.DictReader((folder / "progress.csv").read_text().splitlines()))


def test_rows_after_the_checkpoint_are_dropped_and_the_rest_is_kept(tmp_path):
    log(tmp_path, range(100, 600, 100), old=lambda step: step / 7)
    before = rows(tmp_path)
    log(tmp_path, [400, 500], since=300, old=lambda step: -step)
    assert rows(tmp_path)[:3] == before[:3]
    assert [(row[STEPS], row["old"]) for row in rows(tmp_path)[3:]] == [("400", "-400"), ("500", "-500")]
    log(tmp_path, [1])
    assert len(rows(tmp_path)) == 1  # since=0 begins anew


def test_a_torn_line_is_dropped(tmp_path):
    log(tmp_path, [100, 200], old=lambda step: step)
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("2")
    log(tmp_path, [300], since=200, old=lambda step: step)
    assert [row[STEPS] for row in rows(tmp_path)] == ["100", "200", "300"]


def test_a_new_column_keeps_the_rows_and_texts_are_quoted(tmp_path):
    log(tmp_path, [100], old=lambda step: step)
    log(tmp_path, [200], since=100, new=lambda _: 'a "quoted", text')
    found = rows(tmp_path)
    assert [(row[STEPS], row["old"], row["new"]) for row in found] == [
        ("100", "100", ""),
        ("200", "", 'a "quoted", text'),
    ]
    assert not list(tmp_path.glob(".progress*"))


def test_without_a_file_or_with_a_strange_one_it_begins_anew(tmp_path):
    log(tmp_path, [200], since=100)
    assert len(rows(tmp_path)) == 1
    (tmp_path / "progress.csv").write_bytes(b"\xff\x00,\n1,2\n")
    log(tmp_path, [300], since=200)
    assert [row[STEPS] for row in rows(tmp_path)] == ["300"]


def test_tensorboard_shows_each_step_once(tmp_path):
    log(tmp_path, [100, 200, 300], formats=["tensorboard"], value=lambda step: step)
    log(tmp_path, [300, 400], since=200, formats=["tensorboard"], value=lambda step: -step)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("value")] == [
        (100, 100),
        (200, 200),
        (300, -300),
        (400, -400),
    ]


def test_formats_that_cannot_be_cut_back_are_refused(tmp_path):
    with pytest.raises(errors.UnsupportedArgument, match="json"):
        progress_logger(tmp_path, ["csv", "json"], since=10)
    progress_logger(tmp_path, ["csv", "json", "log", "stdout"]).close()
