"""EnvPool's Meta-World behind the array lane: its contract, row by row.

In Meta-World's observation the entries 18 to 36 repeat the first 18 of the step before, and at a reset the
reset's own: this tells, independently of every flag, to which episode an observation belongs.
"""

import numpy as np
import pytest

from lago_fast.envs.experts import make_expert
from lago_fast.envs.metaworld import MetaworldArrayEnv
from lago_fast.envs.metaworld_tasks import task_phrasings

TASKS = ["drawer-open", "push"]
HORIZON = 5  # of the environments that the fixture `make` makes


def play(env, steps, *, seed=0, policy=None):
    """Observations and steps of a run whose actions are random, or the policy's on the states."""
    rng = np.random.default_rng(seed)
    first = env.reset()
    rows, states = [], first.observation[:, :39]
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (env.num_envs, 4))
        rows.append(env.step(actions if policy is None else policy(states, actions)))
        states = rows[-1].observation[:, :39]
    return first, rows


def continues(now, before):
    """[N] bool: the frame before in `now` is the frame of `before`."""
    return (now[:, 18:36] == before[:, :18]).all(axis=1)


def starts(observation):
    """[N] bool: the frame before is the frame itself, as at a reset."""
    return (observation[:, 18:36] == observation[:, :18]).all(axis=1)


def test_autoreset_row_is_invalid_and_ends_carry_the_terminal_observation(make):
    env = make()
    first, rows = play(env, 3 * (HORIZON + 1))
    observations = [first.observation, *(row.observation for row in rows)]
    assert starts(first.observation).all()
    for t, row in enumerate(rows, start=1):
        is_reset, is_end = t % (HORIZON + 1) == 0, t % (HORIZON + 1) == HORIZON
        np.testing.assert_array_equal(row.valid, not is_reset)
        np.testing.assert_array_equal(row.truncated, is_end)
        assert not row.terminated.any()
        if is_reset:
            assert starts(row.observation).all()
            np.testing.assert_array_equal(row.reward, 0.0)
            np.testing.assert_array_equal(row.raw_reward, 0.0)
            assert not row.success.any()
        else:
            assert continues(row.observation, observations[t - 1]).all()
            assert (row.raw_reward > 0).all()
            np.testing.assert_array_equal(row.reward, row.raw_reward)


def test_new_episode_differs_from_the_last(make):
    first, rows = play(make(), HORIZON + 1)
    assert (first.observation != rows[-1].observation).any(axis=1).all()


def test_step_count_leaves_out_invalid_rows(make):
    env = make(num_envs=6)
    _, rows = play(env, 2 * HORIZON + 2)
    assert sum(row.valid.sum() for row in rows) == 6 * 2 * HORIZON


def test_shapes_dtypes_and_layout(make):
    env = make(num_envs=6)
    first = env.reset()
    row = env.step(np.zeros((6, 4)))
    assert env.observation_space.shape == (39,)
    assert env.state_dim == 39
    assert env.action_space.shape == (4,)
    assert env.tasks == TASKS
    np.testing.assert_array_equal(env.task_id, [0, 0, 0, 1, 1, 1])
    for observation in (first.observation, row.observation):
        assert observation.shape == (6, 39)
        assert observation.dtype == np.float32
    assert row.reward.dtype == row.raw_reward.dtype == np.float32
    assert row.terminated.dtype == row.truncated.dtype == row.valid.dtype == row.success.dtype == bool
    assert row.instruction_id.dtype == env.task_id.dtype == np.int64


def test_goal_is_visible(make):
    first = make().reset()
    assert (np.abs(first.observation[:, 36:39]).sum(axis=1) > 0.1).all()


def test_returned_arrays_belong_to_the_caller(make):
    env = make()
    first = env.reset()
    kept, row = first.observation.copy(), env.step(np.zeros((4, 4)))
    kept_row = [column.copy() for column in row]
    env.step(np.ones((4, 4)))
    np.testing.assert_array_equal(first.observation, kept)
    for column, copy in zip(row, kept_row, strict=True):
        np.testing.assert_array_equal(column, copy)
    row.observation[:] = np.nan  # what a caller does to its arrays must not reach the simulators
    row.instruction_id[:] = -1
    again = env.step(np.zeros((4, 4)))
    assert np.isfinite(again.observation).all()
    assert (again.instruction_id >= 0).all()


def test_same_seed_same_bits_whatever_the_threads(make):
    runs = [play(make(num_envs=6, num_threads=threads, seed=7), 8) for threads in (1, 3, 1)]
    for first, rows in runs[1:]:
        for ours, theirs in zip((first, *rows), (runs[0][0], *runs[0][1]), strict=True):
            for column, other in zip(ours, theirs, strict=True):
                np.testing.assert_array_equal(column, other)


def test_seeds_and_environments_differ(make):
    seven, eight = (make(num_envs=8, seed=seed).reset().observation for seed in (7, 8))
    assert (seven != eight).any(axis=1).all()
    for task in (slice(0, 4), slice(4, 8)):
        assert len(np.unique(seven[task], axis=0)) == 4


def test_reseeding_takes_effect_at_the_next_reset(make):
    env, other = make(seed=7), make(seed=8)
    first, rows = play(env, 3)
    assert env.seed(8) == other.env_seeds
    expected_first, expected_rows = play(other, 3)
    got_first, got_rows = play(env, 3)
    np.testing.assert_array_equal(got_first.observation, expected_first.observation)
    np.testing.assert_array_equal(got_rows[-1].observation, expected_rows[-1].observation)
    assert env.seed(7) == make(seed=7).env_seeds
    again_first, again_rows = play(env, 3)
    np.testing.assert_array_equal(again_first.observation, first.observation)
    np.testing.assert_array_equal(again_rows[-1].observation, rows[-1].observation)


def test_reseeding_leaves_all_before_the_next_reset_as_it_is(make):
    runs = []
    for reseed in (False, True):
        env = make(["push", "hammer"], seed=7, max_episode_steps=2)
        env.reset()
        if reseed:
            env.seed(8)
        rows = [env.step(np.zeros((4, 4))) for _ in range(4)]
        runs.append([*rows, env.reset_envs(np.array([1, 2]))])
    for ours, theirs in zip(*runs, strict=True):
        for column, other in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(column, other)


def test_instructions_belong_to_their_task_and_are_seeded(make):
    drawn = []
    for seed in (1, 1, 2):
        env = make(num_envs=16, seed=seed, max_episode_steps=1)
        ids = [env.reset().instruction_id]
        for _ in range(6):
            ids.append(env.step(np.zeros((16, 4))).instruction_id)
        drawn.append(np.stack(ids))
    assert (drawn[0] == drawn[1]).all()
    assert (drawn[0] != drawn[2]).any()
    phrasings = task_phrasings()
    assert env.instructions == phrasings[TASKS[0]] + phrasings[TASKS[1]]
    for i, task in enumerate(env.task_id):
        assert {env.instructions[k] for k in drawn[0][:, i]} <= set(phrasings[TASKS[task]])
    assert len(np.unique(drawn[0])) > len(phrasings[TASKS[0]])
    # an instruction lasts for an episode: here the end row keeps it and the row after may change it
    assert (drawn[0][0] == drawn[0][1]).all()
    assert (drawn[0][1] != drawn[0][2]).any()


def test_first_phrasing_only(make):
    env = make(phrasings="first")
    assert env.instructions == ["open the drawer", "push the puck to the goal"]
    np.testing.assert_array_equal(env.reset().instruction_id, env.task_id)


def test_instruction_row_is_appended_for_several_tasks_only(make):
    table = np.arange(6, dtype=np.float64).reshape(2, 3)
    env = make(phrasings="first", instruction_table=table)
    assert env.observation_space.shape == (42,)
    first, rows = play(env, HORIZON + 1)
    for observation in (first.observation, *(row.observation for row in rows)):
        assert observation.dtype == np.float32
        np.testing.assert_array_equal(observation[:, 39:], table[env.task_id])
    alone = make(["push"], phrasings="first", instruction_table=table[:1])
    assert alone.observation_space.shape == (39,)
    assert alone.reset().observation.shape == (4, 39)


def test_actions_are_clipped_to_the_box(make):
    wild = play(make(), 3, policy=lambda _states, actions: 50.0 * np.sign(actions))[1]
    inside = play(make(), 3, policy=lambda _states, actions: np.sign(actions))[1]
    np.testing.assert_array_equal(wild[-1].observation, inside[-1].observation)


def expert_in_first(task):
    """The expert acts in environment 0 alone; the others keep their random actions."""
    expert = make_expert(task)

    def policy(states, actions):
        actions[0] = expert(states[:1])[0]
        return actions

    return policy


@pytest.fixture(scope="module")
def drawer_runs():
    """The same seed and actions with and without an end at success; only environment 0 succeeds."""
    runs = {}
    for name, settings in {
        "free": {},
        "ends": {"terminate_on_success": True},
        "pays": {"terminate_on_success": True, "success_reward": 10.0},
    }.items():
        env = MetaworldArrayEnv(["drawer-open"], 4, seed=3, max_episode_steps=120, **settings)
        runs[name] = play(env, 119, policy=expert_in_first("drawer-open"))
        env.close()
    return runs


def test_success_ends_like_a_truncation(drawer_runs):
    free, ends = drawer_runs["free"][1], drawer_runs["ends"][1]
    hit = next(t for t, row in enumerate(free) if row.success[0])
    assert not any(row.truncated.any() for row in free)
    for t in range(hit + 1):
        np.testing.assert_array_equal(ends[t].observation, free[t].observation)
        np.testing.assert_array_equal(ends[t].reward, free[t].reward)
        assert ends[t].valid.all()
    np.testing.assert_array_equal(ends[hit].truncated, [True, False, False, False])
    assert not ends[hit].terminated.any()
    after = ends[hit + 1]
    np.testing.assert_array_equal(after.valid, [False, True, True, True])
    assert starts(after.observation)[0]
    assert after.reward[0] == after.raw_reward[0] == 0.0
    assert not after.success[0]
    assert not after.truncated.any()
    assert continues(ends[hit + 2].observation, after.observation).all()
    assert ends[hit + 2].valid.all()


def test_success_elsewhere_leaves_an_environment_alone(drawer_runs):
    assert not any(row.success[1:].any() for row in drawer_runs["free"][1])
    for row, other in zip(drawer_runs["free"][1], drawer_runs["ends"][1], strict=True):
        np.testing.assert_array_equal(row.observation[1:], other.observation[1:])
        np.testing.assert_array_equal(row.raw_reward[1:], other.raw_reward[1:])
        assert other.valid[1:].all()


def test_paid_success_is_a_termination(drawer_runs):
    ends, pays = drawer_runs["ends"][1], drawer_runs["pays"][1]
    hit = next(t for t, row in enumerate(ends) if row.success[0])
    np.testing.assert_array_equal(pays[hit].terminated, [True, False, False, False])
    assert not pays[hit].truncated.any()
    assert pays[hit].reward[0] == ends[hit].reward[0] + np.float32(10.0)
    for row, other in zip(pays, ends, strict=True):
        np.testing.assert_array_equal(row.raw_reward, other.raw_reward)
        np.testing.assert_array_equal(row.observation, other.observation)
        np.testing.assert_array_equal(row.valid, other.valid)


def test_success_at_the_horizon_resets_once(make):
    expert = make_expert("reach")
    env = make(["reach"], 1, seed=1, max_episode_steps=100, terminate_on_success=True)
    _, rows = play(env, 99, policy=lambda states, _actions: expert(states))
    hit = next(t for t, row in enumerate(rows) if row.success[0])
    short = make(["reach"], 1, seed=1, max_episode_steps=hit + 1, terminate_on_success=True)
    _, rows = play(short, hit + 3, policy=lambda states, _actions: expert(states))
    np.testing.assert_array_equal(rows[hit].success, True)
    np.testing.assert_array_equal(rows[hit].truncated, True)
    np.testing.assert_array_equal(rows[hit + 1].valid, False)
    np.testing.assert_array_equal(rows[hit + 2].valid, True)
    assert continues(rows[hit + 2].observation, rows[hit + 1].observation).all()
    paid = make(["reach"], 1, seed=1, max_episode_steps=hit + 1, terminate_on_success=True, success_reward=1.0)
    end = play(paid, hit + 1, policy=lambda states, _actions: expert(states))[1][-1]
    assert (end.terminated[0], end.truncated[0]) == (True, False)


def test_partial_reset_makes_the_next_row_valid(make):
    env = make(num_envs=6)
    _, rows = play(env, HORIZON)
    assert rows[-1].truncated.all()
    fresh = env.reset_envs(np.array([4, 1]))
    assert starts(fresh.observation).all()
    row = env.step(np.zeros((6, 4)))
    np.testing.assert_array_equal(row.valid, [False, True, False, False, True, False])
    assert continues(row.observation[[4, 1]], fresh.observation).all()
    np.testing.assert_array_equal(row.instruction_id[[4, 1]], fresh.instruction_id)


def test_rewards_are_normalised_per_task_over_valid_rows(make):
    from lago_fast.envs.vec_env import ReturnNormalizer

    env = make(normalize_reward=True, gamma=0.9)
    reference = ReturnNormalizer(4, 0.9, group=env.task_id)
    _, rows = play(env, 2 * HORIZON + 4)  # stops amid an episode, whose running return a reset must drop
    for row in rows:
        expected = reference(row.raw_reward, row.valid, row.truncated | row.terminated)
        np.testing.assert_array_equal(row.reward, expected)
    assert env.normalizer.state_dict() == reference.state_dict()
    state = env.normalizer.state_dict()
    env.reset()
    assert env.normalizer.state_dict() == state
    np.testing.assert_array_equal(env.normalizer.returns, 0.0)


@pytest.mark.parametrize("task", sorted(task_phrasings()))
def test_goals_stay_on_the_table_from_episode_to_episode(task, make):
    env = make([task], 2, max_episode_steps=1)
    goals = [env.reset().observation[:, 36:39]]
    for _ in range(4):
        goals.append(env.step(np.zeros((2, 4))).observation[:, 36:39])
    low, high = np.min(goals, axis=(0, 1)), np.max(goals, axis=(0, 1))
    # the space of the hand, and a margin for goals inside a wall or under the table
    assert (low >= np.array([-0.55, 0.35, -0.2])).all()
    assert (high <= np.array([0.55, 1.05, 0.55])).all()
    assert (high - low <= np.array([0.5, 0.4, 0.3])).all()


def test_tasks_with_fresh_simulators_keep_the_contract(make):
    settings = {"tasks": ["shelf-place", "push"], "num_envs": 6, "seed": 2}
    env = make(**settings)
    first, rows = play(env, 2 * HORIZON + 1)
    before = first.observation
    for t, row in enumerate(rows, start=1):
        is_reset = t % (HORIZON + 1) == 0
        np.testing.assert_array_equal(row.valid, not is_reset)
        np.testing.assert_array_equal(row.truncated, t % (HORIZON + 1) == HORIZON)
        follows = starts(row.observation) if is_reset else continues(row.observation, before)
        assert follows.all()
        before = row.observation
    assert len(np.unique(rows[HORIZON].observation[:3, 36:39], axis=0)) == 3
    assert (rows[HORIZON].observation[:3] != first.observation[:3]).any(axis=1).all()
    again = play(make(**settings), 2 * HORIZON + 1)[1]
    np.testing.assert_array_equal(again[-1].observation, rows[-1].observation)
    fresh = env.reset_envs(np.array([1, 4]))
    row = env.step(np.zeros((6, 4)))
    np.testing.assert_array_equal(row.valid, [False, True, False, False, True, False])
    assert continues(row.observation[[1, 4]], fresh.observation).all()


def test_late_episodes_of_shelf_place_can_be_solved():
    expert = make_expert("shelf-place")
    env = MetaworldArrayEnv(["shelf-place"], 2, seed=0, max_episode_steps=150)
    states, solved = env.reset().observation, np.zeros((2, 2), bool)
    for t in range(301):
        row = env.step(expert(states))
        states = row.observation
        solved[t // 151] |= row.success
    env.close()
    assert solved.all()
