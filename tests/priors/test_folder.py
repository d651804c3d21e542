"""Prior folders: what was altered is refused by a typed error, also by one who puts the checksums right again."""

import errno
import hashlib
import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lago_fast import errors
from lago_fast.priors import backbone as backbones
from lago_fast.priors.amortised import AmortisedPrior
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.student import StudentConfig
from tests.algorithms.test_safe_load import little_memory, mutate

LOADERS = {"prior": LatentActionPrior, "student": AmortisedPrior}


@pytest.fixture(scope="module")
def folders(encoder, clones, texts, tmp_path_factory):
    exact = fit_prior(*clones, texts, backbone=encoder, epochs=1, batch_size=64)
    config = StudentConfig(hidden=8, instruction_width=4, live_rows=64, audit_rows=32, audit_window=64)
    student = AmortisedPrior(exact, config).fit(clones.states[:64], clones.instruction_id[:64], epochs=1)
    root = tmp_path_factory.mktemp("priors")
    return {"prior": exact.save(root / "prior"), "student": student.save(root / "student")}


def sealed(folder, change):
    """Change a config, and put its checksum right."""
    config = json.loads((folder / "config.json").read_text())
    del config["sha256"]
    change(config)
    config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "exact/../../secret.safetensors"])
def test_names_that_lead_out_of_the_folder_are_refused(folders, tmp_path, name):
    copy = shutil.copytree(folders["prior"], tmp_path / "copy")
    (tmp_path / "secret.safetensors").write_bytes(b"x")
    digest = hashlib.sha256(b"x").hexdigest()
    sealed(copy, lambda config: config["files"].update({name: digest}))
    with pytest.raises(errors.HashMismatch, match="missing or was altered"):
        LatentActionPrior.load(copy)


def test_a_file_that_no_config_names_is_refused(folders, tmp_path):
    copy = shutil.copytree(folders["student"], tmp_path / "copy")
    sealed(copy, lambda config: config["files"].pop("student.safetensors"))
    with pytest.raises(errors.HashMismatch, match="not named"):
        AmortisedPrior.load(copy)


def test_a_prior_of_before_the_checksum_is_read(folders, tmp_path):
    copy = shutil.copytree(folders["prior"], tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    LatentActionPrior.load(copy)


@pytest.mark.parametrize("fails", [1, 2])
def test_a_prior_that_cannot_be_replaced_stays_in_its_place(folders, tmp_path, monkeypatch, fails):
    folder = Path(shutil.copytree(folders["prior"], tmp_path / "prior"))
    prior, replace_, calls = LatentActionPrior.load(folder), os.replace, []

    def full_disk(source, target):
        calls.append(target)
        if len(calls) == fails:
            raise OSError(errno.ENOSPC, "no space left on device")
        replace_(source, target)

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        prior.save(folder, overwrite=True)
    assert LatentActionPrior.load(folder).digest == prior.digest
    assert list(tmp_path.iterdir()) == [folder], "nothing is left beside it"
    assert prior.save(folder, overwrite=True) == folder
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("change", [{"layers": True}, {"lora_rank": 1.5}, {"state_dim": "3"}, {"head_hidden": [8]}])
def test_numbers_that_are_no_whole_ones_are_refused(change):
    with pytest.raises(errors.UnsupportedArgument, match=f"{next(iter(change))}: .*whole number"):
        replace(PriorConfig("gaussian", 3, 1, (-1.0,), (1.0,)), **change)


@pytest.mark.parametrize(
    "change", [{"state_dim": 10**9}, {"action_dim": 0}, {"head_hidden": 10**8}, {"head_hidden": 0}, {"lora_rank": -1}]
)
def test_widths_that_no_memory_holds_are_refused(change):
    with pytest.raises(errors.UnsupportedArgument, match="lie in 1"):
        replace(PriorConfig("gaussian", 3, 1, (-1.0,), (1.0,)), **change)
    with pytest.raises(errors.UnsupportedArgument, match="at most"):
        StudentConfig(hidden=10**6)


STRANGE = (None, True, -1, 0, 10**9, 1e308, float("nan"), "", "x", [], [1], {}, {"a": 1})


def changed_leaf(value, rng):
    """Return a JSON value with one thing somewhere in it replaced or left out."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.1 else {**rest, key: changed_leaf(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.7:
        i = rng.randrange(len(value))
        return [*value[:i], changed_leaf(value[i], rng), *value[i + 1 :]]
    return rng.choice(STRANGE)


def damaged(folder, rng):
    """Alter one file of a folder; half of the time as one would who knows of the checksums."""
    kind = rng.randrange(4)
    if kind == 0:
        path = folder / rng.choice(["config.json", "metrics.json"])
        path.write_bytes(mutate(path.read_bytes(), rng))
    elif kind == 1:
        path = rng.choice(sorted(folder.rglob("*.safetensors")))
        path.write_bytes(mutate(path.read_bytes(), rng))
    elif kind == 2:
        config = json.loads((folder / "config.json").read_text())
        del config["sha256"]
        config = changed_leaf(config, rng)
        if isinstance(config, dict):
            config["sha256"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        (folder / "config.json").write_text(json.dumps(config))
    else:
        path = rng.choice(sorted(folder.glob("*.safetensors")))
        path.write_bytes(mutate(path.read_bytes(), rng))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        sealed(folder, lambda config: config["files"].update({path.name: digest}))


@pytest.mark.parametrize("what", LOADERS)
def test_mutated_priors_are_refused_by_a_typed_error(what, folders, encoder, tmp_path, request, monkeypatch):
    # the language model is no part of the folder, and reading it takes most of the time
    known = backbones.find_backbone(encoder)

    def find(name, *, expected_sha256="", **about):
        if name != encoder or about["random_init"] or about["revision"]:
            raise errors.BackboneUnavailable(f"backbone: {name}")
        if expected_sha256 != known.sha256:
            raise errors.HashMismatch("backbone: another one")
        return known

    monkeypatch.setattr(backbones, "find_backbone", find)
    originals = {p: p.read_bytes() for p in folders[what].rglob("*") if p.is_file()}
    copy = shutil.copytree(folders[what], tmp_path / "copy")
    state, ids = torch.zeros(3, 6), torch.arange(3)
    expected = LOADERS[what].load(copy).exact if what == "student" else LOADERS[what].load(copy)
    rng, outcomes = random.Random(0), {"read": 0, "refused": 0}
    with little_memory():
        for _ in range(request.config.getoption("--mutations")):
            damaged(copy, rng)
            try:
                loaded = LOADERS[what].load(copy)
                outcomes["read"] += 1
            except errors.LagoError:
                outcomes["refused"] += 1
            else:  # then the exact prior is the one that was saved
                exact = loaded.exact if what == "student" else loaded
                assert torch.equal(exact.query(state, ids).mean, expected.query(state, ids).mean)
            for path, content in originals.items():
                (copy / path.relative_to(folders[what])).write_bytes(content)
    assert outcomes["refused"] > 2 * outcomes["read"]
