"""What the benches of kernels and priors skip, check and name, before a GPU's minutes are spent on them."""

import importlib.metadata
import subprocess
import sys

import pytest
import torch

from bench import bench_ppo_kl, bench_prior, cases
from bench.gpu_hours.gpu_report import ROOT
from bench.gpu_hours.work import Work, shaped
from lago_fast.errors import HashMismatch
from lago_fast.priors import backbone as backbones
from lago_fast.priors.latent_action import LatentActionPrior

FULL = 1048576


def collected(*words):
    command = [sys.executable, "-m", "pytest", "--co", "-q", "bench/bench_ppo_kl.py", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.slow
def test_the_cells_that_are_judged_come_first_with_all_implementations():
    names = collected()
    heads = [name.partition("[")[0] for name in names]
    assert list(dict.fromkeys(heads))[:3] == ["test_at_full_size", "test_by_graph_replay", "test_ppo_kl_categorical"]
    assert all("categorical-1048576-40" in name for name in names[:10])
    assert all("gaussian-1048576-4" in name for name in names[10:20])
    assert {"cuda", "triton", "reference", "inductor"} < {name.split("-")[3] for name in names[:10]}
    assert "test_by_graph_replay[categorical-32768-4-cuda]" in names
    # as the report runs them: inductor compiles for seconds, and is asked where it is judged
    asked = collected("-k", "full_size or not inductor")
    assert {name.partition("[")[0] for name in asked if "inductor" in name} == {"test_at_full_size"}
    assert len(asked) > 100


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(cases, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(cases, "require", lambda *_: None)
    monkeypatch.setattr(cases, "free_bytes", lambda: 70e9)


def test_what_fits_a_gpu_is_not_skipped(on_a_gpu):
    del on_a_gpu
    for kind, rows, width in (*bench_ppo_kl.FULL_SIZE, *bench_ppo_kl.REPLAYED, ("categorical", 2048, 32000)):
        bench_ppo_kl.skip_unless_it_fits(kind, "cuda", rows, width)


@pytest.mark.parametrize(("rows", "why"), [(32768, "2,048 stand for them"), (FULL, "2,048 stand for them")])
def test_wide_rows_are_few(rows, why, on_a_gpu):
    del on_a_gpu
    with pytest.raises(pytest.skip.Exception, match=why):
        bench_ppo_kl.skip_unless_it_fits("categorical", "cuda", rows, 32000)


def test_what_does_not_fit_is_skipped_with_the_figure(on_a_gpu, monkeypatch):
    del on_a_gpu
    monkeypatch.setattr(cases, "free_bytes", lambda: 1e9)
    with pytest.raises(pytest.skip.Exception, match=r"need about 1.7 GB, 1.0 are free"):
        bench_ppo_kl.skip_unless_it_fits("categorical", "cuda", FULL, 40)


def test_inputs_are_drawn_on_the_device(monkeypatch):
    real, asked = torch.Generator, []
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": asked.append(device) or real("cpu"))
    for draw in (cases.categorical, cases.gaussian):
        placed = {t.device for t in draw(4, 3) if t is not None}
        assert placed == {cases.DEVICE}
    assert asked == [cases.DEVICE] * 2


def test_a_gradient_of_a_million_rows_is_held_to_its_own_size():
    expected = torch.randn(1000) / FULL
    cases.check([expected.clone()], [expected])
    with pytest.raises(AssertionError):
        cases.check([1.01 * expected], [expected])
    with pytest.raises(AssertionError):
        cases.check([torch.zeros(1000)], [expected])
    half = (torch.randn(1000) / 2048).bfloat16()
    with pytest.raises(AssertionError):
        cases.check([torch.zeros(1000).bfloat16()], [half])


def test_a_package_that_is_not_installed_has_no_version():
    assert bench_prior.version_of("torch") == importlib.metadata.version("torch")
    assert bench_prior.version_of("no-package-of-this-name") is None


def test_a_shape_is_drawn_where_it_is_asked_and_never_hashed(monkeypatch):
    hashed = []
    monkeypatch.setattr(backbones, "hash_weights", lambda *_: hashed.append("file"))
    backbone = bench_prior.drawn_backbone(bench_prior.folder_of("llama-256x6"), torch.device("cpu"))
    assert next(backbone.model.parameters()).device.type == "cpu"
    assert backbone.sha256 == "not hashed: llama-256x6 drawn on cpu with seed 0"
    assert not hashed
    again = bench_prior.drawn_backbone(bench_prior.folder_of("llama-256x6"), torch.device("cpu"))
    for a, b in zip(backbone.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_ladders_forms_stand_on_drawn_weights_and_are_refused_when_read_back(tmp_path):
    work = Work(slice_rows=8)
    stage = shaped(work, bench_prior.folder_of("llama-256x6"), "bf16")
    assert stage.prompt.prior.reference["sha256"].startswith("not hashed")
    assert stage.shared.prior.transformer is stage.prompt.prior.transformer
    assert stage.shared_is == "exact"
    stage.prompt.prior.save(tmp_path / "prior")
    with pytest.raises(HashMismatch):
        LatentActionPrior.load(tmp_path / "prior")
