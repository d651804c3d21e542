"""Scenes of CLEVR-Robot by the published rules, for many environments at once.

Every random number is a pure function of (key, counter), so that what an environment draws depends neither on its
neighbours nor on when it is drawn. The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
Tests: tests/envs/test_clevr_scenes.py.
"""

import numpy as np

from lago_fast.envs.clevr_goals import NUM_BALLS
from lago_fast.envs.clevr_physics import BALL_RADIUS
from lago_fast.errors import SceneUnsampled

LOW, SPAN = np.array([-0.5, -0.3]), np.array([1.0, 0.8])  # of ball centres, metres
GAP_M = 0.1  # between the surfaces of two balls, at least
AXIS_GAP_M = 0.01  # two centres differ along each axis by so much, or not at all
TRIES = 10  # per ball; then the whole scene starts again
ATTEMPTS = 4  # scenes tried side by side
MAX_ROUNDS = 200

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = ((np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)), (np.uint64(27), np.uint64(0x94D049BB133111EB)))


def hashed(keys: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """uint64: the `counter`-th numbers of the SplitMix64 sequences that start at `keys`; shapes broadcast."""
    x = keys + (counter.astype(np.uint64) + np.uint64(1)) * _GOLDEN
    for shift, factor in _MIX:
        x = (x ^ (x >> shift)) * factor
    return x ^ (x >> np.uint64(31))


def uniform(keys: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """float64 in [0, 1) from `hashed`."""
    return (hashed(keys, counter) >> np.uint64(11)) * 2.0**-53


def below(keys: np.ndarray, counter: np.ndarray, bound: int) -> np.ndarray:
    """int64 in [0, bound) from `hashed`."""
    return (uniform(keys, counter) * bound).astype(np.int64)


def sample_scenes(keys: np.ndarray, gap: float = GAP_M) -> np.ndarray:
    """Ball centres [n, 5, 2], metres; one scene per key [n] uint64.

    Centres are uniform on [-0.5, 0.5] x [-0.3, 0.5]; surfaces are at least `gap` apart, and no two centres differ by
    more than 0 and less than 0.01 along an axis. A ball has 10 tries, then its scene starts again. A ball may touch
    or overlap a wall.

    Raises:
        SceneUnsampled: no scene was found; the gap is too large for the table.
    """
    scenes = np.zeros((len(keys), NUM_BALLS, 2))
    left = np.arange(len(keys))
    for number in range(MAX_ROUNDS):
        found, placed = _attempt(keys[left], number, 2 * BALL_RADIUS + gap)
        first = found.argmax(axis=1)
        done = found[np.arange(len(left)), first]
        scenes[left[done]] = placed[done, first[done]]
        left = left[~done]
        if not len(left):
            return scenes
    raise SceneUnsampled(
        f"ball_gap={gap}: {MAX_ROUNDS * ATTEMPTS} attempts found no scene of {NUM_BALLS} balls that far apart on "
        f"the table; give a smaller gap, such as {GAP_M}"
    )


def _attempt(keys: np.ndarray, number: int, distance: float) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of a round's attempts [n, A] found a scene, and the scenes [n, A, 5, 2]."""
    keys = np.repeat(keys, ATTEMPTS)
    # where in its key's sequence an attempt's numbers start
    start = np.tile(np.arange(ATTEMPTS) + number * ATTEMPTS, len(keys) // ATTEMPTS) * (NUM_BALLS * TRIES * 2)
    placed = np.zeros((len(keys), NUM_BALLS, 2))
    alive = np.arange(len(keys))
    for ball in range(NUM_BALLS):
        homeless = alive
        for number_of_try in range(TRIES):
            counter = start[homeless, None] + ((ball * TRIES + number_of_try) * 2 + np.arange(2))
            candidate = LOW + SPAN * uniform(keys[homeless, None], counter)  # [m, 2]
            fits = _fits(candidate, placed[homeless, :ball], distance)
            placed[homeless[fits], ball] = candidate[fits]
            homeless = homeless[~fits]
            if not len(homeless):
                break
        alive = np.setdiff1d(alive, homeless, assume_unique=True) if len(homeless) else alive
    found = np.zeros(len(keys), bool)
    found[alive] = True
    return found.reshape(-1, ATTEMPTS), placed.reshape(-1, ATTEMPTS, NUM_BALLS, 2)


def _fits(candidate: np.ndarray, placed: np.ndarray, distance: float) -> np.ndarray:
    """[m] bool: a ball at `candidate` [m, 2] may lie beside those at `placed` [m, b, 2]."""
    x, y = np.abs(candidate[:, None] - placed).transpose(2, 0, 1)  # [m, b]
    near = x * x + y * y < distance * distance
    aligned = (x > 0.0) & (x < AXIS_GAP_M) | (y > 0.0) & (y < AXIS_GAP_M)
    return ~(near | aligned).any(axis=1)
