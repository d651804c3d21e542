"""The bare pool is EnvPool's own, column by column, and refuses what its Python layer refuses."""

import numpy as np
import pytest

pytest.importorskip("envpool", reason="Meta-World needs the extra 'envs'")
import envpool

from lago_fast.envs.bare_pool import BarePool


def pool():
    return envpool.make_gymnasium(
        "MetaWorld/Reach-v3", num_envs=3, num_threads=1, env_seed=[5, 6, 7], partially_observable=False,
        max_episode_steps=4,
    )  # fmt: skip


def assert_same(got, expected):
    for ours, theirs in zip(got[:-1], expected[:-1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == theirs.dtype
    for name in ("env_id", "success"):
        np.testing.assert_array_equal(got[-1][name], expected[-1][name])


def test_its_columns_are_those_of_envpool():
    theirs = pool()
    ours = BarePool(pool())
    everyone = np.arange(3, dtype=np.int32)
    for one in (ours, theirs):
        one._reset(everyone)
    assert_same(ours.recv(reset=True), theirs.recv(reset=True))
    rng = np.random.default_rng(0)
    ended = 0
    for t in range(12):
        ids = None if t % 3 else np.array([2, 0])  # as int64, which numpy's searches return
        actions = rng.uniform(-1, 1, (3 if ids is None else 2, 4)).astype(np.float32)
        for one in (ours, theirs):
            one.send(actions, ids)
        got, expected = ours.recv(), theirs.recv()
        assert_same(got, expected)
        ended += got[3].sum()
    assert ended > 0
