"""Kills and signals: no completed checkpoint is ever lost, and the run goes on."""

import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from lago_fast import errors
from lago_fast.algorithms.checkpoint import paths_in
from lago_fast.algorithms.stopping import StopOnSignals
from tests.algorithms.overnight_run import last_told, newest_iteration, run


@pytest.fixture(scope="module")
def processes():
    """Processes that have imported everything before they begin, if the server of them was not running before."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.algorithms.overnight_run"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))  # the server looks for what it preloads
        server = context.Process(target=int)
        server.start()
        server.join()
    return context


def started(processes, *arguments):
    process = processes.Process(target=run, args=arguments)
    process.start()
    return process


def wait_until(condition, seconds=60):
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    pytest.fail(f"nothing happened for {seconds} s")


def csv_iterations(folder):
    return np.atleast_1d(np.genfromtxt(folder / "progress.csv", delimiter=",", names=True)["timeiterations"]).tolist()


def test_killed_at_random_moments_it_goes_on_and_loses_no_checkpoint(processes, tmp_path, request):
    rng, reached = random.Random(1), []
    for kill in range(request.config.getoption("--kills")):
        before = last_told(tmp_path)
        process = started(processes, tmp_path)
        if kill % 4 == 3:
            time.sleep(rng.uniform(0.0, 2.0))  # while it starts and resumes, too
        else:
            wait_until(lambda before=before: last_told(tmp_path) > before)
            time.sleep(rng.uniform(0.0, 0.4))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        told, found = last_told(tmp_path), newest_iteration(tmp_path)
        assert before <= told <= found <= told + 1  # or moved into place, and not yet told
        assert len(paths_in(tmp_path / "checkpoints")) <= 3
        reached.append(found)
    process = started(processes, tmp_path, 2)
    process.join(60)
    assert process.exitcode == 0
    assert newest_iteration(tmp_path) == reached[-1] + 2
    assert csv_iterations(tmp_path) == list(range(1, reached[-1] + 3))
    waited_for = len(reached) - len(reached) // 4
    assert reached[-1] >= waited_for - 1  # counted from 0
    # no rest of a writer that was killed
    assert not [*tmp_path.glob(".*"), *(tmp_path / "checkpoints").glob(".*")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_iteration_and_writes_a_checkpoint(processes, tmp_path, number):
    process = started(processes, tmp_path, None, 0.005)
    wait_until(lambda: last_told(tmp_path) >= 1)
    time.sleep(0.03)  # into an iteration, which takes at least 0.08 s
    os.kill(process.pid, number)
    process.join(30)
    assert process.exitcode == 128 + number
    assert newest_iteration(tmp_path) == last_told(tmp_path) + 1  # the iteration under way
    assert csv_iterations(tmp_path)[-1] == newest_iteration(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_leaves_at_once(processes, tmp_path, number):
    process = started(processes, tmp_path, None, 10.0)  # an iteration takes minutes
    wait_until(lambda: last_told(tmp_path) >= 0)
    os.kill(process.pid, number)
    time.sleep(0.3)
    assert process.is_alive()
    os.kill(process.pid, number)
    process.join(5)
    assert process.exitcode == 128 + number
    assert newest_iteration(tmp_path) == 0


def test_outside_of_the_context_signals_are_as_they_were():
    before = signal.getsignal(signal.SIGINT)
    with StopOnSignals() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        assert stop.caught is None
    assert signal.getsignal(signal.SIGINT) is before


def test_an_env_that_died_of_the_same_signal_does_not_hide_it(capfd):
    def interrupted():
        with StopOnSignals() as stop:
            signal.raise_signal(signal.SIGINT)
            assert stop.caught == signal.SIGINT
            raise errors.EnvironmentFailed("its process had the signal too")

    with pytest.raises(SystemExit) as end:
        interrupted()
    assert end.value.code == 130
    assert "finishing the iteration" in capfd.readouterr().err


def test_in_another_thread_it_is_refused():
    refused = []

    def enter():
        try:
            StopOnSignals().__enter__()
        except errors.UnsupportedArgument as error:
            refused.append(str(error))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "main thread" in refused[0]
