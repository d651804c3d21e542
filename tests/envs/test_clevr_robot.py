"""CLEVR-Robot behind the array lane: its contract row by row, and what a random policy reaches."""

import logging

import numpy as np
import pytest

from lago_fast.envs.clevr_actions import drive
from lago_fast.envs.clevr_goals import FAMILIES, family_goals
from lago_fast.envs.clevr_judges import offsets, satisfied
from lago_fast.envs.clevr_language import family_instructions
from lago_fast.envs.clevr_rewards import REWARDS, Moved
from lago_fast.envs.clevr_robot import ClevrRobotArrayEnv, make_clevr_robot
from lago_fast.envs.vec_env import ReturnNormalizer

HORIZON = 5
FREE = {"terminate_on_success": False}


@pytest.fixture
def make():
    """A factory of environments: four of `real`, of five steps, unless told otherwise."""
    opened = []

    def factory(families=("real",), num_envs=4, **settings):
        settings = {"max_episode_steps": HORIZON, "num_threads": 1, **settings}
        opened.append(ClevrRobotArrayEnv(families, num_envs, **settings))
        return opened[-1]

    yield factory
    for env in opened:
        env.close()


def play(env, steps, seed=0):
    """The reset and the steps of random actions."""
    rng = np.random.default_rng(seed)
    first = env.reset()
    return first, [env.step(rng.integers(40, size=env.num_envs)) for _ in range(steps)]


def assert_same(rows, others):
    for row, other in zip(rows, others, strict=True):
        for column, expected in zip(row, other, strict=True):
            np.testing.assert_array_equal(column, expected)


def goal_of(env, family_index=0):
    """The goals that the instructions of a family's environments say."""
    family = env.families[family_index]
    return family.goals.take((env.instruction_id[family.rows] - family.first_instruction) // family.phrasings)


def test_shapes_dtypes_and_layout(make):
    env = make(["real", "line"], 6)
    first, (row,) = play(env, 1)
    assert env.observation_space.shape == (10,)
    assert env.state_dim == 10
    assert env.action_space.n == 40
    assert env.tasks == ["real", "line"]
    assert env.instructions == family_instructions("real") + family_instructions("line")
    np.testing.assert_array_equal(env.task_id, [0, 0, 0, 1, 1, 1])
    for observation in (first.observation, row.observation):
        assert observation.shape == (6, 10)
        assert observation.dtype == np.float32
    assert row.reward.dtype == row.raw_reward.dtype == np.float32
    assert row.terminated.dtype == row.truncated.dtype == row.valid.dtype == row.success.dtype == bool
    assert row.instruction_id.dtype == env.task_id.dtype == np.int64
    np.testing.assert_array_equal(row.observation, env.ball_xy.reshape(6, 10).astype(np.float32))


def test_autoreset_row_is_invalid_and_ends_carry_the_terminal_observation(make):
    env = make(**FREE)
    first, rows = play(env, 3 * (HORIZON + 1))
    before = first
    for t, row in enumerate(rows, start=1):
        is_reset, is_end = t % (HORIZON + 1) == 0, t % (HORIZON + 1) == HORIZON
        np.testing.assert_array_equal(row.valid, not is_reset)
        np.testing.assert_array_equal(row.truncated, is_end)
        assert not row.terminated.any()
        # a push moves no ball by half a metre; a new scene moves all of them
        shift = np.abs(row.observation - before.observation).reshape(4, 5, 2).max(axis=2)
        assert (shift.min(axis=1) > 0.005).all() if is_reset else (shift < 0.5).all()
        same_words = row.instruction_id == before.instruction_id
        assert not same_words.all() if is_reset else same_words.all()
        if is_reset:
            for column in (row.reward, row.raw_reward, row.success):
                np.testing.assert_array_equal(column, 0)
        before = row
    assert sum(row.valid.sum() for row in rows) == 4 * 3 * HORIZON


def test_velocities_are_carried_from_push_to_push(make):
    env = make(num_envs=2)
    env.reset()
    env.step(np.array([0, 0]))
    (qpos, qvel), step = env.physics_state, env.ball_xy
    assert np.abs(qvel[:, :30]).max() > 0.05
    start = step[:, 1] - [0.0, 0.15]
    expected, _, _ = env.physics.push(qpos, qvel, start, np.array([(0.0, 1.0)] * 2), 40)
    env.step(np.array([9, 9]))
    np.testing.assert_array_equal(env.ball_xy, env.physics.ball_xy(expected))


def test_success_is_the_judges_and_ends_the_episode(make):
    env = make(num_envs=64, max_episode_steps=20)
    env.reset()
    hits = 0
    for t in range(40):
        goals = goal_of(env)  # the goal is that which the instruction says
        row = env.step(np.random.default_rng(t).integers(40, size=64))
        held = satisfied(goals, env.ball_xy).all(axis=1)
        np.testing.assert_array_equal(row.success[row.valid], held[row.valid])
        np.testing.assert_array_equal(row.terminated, row.success)
        assert not (row.terminated & row.truncated).any()
        hits += row.success.sum()
    assert hits > 20


def test_success_ends_nothing_where_that_is_not_wanted(make):
    env = make(num_envs=64, **FREE)
    _, rows = play(env, HORIZON)
    assert any(row.success.any() for row in rows)
    assert not any(row.terminated.any() for row in rows)
    assert rows[-1].truncated.all()


def test_easy_is_over_after_one_step_as_a_termination(make):
    env = make(["easy"], 40)
    env.reset()
    goals = goal_of(env)
    right = 8 * goals.source[:, 0] + np.array([1, 2, 3, 0])[goals.direction[:, 0]]
    row = env.step(right)
    assert row.success.all()
    assert row.terminated.all()
    assert not row.truncated.any()
    assert not env.step(right).valid.any()
    wrong = env.step((8 * goal_of(env).source[:, 0] + 8) % 40)
    assert not wrong.success.any()
    assert wrong.terminated.all()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reward", ["progress", "imagine", "sparse"])
def test_rewards_are_those_of_their_definition(make, family, reward):
    env = make([family], 8, reward=reward)
    env.reset()
    counts = satisfied(goal_of(env), env.ball_xy).sum(axis=1)
    for t in range(HORIZON - 1):
        goals, before = goal_of(env), env.ball_xy
        row = env.step(np.random.default_rng(t).integers(40, size=8))
        after = env.ball_xy
        now = satisfied(goals, after).sum(axis=1)
        moved = Moved(goals, before, after, offsets(goals, before), offsets(goals, after), row.success, now - counts)
        np.testing.assert_array_equal(row.raw_reward, np.where(row.valid, REWARDS[reward](moved), 0).astype(np.float32))
        np.testing.assert_array_equal(row.reward, row.raw_reward)
        counts = satisfied(goal_of(env), env.ball_xy).sum(axis=1)


def test_careless_pushes_end_the_episode_under_kalm_careful(make):
    env = make(num_envs=64, reward="kalm-careful", max_episode_steps=50)
    env.reset()
    stopped = 0
    for t in range(10):
        goals, before = goal_of(env), env.ball_xy
        row = env.step(np.random.default_rng(t).integers(40, size=64))
        shift = np.linalg.norm(env.ball_xy - before, axis=2)
        others = (np.arange(5) != goals.source) & (np.arange(5) != goals.destination)
        careless = (shift * others).max(axis=1) > 0.2
        np.testing.assert_array_equal(row.terminated, row.valid & (row.success | careless))
        stopped += (row.terminated & ~row.success).sum()
    assert stopped > 20


def test_lagged_reward_is_paid_one_step_late(make):
    plain, lagged = (
        play(make(["gather"], 32, reward="imagine", max_episode_steps=40, quirks=quirks, **FREE), 20)[1]
        for quirks in ((), ("lagged-reward",))
    )
    np.testing.assert_array_equal(lagged[0].raw_reward, 0.0)
    for late, before in zip(lagged[1:], plain, strict=False):
        np.testing.assert_array_equal(late.raw_reward, before.raw_reward)
    assert sum(np.abs(row.raw_reward).sum() for row in plain) > 0


def test_stale_first_push_misses_and_the_next_does_not(make):
    right, stale = make(num_envs=16), make(num_envs=16, quirks=("stale-first-push",))
    np.testing.assert_array_equal(right.reset().observation, stale.reset().observation)
    start = stale.ball_xy
    actions = np.zeros(16, np.int64)
    good, bad = right.step(actions).observation, stale.step(actions).observation
    assert (good != bad).any(axis=1).all()
    assert (np.abs(start[:, 0] - bad[:, :2]).max(axis=1) < 1e-6).sum() > 4  # many a push meets no ball
    qpos, qvel = stale.physics_state
    aim = stale.ball_xy[:, 0] - [0.15, 0.0]
    expected, _, _ = stale.physics.push(qpos, qvel, aim, np.array([(1.0, 0.0)] * 16), 40)
    stale.step(actions)
    np.testing.assert_array_equal(stale.ball_xy, stale.physics.ball_xy(expected))


def test_judges_can_be_chosen(make):
    for judge in ("kalm", "clevr", "clevr-polar"):
        env = make(num_envs=64, judge=judge, **FREE)
        env.reset()
        assert not satisfied(goal_of(env), env.ball_xy, judge).any()
        row = env.step(np.arange(64) % 40)
        np.testing.assert_array_equal(row.success, satisfied(goal_of(env), env.ball_xy, judge)[:, 0])
    env = make(["easy"], 64, easy_judge="shift", action_type="discrete")
    env.reset()
    before = env.ball_xy
    shift = env.step(np.arange(64) * 12).observation.reshape(64, 5, 2) - before
    along = (shift * np.array([(0, 1), (-1, 0), (0, -1), (1, 0)])[goal_of(env).direction]).sum(axis=2)
    assert 0 < (along >= 0.15).any(axis=1).sum() < 64


@pytest.mark.parametrize("action_type", ["discrete", "continuous"])
def test_other_action_types_drive_the_agent_as_they_say(make, action_type):
    env = make(num_envs=16, action_type=action_type)
    env.reset()
    rng = np.random.default_rng(0)
    actions = rng.integers(800, size=16) if action_type == "discrete" else rng.uniform(-1, 1.1, (16, 4))
    (qpos, qvel), moves = env.physics_state, drive(action_type, actions, env.ball_xy)
    env.step(actions)
    expected, _, _ = env.physics.push(qpos, qvel, *moves)
    np.testing.assert_array_equal(env.ball_xy, env.physics.ball_xy(expected))


def test_same_seed_same_bits_whatever_the_threads(make):
    families = ["real", "easy", "three-goals"]
    runs = [play(make(families, 12, num_threads=threads, seed=7), 12) for threads in (1, 2, 3)]
    for first, rows in runs[1:]:
        assert_same((first, *rows), (runs[0][0], *runs[0][1]))


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_its_rows_one_by_one(make, count):
    actions = np.random.default_rng(1).integers(40, size=(15, 8))
    batch, part = make(num_envs=8, seed=3), make(num_envs=count, seed=3)
    assert part.env_seeds == batch.env_seeds[:count]
    rows = [batch.reset(), *(batch.step(row) for row in actions)]
    parts = [part.reset(), *(part.step(row[:count]) for row in actions)]
    assert_same(parts, [[column[:count] for column in row] for row in rows])


def test_reseeding_takes_effect_at_the_next_reset(make):
    env, other = make(seed=7), make(seed=8)
    first, rows = play(env, 3)
    assert env.seed(8) == other.env_seeds
    env.step(np.zeros(4, np.int64))
    assert_same(play(env, 3)[1], play(other, 3)[1])
    env.seed(7)
    again, again_rows = play(env, 3)
    assert_same((again, *again_rows), (first, *rows))
    assert (env.reset().observation != first.observation).any(axis=1).all()  # a reset goes on to new episodes


def test_reseeding_leaves_all_before_the_next_reset_as_it_is(make):
    env, same = make(seed=7), make(seed=7)
    env.reset()
    same.reset()
    env.seed(8)
    actions = np.random.default_rng(2).integers(40, size=(2 * HORIZON + 3, 4))  # beyond the next episode's start
    assert_same([env.step(row) for row in actions], [same.step(row) for row in actions])
    assert_same([env.reset_envs(np.array([2]))], [same.reset_envs(np.array([2]))])
    assert_same(play(env, 3)[1], play(make(seed=8), 3)[1])


def test_instruction_row_is_always_appended(make):
    instructions = len(family_instructions("line"))
    table = np.arange(2.0 * instructions).reshape(instructions, 2)
    env = make(["line"], 4, instruction_table=table)
    assert env.observation_space.shape == (12,)
    assert env.state_dim == 10
    first, rows = play(env, HORIZON + 2)
    for row in (first, *rows):
        assert row.observation.dtype == np.float32
        np.testing.assert_array_equal(row.observation[:, 10:], table[row.instruction_id])
        assert all(env.observation_space.contains(seen) for seen in row.observation)


def test_velocities_and_described_objects_are_seen(make):
    env = make(observation="positions_velocities")
    env.reset()
    row = env.step(np.zeros(4, np.int64))
    np.testing.assert_array_equal(row.observation[:, :10], env.ball_xy.reshape(4, 10).astype(np.float32))
    qvel = env.physics_state[1][:, :30].reshape(4, 5, 6)[:, :, :2].reshape(4, 10)
    np.testing.assert_array_equal(row.observation[:, 10:], qvel.astype(np.float32))
    assert env.state_dim == 20

    env = make(observation="order_invariant")
    seen = env.reset().observation.reshape(4, 5, 15)
    assert env.state_dim == 75
    np.testing.assert_array_equal(seen[:, :, :2], env.ball_xy.astype(np.float32))
    np.testing.assert_array_equal(seen[:, :, 5:10], np.tile(np.eye(5), (4, 1, 1)))
    np.testing.assert_array_equal(seen[:, :, 2:].sum(axis=2), 4)


def test_images_are_seen(make):
    env = make(observation="image", renderer="drawing", instruction_table=np.ones((4320, 2)))
    first, rows = play(env, 2)
    assert env.state_dim == 64 * 64 * 3
    np.testing.assert_array_equal(rows[-1].observation[:, -2:], 1.0)
    seen = rows[-1].observation[:, :-2].reshape(4, 64, 64, 3)
    np.testing.assert_allclose(seen * 255, env.render(size=64), atol=1e-4)
    assert (first.observation != rows[-1].observation).any(axis=1).all()


def test_a_diverged_simulation_ends_its_episode_alone(make, caplog):
    env, other = make(num_envs=3), make(num_envs=3)
    for one in (env, other):
        one.reset()
        one.step(np.array([0, 8, 16]))
    qpos, qvel = env.physics_state
    qvel[1, 0] = 1e9
    last = env.set_state(np.array([1]), qpos[[1]], qvel[[1]])
    with caplog.at_level(logging.WARNING, logger="lago_fast"):
        row, expected = (one.step(np.array([1, 9, 17])) for one in (env, other))
    assert "diverged" in caplog.text
    np.testing.assert_array_equal(env.diverged, [0, 1, 0])
    np.testing.assert_array_equal(row.truncated, [False, True, False])
    assert row.reward[1] == 0.0
    assert not row.terminated[1]
    assert not row.success[1]
    np.testing.assert_array_equal(row.observation[1], last[0])
    for column, wanted in zip(row, expected, strict=True):
        np.testing.assert_array_equal(column[[0, 2]], wanted[[0, 2]])
    after = env.step(np.array([1, 9, 17]))
    np.testing.assert_array_equal(after.valid, [True, False, True])
    assert env.step(np.array([1, 9, 17])).valid.all()


def test_partial_reset_makes_the_next_row_valid(make):
    env = make(num_envs=6, **FREE)
    _, rows = play(env, HORIZON)
    assert rows[-1].truncated.all()
    fresh = env.reset_envs(np.array([4, 1]))
    row = env.step(np.zeros(6, np.int64))
    np.testing.assert_array_equal(row.valid, [False, True, False, False, True, False])
    np.testing.assert_array_equal(row.instruction_id[[4, 1]], fresh.instruction_id)
    assert (np.abs(row.observation[[4, 1]] - fresh.observation) < 0.5).all()


def test_returned_arrays_belong_to_the_caller(make):
    env, other = make(seed=5), make(seed=5)
    for one in (env, other):
        one.reset()
    row = env.step(np.zeros(4, np.int64))
    for column in (*row, *env.physics_state, env.ball_xy, env.ended):
        column[:] = 0
    other.step(np.zeros(4, np.int64))
    assert_same([env.step(np.ones(4, np.int64))], [other.step(np.ones(4, np.int64))])


def test_rewards_are_normalised_per_family_over_valid_rows(make):
    env = make(["real", "line"], 4, normalize_reward=True, gamma=0.9)
    reference = ReturnNormalizer(4, 0.9, group=env.task_id)
    _, rows = play(env, 2 * HORIZON + 4)
    for row in rows:
        expected = reference(row.raw_reward, row.valid, row.truncated | row.terminated)
        np.testing.assert_array_equal(row.reward, expected)
    env.reset()
    np.testing.assert_array_equal(env.normalizer.returns, 0.0)


def test_sb3_lane_carries_the_valid_rows_of_the_array_lane(make):
    env = make_clevr_robot(6, ["real", "easy"], max_episode_steps=HORIZON, seed=2, num_threads=1)
    lane = make(["real", "easy"], 6, seed=2)
    observation, expected = env.reset(), lane.reset()
    np.testing.assert_array_equal(observation, expected.observation)
    rng, ends = np.random.default_rng(0), 0
    for _ in range(12):
        actions = rng.integers(40, size=6)
        observation, reward, done, infos = env.step(actions)
        row = lane.step(actions)
        ended = np.flatnonzero(row.terminated | row.truncated)
        np.testing.assert_array_equal(np.flatnonzero(done), ended)
        np.testing.assert_array_equal(reward, row.reward)
        for i in ended:
            np.testing.assert_array_equal(infos[i]["terminal_observation"], row.observation[i])
            assert infos[i]["is_success"] == row.success[i]
            assert infos[i]["TimeLimit.truncated"] == row.truncated[i]
        if len(ended):
            row.observation[ended] = lane.reset_envs(ended).observation
        np.testing.assert_array_equal(observation, row.observation)
        ends += len(ended)
    assert ends > 30
    env.close()


def test_a_stable_baselines3_learner_runs_on_it():
    from stable_baselines3 import PPO

    env = make_clevr_robot(4, ["real"], num_threads=1)
    model = PPO("MlpPolicy", env, n_steps=16, batch_size=16, n_epochs=1, device="cpu").learn(128)
    assert model.num_timesteps == 128
    assert model.policy.action_net.out_features == 40
    env.close()


def test_splits_make_their_families():
    for split, tasks in (("real", ["real"]), ("hard", ["two-goals", "three-goals", "line", "gather"])):
        env = make_clevr_robot(4, split)
        assert env.get_attr("tasks")[0] == tasks
        env.close()


def random_success(family, episodes, num_envs):
    """Share of the first episodes of each environment, all of equal weight, that a random policy solves."""
    env = ClevrRobotArrayEnv([family], num_envs, seed=1)
    rng, won, done = np.random.default_rng(0), 0, np.zeros(num_envs, np.int64)
    env.reset()
    while done.min() < episodes // num_envs:
        row = env.step(rng.integers(40, size=num_envs))
        counts = (row.terminated | row.truncated) & (done < episodes // num_envs)
        won += (row.success & counts).sum()
        done += counts
    env.close()
    return won / episodes


# the published policy's figures, and three standard errors
@pytest.mark.parametrize(
    ("family", "episodes", "low", "high"),
    [
        ("real", 600, 0.30, 0.42),
        ("rephrase", 400, 0.30, 0.42),
        ("easy", 6000, 0.065, 0.085),
        ("two-goals", 400, 0.02, 0.10),
        ("three-goals", 400, 0.0, 0.035),
        ("line", 200, 0.0, 0.01),
        ("gather", 200, 0.0, 0.06),
    ],
)
def test_what_a_random_policy_reaches(family, episodes, low, high):
    assert low <= random_success(family, episodes, 200) <= high
    assert len(family_goals(family).source) >= 1
