"""Loading a model runs no code from the file, and a damaged file is a typed error."""

import base64
import io
import json
import pickle
import random
import resource
import struct
import zipfile
from contextlib import contextmanager

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from lago_fast import FastKLPPO, errors
from lago_fast.algorithms.kl_coefficient import LinearSchedule
from lago_fast.algorithms.safe_load import safe_objects

OPTIONS = {"n_steps": 8, "batch_size": 8, "n_epochs": 1, "device": "cpu"}
BOX = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (36, 36, 1), np.uint8)


class Still(gym.Env):
    def __init__(self, observation_space, action_space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        return self.observation_space.sample(), {}

    def step(self, action):
        del action
        return self.observation_space.sample(), 0.0, False, False, {}


CASES = {
    "box": (BOX, BOX, "MlpPolicy", {}),
    "discrete": (
        BOX,
        spaces.Discrete(3),
        "MlpPolicy",
        {"policy_kwargs": {"activation_fn": torch.nn.ReLU, "optimizer_class": torch.optim.AdamW}},
    ),
    "multi": (spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3), "MlpPolicy", {"clip_range_vf": 0.2}),
    "dict": (spaces.Dict({"a": BOX, "i": IMAGE}), spaces.MultiDiscrete([2, 3]), "MultiInputPolicy", {}),
    "image": (IMAGE, BOX, "CnnPolicy", {"learning_rate": LinearSchedule(1e-3, 1e-4)}),
}


def saved(tmp_path, algorithm=FastKLPPO, case="box", **options):
    observation_space, action_space, policy, own = CASES[case]
    env = make_vec_env(lambda: Still(observation_space, action_space), n_envs=2)
    model = algorithm(policy, env, **{**OPTIONS, **own, **options}).learn(16)
    model.save(tmp_path / "model.zip")
    return model, tmp_path / "model.zip"


def with_entry(path, name, entry):
    """Return the bytes of a model file with one entry of its data replaced."""
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    return with_content(path, "data", json.dumps({**data, name: entry}))


def with_content(path, name, content):
    """Return the bytes of a model file with one of its entries replaced."""
    out = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for item in old.namelist():
            new.writestr(item, content if item == name else old.read(item))
    out.seek(0)
    return out


def pickled(thing, dump=pickle.dumps):
    return {":type:": "?", ":serialized:": base64.b64encode(dump(thing)).decode()}


@pytest.mark.parametrize("algorithm", [PPO, FastKLPPO])
@pytest.mark.parametrize("case", CASES)
def test_what_sb3_and_we_save_is_loaded_whole(tmp_path, algorithm, case):
    model, path = saved(tmp_path, algorithm, case)
    loaded = FastKLPPO.load(path, device="cpu")
    observation = model.get_env().reset()
    expected, got = (m.predict(observation, deterministic=True)[0] for m in (model, loaded))
    np.testing.assert_array_equal(got, expected)
    assert loaded.lr_schedule(0.5) == model.lr_schedule(0.5)
    assert type(loaded.policy.optimizer).__name__ in (type(model.policy.optimizer).__name__, "FlatAdam")
    loaded.set_env(model.get_env())
    loaded.learn(16)


def test_without_a_schedule_of_ours_the_file_names_nothing_of_ours(tmp_path):
    _, path = saved(tmp_path)
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    for name, entry in data.items():
        if isinstance(entry, dict) and ":serialized:" in entry:
            assert b"lago_fast" not in base64.b64decode(entry[":serialized:"]), name


RAN = []


class Runs:
    """A pickle that calls something when it is read."""

    def __init__(self, what, *arguments):
        self.call = what, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "thing",
    [
        Runs(RAN.append, 1),
        Runs(eval, "RAN.append(1)"),
        Runs(__import__, "os"),
        Runs(getattr, np, "load"),
        Runs(np.load, "file.npy", None, True),
        Runs(torch.load, "file.pt"),
        [{"deep": (Runs(print, "here"),)}],
    ],
    ids=lambda thing: str(getattr(thing, "call", "nested"))[:40],
)
def test_a_pickle_that_would_run_code_is_refused_and_named(tmp_path, thing):
    _, path = saved(tmp_path)
    with pytest.raises(errors.UntrustedPickle, match=r"'lr_schedule'.*custom_objects.*trust_pickle"):
        FastKLPPO.load(with_entry(path, "lr_schedule", pickled(thing, cloudpickle.dumps)), device="cpu")
    assert RAN == []


def test_an_object_scalar_of_numpy_cannot_smuggle_a_pickle(tmp_path):
    _, path = saved(tmp_path)
    inner = pickle.dumps(Runs(print, "here"))
    smuggled = Runs(np.float64(1).__reduce__()[0], np.dtype(object), inner)
    with pytest.raises(errors.UntrustedPickle, match="scalar"):
        FastKLPPO.load(with_entry(path, "start_time", pickled(smuggled)), device="cpu")


def test_a_lambda_is_refused_supplied_or_trusted(tmp_path):
    _, path = saved(tmp_path, learning_rate=lambda remaining: 1e-3 * remaining)
    with pytest.raises(errors.UntrustedPickle, match=r"learning_rate|lr_schedule"):
        FastKLPPO.load(path, device="cpu")
    supplied = {"learning_rate": 2e-3, "lr_schedule": LinearSchedule(2e-3)}
    assert FastKLPPO.load(path, device="cpu", custom_objects=supplied).learning_rate == 2e-3
    assert FastKLPPO.load(path, device="cpu", trust_pickle=True).lr_schedule(0.5) == 5e-4


def test_damaged_weights_are_found_by_their_checksum(tmp_path):
    _, path = saved(tmp_path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("policy.pth")
    content[info.header_offset + info.compress_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.CorruptFile, match=r"policy\.pth.*damaged"):
        FastKLPPO.load(path, device="cpu")


def test_weights_that_are_packed_are_not_unpacked(tmp_path):
    _, path = saved(tmp_path)
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", b"0" * 2**20)
    with pytest.raises(errors.CorruptFile, match=r"archive/data/0 of policy\.pth .* packed"):
        FastKLPPO.load(with_content(path, "policy.pth", inner.getvalue()), device="cpu")


def test_weights_of_another_network_make_no_model(tmp_path):
    _, path = saved(tmp_path)
    weights = io.BytesIO()
    torch.save({"another": torch.zeros(3)}, weights)
    with pytest.raises(errors.CorruptFile, match="makes no model"):
        FastKLPPO.load(with_content(path, "policy.pth", weights.getvalue()), device="cpu")


def test_an_env_that_does_not_fit_is_no_fault_of_the_file(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="spaces do not match") as raised:
        FastKLPPO.load(path, env=gym.make("MountainCarContinuous-v0"), device="cpu")
    assert not isinstance(raised.value, errors.LagoError)


def test_a_name_with_a_point_is_found_as_sb3_finds_it(tmp_path):
    model, path = saved(tmp_path)
    path.rename(tmp_path / "best.v2.zip")
    assert FastKLPPO.load(tmp_path / "best.v2", device="cpu").n_steps == model.n_steps


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        FastKLPPO.load(tmp_path / "nothing.zip")


def test_bombs_are_not_unpacked(tmp_path):
    for name, size in (("data", 80 * 2**20), ("policy.pth", 80 * 2**20)):
        bomb = tmp_path / "bomb.zip"
        with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, b"0" * size)
        with pytest.raises(errors.CorruptFile, match="unpacks"):
            safe_objects(bomb, None)


@contextmanager
def little_memory(most_bytes=256 * 2**20):
    """Fail when the block makes this process larger than it ever was, by more than so much."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < most_bytes


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x0f.",  # remembered at place 268,435,455
        b"\x80\x02K\x01p268435455\n.",
        b"\x80\x02" + b"N0" * 600_000 + b"N.",
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",  # an array of 64 GiB
    ],
)
def test_a_pickle_that_asks_for_much_memory_or_time_gets_none(tmp_path, content):
    _, path = saved(tmp_path)
    file = with_entry(path, "clip_range", {":serialized:": base64.b64encode(content).decode()})
    with little_memory(), pytest.raises(errors.CorruptFile, match="clip_range"):
        safe_objects(file, None)


def mutate(content: bytes, rng: random.Random) -> bytes:
    """Return the bytes with a few of them changed, cut out, repeated, or the end cut off."""
    made = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(made))
        kind = rng.randrange(4)
        if kind == 0:
            made[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del made[at : at + rng.randint(1, 64)]
        elif kind == 2:
            made[at:at] = made[at : at + rng.randint(1, 64)]
        else:
            del made[rng.randrange(len(made) // 2, len(made)) :]
        if not made:
            return b""
    return bytes(made)


def test_weights_that_claim_to_begin_beyond_every_file_are_refused(tmp_path):
    _, path = saved(tmp_path)
    inner, about = io.BytesIO(), zipfile.ZipInfo("x")
    about.extra = struct.pack("<HHQ", 1, 8, 2**63)  # where it begins, in the form for large files
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(about, b"")
    content = bytearray(inner.getvalue())
    at = content.index(b"PK\x01\x02") + 42  # of the directory's record the offset, which then stands in `extra`
    content[at : at + 4] = b"\xff" * 4
    with pytest.raises(errors.CorruptFile, match=r"policy\.pth .* no weights of torch"):
        FastKLPPO.load(with_content(path, "policy.pth", bytes(content)), device="cpu")


def mutated_files(path, rng):
    """Yield mutations of the file, and files whose pickles are mutated but whose zip is whole."""
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        data = json.loads(archive.read("data"))
    names = [name for name, entry in data.items() if isinstance(entry, dict) and ":serialized:" in entry]
    while True:
        yield io.BytesIO(mutate(whole, rng))
        name = rng.choice(names)
        content = mutate(base64.b64decode(data[name][":serialized:"]), rng)
        yield with_entry(path, name, {":serialized:": base64.b64encode(content).decode()})


def figures_in(entry, at=()):
    """Yield where the numbers of a JSON value are."""
    if isinstance(entry, bool | int | float):
        yield at
    elif isinstance(entry, dict | list) and ":serialized:" not in entry:
        for key, inner in entry.items() if isinstance(entry, dict) else enumerate(entry):
            yield from figures_in(inner, (*at, key))


def misfitting_files(path, rng):
    """Yield files whose zip and pickles are whole, with mutated weights or one other number in their JSON."""
    with zipfile.ZipFile(path) as archive:
        weights = {name: archive.read(name) for name in archive.namelist() if name.endswith(".pth")}
        data = json.loads(archive.read("data"))
    figures = list(figures_in(data))
    while True:
        name = rng.choice(sorted(weights))
        yield with_content(path, name, mutate(weights[name], rng))
        changed = json.loads(json.dumps(data))
        *outer, last = rng.choice(figures)
        entry = changed
        for key in outer:
            entry = entry[key]
        entry[last] = rng.choice([-1, 0, 1, 7, 1e-9, -2.5, 1e9, None, "x", [3]])
        yield with_content(path, "data", json.dumps(changed).encode())


def test_mutated_models_are_loaded_or_refused_by_a_typed_error(tmp_path, request):
    _, path = saved(tmp_path)
    files = misfitting_files(path, random.Random(0))
    outcomes = {"read": 0, "refused": 0}
    for _ in range(request.config.getoption("--mutations")):
        try:
            FastKLPPO.load(next(files), device="cpu")
            outcomes["read"] += 1
        except errors.LagoError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 0


def test_mutated_files_are_read_or_refused_by_a_typed_error(tmp_path, request):
    _, path = saved(tmp_path)
    rng = random.Random(0)
    files = mutated_files(path, rng)
    outcomes = {"read": 0, "refused": 0}
    with little_memory():
        for _ in range(request.config.getoption("--mutations")):
            try:
                safe_objects(next(files), None)
                outcomes["read"] += 1
            except (errors.CorruptFile, errors.UntrustedPickle):
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 0
