"""The kitchen: hand-computed turns and rewards, what cannot be seen, and the expert."""

import numpy as np
import pytest

from lago_fast.envs.overcooked import make_overcooked
from lago_fast.envs.overcooked_kitchen import HAND, HOME, PLATED
from lago_fast.envs.overcooked_texts import ACTIONS
from lago_fast.errors import UnsupportedArgument

TOMATO, LETTUCE, ONION, PLATE, FIRST, SECOND, CHOP, DELIVER = ACTIONS


class Cook:
    """One kitchen, told in words what to do."""

    def __init__(self, task="tomato-salad", **settings):
        self.env = make_overcooked(1, task, **settings)
        self.state = self.env.reset(0)

    def do(self, *actions):
        """Take the actions; return their rewards, in thousandths."""
        rewards = []
        for action in actions:
            self.step = self.env.step(np.array([self.state.admissible[0].index(action)]))
            self.state = self.step.state
            rewards.append(round(1000 * float(self.step.reward[0])))
        return rewards

    @property
    def text(self):
        return self.state.observation[0]


def test_a_tomato_salad():
    cook = Cook()
    assert cook.do(TOMATO, FIRST, CHOP, CHOP, CHOP) == [-1, -1, -1, -1, 199]
    assert cook.do(PLATE, TOMATO) == [-1, 199]
    assert "You hold the plate with chopped tomato." in cook.text
    assert cook.do(DELIVER) == [999]
    assert cook.step.terminated[0]
    assert cook.step.success[0]
    assert cook.state.admissible == [()]


def test_a_tomato_and_lettuce_salad():
    cook = Cook("tomato-lettuce-salad")
    assert sum(cook.do(TOMATO, FIRST, CHOP, CHOP, CHOP, LETTUCE, SECOND, CHOP, CHOP, CHOP)) == 390
    assert cook.do(PLATE, FIRST, SECOND, DELIVER) == [-1, 199, 199, 999]


def test_half_a_salad_is_a_wrong_delivery_and_goes_back():
    cook = Cook("tomato-lettuce-salad")
    cook.do(TOMATO, FIRST, CHOP, CHOP, CHOP, PLATE, TOMATO)
    assert cook.do(DELIVER) == [-101]
    assert not cook.step.terminated[0]
    assert cook.env.where[0].tolist() == [HOME, HOME, HOME]
    assert cook.env.chops[0].tolist() == [0, 0, 0]
    assert cook.env.plate[0] == HOME
    # a sub-task rewards once in an episode
    assert cook.do(TOMATO, FIRST, CHOP, CHOP, CHOP, PLATE, TOMATO) == [-1] * 7


def test_an_onion_rewards_nothing_and_spoils_the_plate():
    cook = Cook()
    assert cook.do(ONION, SECOND, CHOP, CHOP, CHOP, PLATE, ONION) == [-1] * 7
    cook.do(SECOND, TOMATO, FIRST)  # the plate is put down; the board is free
    assert cook.env.plate[0] == 5
    assert cook.do(CHOP, CHOP, CHOP, PLATE, TOMATO, DELIVER) == [-1, -1, 199, -1, 199, -101]


def test_boards_hold_one_thing():
    cook = Cook()
    cook.do(TOMATO, FIRST, LETTUCE, FIRST)
    assert cook.env.where[0].tolist() == [4, HAND, HOME]  # the lettuce is still in the hand
    cook.do(SECOND, PLATE, FIRST)  # what is not chopped does not go onto the plate, and the plate finds no room
    assert cook.env.where[0].tolist() == [4, 5, HOME]
    assert cook.env.plate[0] == HAND


def test_what_is_chopped_can_be_brought_to_the_plate():
    cook = Cook()
    cook.do(PLATE, SECOND, TOMATO, FIRST, CHOP, CHOP, CHOP, TOMATO)
    assert "You hold the chopped tomato." in cook.text
    assert PLATE in cook.state.admissible[0]
    assert cook.do(SECOND) == [199]  # where the plate stands
    assert cook.env.where[0, 0] == PLATED
    assert cook.env.plate[0] == 5
    assert cook.do(TOMATO, DELIVER) == [-1, 999]  # taken with its plate
    again = Cook()
    again.do(TOMATO, FIRST, CHOP, CHOP, CHOP, TOMATO)
    assert again.do(PLATE) == [199]
    assert "You hold the plate with chopped tomato." in again.text


def test_admissible_actions_follow_the_hands():
    cook = Cook()
    assert cook.state.admissible[0] == (TOMATO, LETTUCE, ONION, PLATE, FIRST, SECOND)
    cook.do(TOMATO)
    assert cook.state.admissible[0] == (FIRST, SECOND, DELIVER)
    cook.do(FIRST)
    assert cook.state.admissible[0] == (TOMATO, LETTUCE, ONION, PLATE, FIRST, SECOND, CHOP)
    cook.do(CHOP, CHOP, CHOP, PLATE, TOMATO)
    assert cook.state.admissible[0] == (LETTUCE, ONION, FIRST, SECOND, CHOP, DELIVER)


def texts_at_the_plate(memory):
    """What is observed at the plate with the tomato chopped, and with it whole on the board."""
    chopped, whole = Cook(memory=memory), Cook(memory=memory)
    chopped.do(TOMATO, FIRST, CHOP, CHOP, CHOP, PLATE)
    whole.do(TOMATO, FIRST, PLATE)
    return chopped.text, whole.text


def test_what_is_out_of_view_is_hidden():
    chopped, whole = texts_at_the_plate(memory=False)
    assert chopped == whole == "You stand at the place of the plate. You hold the plate with nothing on it."


def test_memory_keeps_what_was_seen():
    chopped, whole = texts_at_the_plate(memory=True)
    assert "You remember the chopped tomato at the first cutting board." in chopped
    assert "You remember the whole tomato at the first cutting board." in whole


def test_memory_is_never_wrong():
    env, rng = make_overcooked(50, "tomato-lettuce-salad", memory=True, horizon=100), np.random.default_rng(0)
    state = env.reset(0)
    for _ in range(200):
        random = np.array([rng.integers(max(len(actions), 1)) for actions in state.admissible])
        state = env.step(np.where(rng.random(50) < 0.5, random, env.expert())).state
        known = env._texts._known
        true = np.concatenate([env.where, env.plate[:, None]], axis=1) * 4 + np.pad(env.chops, ((0, 0), (0, 1)))
        assert ((known == true) | (known == 24)).all()
    assert (known == 24).any()
    assert (known != 24).any()


def test_equal_sights_are_equal_texts_and_different_ones_differ():
    env = make_overcooked(50, "tomato-lettuce-salad", memory=True, horizon=100)
    rng, state = np.random.default_rng(1), env.reset(0)
    for _ in range(100):
        state = env.step(np.array([rng.integers(max(len(a), 1)) for a in state.admissible])).state
    sights = env._texts._sights
    assert len({sight[0] for sight in sights.values()}) == len(sights)


@pytest.mark.parametrize(("task", "steps", "gain"), [("tomato-salad", 8, 1.392), ("tomato-lettuce-salad", 14, 1.786)])
def test_the_expert_cooks_from_every_tile(task, steps, gain):
    env = make_overcooked(100, task)
    env.reset(0)
    gained = np.zeros(100)
    for _ in range(steps):
        step = env.step(env.expert())
        gained += step.reward
    assert step.success.all()
    np.testing.assert_allclose(gained, gain, atol=1e-5)


def test_the_expert_finds_out_of_any_mess():
    env, rng = make_overcooked(200, "tomato-lettuce-salad", horizon=60), np.random.default_rng(3)
    state = env.reset(0)
    for _ in range(25):
        state = env.step(np.array([rng.integers(max(len(a), 1)) for a in state.admissible])).state
    won = np.zeros(200, bool)
    for _ in range(35):
        won |= env.step(env.expert()).success
    assert won.all()


def test_random_cooks_hardly_ever_succeed():
    env, rng = make_overcooked(500), np.random.default_rng(4)
    state, won = env.reset(0), np.zeros(500, bool)
    for _ in range(30):
        step = env.step(np.array([rng.integers(max(len(a), 1)) for a in state.admissible]))
        state, won = step.state, won | step.success
    assert won.mean() < 0.05


def test_an_unknown_task():
    with pytest.raises(UnsupportedArgument, match="task='onion-soup': give one of tomato-salad"):
        make_overcooked(1, "onion-soup")
