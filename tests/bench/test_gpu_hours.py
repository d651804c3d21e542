"""The comparison's arithmetic on small made results: medians, intervals, extrapolation, tags, the last line."""

import csv
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.gpu_hours import accounting, compare, report
from bench.gpu_hours.accounting import Cost
from bench.gpu_hours.first_user import PriorPPO
from bench.gpu_hours.plain_ppo import PlainPPO
from bench.gpu_hours.rungs import Arm, Measured, Part, ladder, make_env
from bench.gpu_hours.work import Form, Stage, Work
from tests.algorithms.point_env import PointEnv


def iteration(wall_s, env_steps=1000, cpu_s=None, busy=None):
    part = {"name": "iteration", "times": 1.0, "wall_s": wall_s}
    rest = {"cpu_s": wall_s if cpu_s is None else cpu_s, "gpu_busy_s": busy, "gpu_joules": busy and 3600.0}
    return {"parts": [part], "env_steps": env_steps, "wall_s": wall_s, **rest, "gpu_joules_are": "measured"}


def arm(walls, tag="exact", **facts):
    return {
        "adds": "something",
        "tag": tag,
        "facts": facts,
        "peak_memory_grew_bytes": 0,
        "rounds": [iteration(wall) for wall in walls],
    }


@pytest.fixture
def record():
    return {
        "arms": {
            "1 first user": arm([36.0, 40.0, 30.0], "baseline", success=0.75, one_off_s=7200.0),
            "2 careful user": arm([9.0, 8.0, 10.0], success=0.75),
            "8 amortised": arm([0.36, 0.4, 0.3], "approximate", kl_nats=0.05),
        },
        "cores": 2,
        "devices": 0,
        "hardware": {"cpu": "some", "cores": 2, "gpu": None, "platform": "some"},
        "work": {"task": "push"},
        "backbone": "MiniLM",
        "weights": "pretrained",
        "carried": "shared",
        "skipped": ["sbx: not given"],
        "peak_memory_bytes": 10,
        "commit": "abc",
    }


def test_hours_per_million_by_hand():
    # 36 s for 1,000 steps are 36,000 s for a million: 10 hours, on two cores 20 core-hours
    found = report.hours_per_million(iteration(36.0, cpu_s=54.0), cores=2, devices=0)
    assert found["wall_hours"] == pytest.approx(10)
    assert found["core_hours"] == pytest.approx(20)
    assert found["cpu_hours_used"] == pytest.approx(15)
    # 15 hours of a core of 280 / 64 watts
    assert found["cpu_kwh_modelled"] == pytest.approx(0.065625)
    assert found["gpu_hours"] is None


def test_gpu_hours_allocated_busy_and_energy():
    found = report.hours_per_million(iteration(36.0, busy=9.0), cores=16, devices=2)
    assert found["gpu_hours"] == pytest.approx(20)  # two devices, used or not
    assert found["gpu_hours_busy"] == pytest.approx(2.5)
    # 3,600 J for 1,000 steps: 1 Wh, a thousand times that
    assert found["gpu_kwh"] == pytest.approx(1.0)


def test_the_interval_is_around_the_median_and_within_the_rounds():
    middle, low, high = report.median_interval([1.0, 2.0, 3.0, 4.0, 100.0])
    assert middle == 3.0
    assert 1.0 <= low < 3.0 < high <= 100.0
    assert report.median_interval([5.0, 5.0]) == (5.0, 5.0, 5.0)
    assert report.median_interval([1.0, 2.0, 9.0]) == report.median_interval([1.0, 2.0, 9.0])


def test_ratios_are_of_pairs_of_rounds():
    # each round is 10 times; the machine was half as fast in the second
    assert report.ratio_interval([1.0, 2.0, 1.0], [10.0, 20.0, 10.0]) == (10.0, 10.0, 10.0)
    assert report.ratio_interval([1.0], [10.0, 99.0])[0] == 10.0


def test_extrapolation_and_ratios_by_hand(record):
    found = report.summarise([record])
    assert found["measure"] == "core_hours"
    first, last = found["arms"]["1 first user"], found["arms"]["8 amortised"]
    assert first["core_hours_per_million"] == pytest.approx(20)
    assert last["times_fewer_than_1"][0] == pytest.approx(100)
    assert last["times_fewer_than_2"][0] == pytest.approx(25)
    assert first["extrapolated_hours"] == {
        "CLEVR-Robot, 1.5 million steps": pytest.approx(30),
        "Meta-World, 20 million steps": pytest.approx(400),
    }
    assert first["one_off_hours"] == 2.0
    assert first["env_steps_per_s"] == pytest.approx(1000 / 36)
    assert found["paper"]["Meta-World, 20 million steps"]["gpu_hours"] == 210


def test_runs_of_the_same_work_are_pooled_and_others_refused(record):
    assert report.summarise([record, record])["rounds"]["8 amortised"] == 6
    with pytest.raises(ValueError, match="work"):
        report.summarise([record, {**record, "work": {"task": "reach"}}])


def test_a_tag_says_what_it_stands_on(record):
    stands_on = [report.evidence(found) for found in report.summarise([record])["arms"].values()]
    assert stands_on == ["prior's success 75 %", "prior's success 75 %", "KL 0.050 nats"]


def test_energy_is_named_by_where_it_comes_from(record):
    def energy(**gpu):
        for one in record["arms"]["8 amortised"]["rounds"]:
            one |= gpu
        return report.energy(report.summarise([record])["arms"]["8 amortised"])

    assert energy() == "0.000438 CPU, modelled"
    assert energy(gpu_joules=3600.0) == "1 GPU, measured; 0.000438 CPU, modelled"
    assert energy(gpu_joules_are="modelled") == "1 GPU, modelled; 0.000438 CPU, modelled"


def test_the_gpu_is_set_against_the_papers():
    assert "no ratio" in report.hardware_ratio(None)
    assert "float32 1.7x" in report.hardware_ratio("NVIDIA H100 80GB HBM3")
    assert "no data sheet" in report.hardware_ratio("Unknown 1")


def test_files_and_the_last_line(record, tmp_path, capsys):
    (tmp_path / "result.json").write_text(json.dumps(record))
    curve = {"arm": "lago", "tasks": {"push": {"env_steps": [10, 20], "success": [0.0, 1.0]}}}
    (tmp_path / "curve.json").write_text(json.dumps(curve))
    report.main([str(tmp_path / "result.json"), "--curve", str(tmp_path / "curve.json")])
    told = capsys.readouterr().out.splitlines()
    assert json.loads(told[-1])["arms"]["1 first user"] == pytest.approx(20)
    assert "skipped: sbx: not given" in told
    assert any("210 GPU-hours" in line and "extrapolated" in line for line in told)
    assert json.loads((tmp_path / "report.json").read_text())["weights"] == "pretrained"
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["tag"] for row in rows] == ["baseline", "exact", "approximate"]
    assert float(rows[0]["core_hours_per_million"]) == pytest.approx(20)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")


# measuring


def test_parts_are_scaled_by_how_often_they_occur():
    one = Measured([Part("collection", Cost(1.0, 2.0), 16), Part("update", Cost(0.5, 0.5), 2)], 100)
    assert one.cost == Cost(17.0, 33.0)


def test_what_one_part_lacks_the_whole_lacks():
    busy = Cost(1.0, 1.0, 0.5, 10.0, "measured")
    assert busy.scaled(2) == Cost(2.0, 2.0, 1.0, 20.0, "measured")
    assert busy.plus(Cost(1.0, 1.0)).gpu_joules is None
    assert busy.plus(Cost(1.0, 1.0, 0.5, 5.0, "modelled")).gpu_joules_are == "modelled"


def test_cpu_time_of_living_children_is_counted():
    with subprocess.Popen(["sh", "-c", "while :; do :; done"]) as child:
        before = accounting.cpu_seconds()
        deadline = time.perf_counter() + 10
        while accounting.cpu_seconds() - before < 0.2 and time.perf_counter() < deadline:
            time.sleep(0.05)
        with accounting.measured() as cost:
            time.sleep(0.3)
        child.kill()
    assert cost().cpu_s > 0
    assert cost().wall_s >= 0.3


# the arms


def test_the_first_users_loss_has_the_kl_to_the_prior_and_asks_it_in_every_minibatch():
    from stable_baselines3.common.env_util import make_vec_env

    asked = []

    def ask(states, ids):
        asked.append(len(states))
        assert ids.shape == states.shape[:1]
        return torch.zeros(len(states), 2), torch.ones(len(states), 2)

    rows = {}
    for in_every_minibatch in (True, False):
        asked.clear()
        env = make_vec_env(PointEnv, n_envs=4, seed=0)
        settings = {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "device": "cpu", "seed": 0}
        model = PriorPPO("MlpPolicy", env, **settings, ask=ask, kl_coef=0.5, in_every_minibatch=in_every_minibatch)
        _, callback = model._setup_learn(64, None)
        model.collect_rollouts(env, callback, model.rollout_buffer, 16)
        np.random.seed(0)  # noqa: NPY002 - SB3's buffer permutes by the global generator
        if not in_every_minibatch:
            model.ask_once(chunk=40)
            assert asked == [40, 24]
        model.train()
        rows[in_every_minibatch] = torch.cat([p.detach().flatten() for p in model.policy.parameters()])
        if in_every_minibatch:
            assert asked == [32] * 4
        assert model.logger.name_to_value["train/prior_kl"] > 0
    # the same prior, the same algorithm
    torch.testing.assert_close(rows[True], rows[False])


def test_the_careful_user_finds_each_rows_own_answer():
    from stable_baselines3.common.env_util import make_vec_env

    env = make_vec_env(PointEnv, n_envs=3, seed=0)
    model = PriorPPO(
        "MlpPolicy",
        env,
        n_steps=8,
        batch_size=8,
        device="cpu",
        ask=lambda states, _: (states, torch.ones_like(states)),
        kl_coef=0.1,
        in_every_minibatch=False,
    )
    _, callback = model._setup_learn(24, None)
    model.collect_rollouts(env, callback, model.rollout_buffer, 8)
    model.ask_once()
    before = model.prior_mean
    for batch in model.rollout_buffer.get(8):
        picked = torch.as_tensor(model.rollout_buffer.picked)
        torch.testing.assert_close(model.prior_mean[picked], batch.observations)
    model.ask_once()  # SB3 has flattened its arrays meanwhile
    torch.testing.assert_close(model.prior_mean, before)


def test_the_one_file_peer_counts_transitions_and_learns():
    work = Work(task="reach", num_envs=4, n_steps=16, batch_size=32, n_epochs=2, max_episode_steps=10)
    lane = make_env(work).array_lane
    peer = PlainPPO(lane, work)
    before = [p.detach().clone() for p in peer.parameters]
    peer.learn(1, log_interval=1, reset_num_timesteps=True)
    assert peer.num_timesteps == 4 * 15  # one row of each env follows an end
    assert all(not torch.equal(a, b) for a, b in zip(before, peer.parameters, strict=True))


def untimed_stage():
    """Return a stage whose forms are there and cannot answer."""

    class Prompt:
        transformer, instructions = None, ["push it"]

        class _backbone:
            class tokenizer:
                pad_token = "?"

    forms = {name: Form(Prompt(), {"quantization": "bf16"}) for name in ("prompt", "shared", "quantized", "student")}
    return Stage(**forms, backbone="b", shared_is="refit", weights="random")


def test_every_rung_adds_one_thing_and_is_tagged():
    stage = untimed_stage()
    rungs = ladder(Work(), stage, "shared")
    assert [rung.name.split()[0] for rung in rungs] == [str(k) for k in range(1, 9)]
    assert [rung.tag for rung in rungs] == [
        "baseline",
        "exact",
        "refit",
        "approximate",
        "exact",
        "exact",
        "exact",
        "approximate",
    ]
    assert len({rung.adds for rung in rungs}) == 8
    # what quantization approximates, the rungs upon it approximate too
    assert ladder(Work(), stage, "quantized")[5].tag == "approximate"


# what NVML refuses


class FakeNvml:
    """Answers with what it was given; an error is raised."""

    class NVMLError(Exception):
        pass

    class NVMLError_NoPermission(NVMLError):
        pass

    def __init__(self, **answers):
        self.answers = answers

    def nvmlInit(self):
        if "nvmlInit" in self.answers:
            raise self.answers["nvmlInit"]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return uuid

    def __getattr__(self, name):
        answer = self.answers[name]

        def call(_):
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call


@pytest.fixture
def one_gpu(monkeypatch):
    """Torch's second device, as it is numbered among those that are visible."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"uuid-of-{device}"))
    monkeypatch.setattr(accounting._Gpu, "_said", set())


REFUSED = FakeNvml.NVMLError_NoPermission("no permission")
RATES = SimpleNamespace(gpu=50)


@pytest.mark.parametrize(
    ("energy", "limit", "rates", "found"),
    [
        (7000, 300_000, RATES, (1.0, 0.0, "measured")),
        (REFUSED, 300_000, RATES, (1.0, 600.0, "modelled")),
        (REFUSED, REFUSED, RATES, (1.0, None, None)),
        (7000, 300_000, REFUSED, (None, 0.0, "measured")),
    ],
)
@pytest.mark.usefixtures("one_gpu")
def test_what_nvml_refuses_is_left_out_or_modelled_and_said_once(energy, limit, rates, found, monkeypatch, caplog):
    nvml = FakeNvml(
        nvmlDeviceGetTotalEnergyConsumption=energy,
        nvmlDeviceGetEnforcedPowerLimit=limit,
        nvmlDeviceGetUtilizationRates=rates,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    for _ in range(2):
        gpu = accounting._Gpu()
        gpu.start()
        time.sleep(2.5 * accounting.SAMPLE_S)
        assert gpu.stop(2.0) == found
    refused = sum(isinstance(answer, Exception) for answer in (energy, limit, rates))
    assert len(caplog.records) == refused


@pytest.mark.usefixtures("one_gpu")
def test_nvml_is_asked_for_the_device_that_torch_computes_on(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    assert accounting._Gpu()._handle == "GPU-uuid-of-1"  # its index counts devices that torch may not see


@pytest.mark.usefixtures("one_gpu")
def test_nvml_that_cannot_begin_measures_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(nvmlInit=FakeNvml.NVMLError("no driver")))
    gpu = accounting._Gpu()
    gpu.start()
    assert gpu.stop(1.0) == (None, None, None)
    assert "no driver" in caplog.text


# taking turns


def armed(name, tag="exact", seconds=0.0):
    def slice_():
        time.sleep(seconds)
        return Measured([Part("iteration", Cost(1.0, 1.0), 1)], 10)

    return Arm(name, "something", tag, {}, lambda: nullcontext(slice_))


def test_results_are_there_after_each_warm_up_and_opening_is_within_the_time():
    skipped = []
    seen = [
        {name: len(arm["rounds"]) for name, arm in results.items()}
        for results in compare.measure([armed("1 a"), armed("2 b", seconds=0.3), armed("3 c")], 5, 0.2, skipped)
    ]
    assert seen == [{"1 a": 0}, {"1 a": 0, "2 b": 0}, {"1 a": 1, "2 b": 1}]
    assert skipped == ["3 c: not opened, 0 s were over"]


@pytest.mark.parametrize(
    ("carry", "carried"), [("shared", "shared"), ("quantized", "quantized"), ("faster", "quantized")]
)
def test_what_rungs_5_to_7_ask_may_be_chosen(carry, carried, monkeypatch):
    monkeypatch.setattr(compare, "faster", lambda *_: "quantized")
    got, arms = compare.upon(Work(), untimed_stage(), carry, python_envs=False)
    assert got == carried
    by_name = {arm.name: arm for arm in arms}
    assert by_name["7 two groups"].tag == ("exact" if carried == "shared" else "approximate")
    assert ("side row: 7 upon rung 4" in by_name) == (carry == "shared")
    if carry == "shared":
        assert by_name["side row: 7 upon rung 4"].tag == "approximate"
        assert "slower" not in by_name["4 bf16"].adds
    assert [arm.name for arm in arms if compare.is_wanted(arm, [1, 2])] == ["1 first user", "2 careful user"]
    assert "side row: overlapped" in [arm.name for arm in arms if compare.is_wanted(arm, [7])]
