"""Rows of story games: what TextWorld and ALFWorld share. Tests: tests/envs/test_story_games.py."""

from collections.abc import Callable, Hashable, Sequence
from hashlib import sha256
from pathlib import Path

import numpy as np

from lago_fast.envs.game_memo import Engine, GameMemo, Play
from lago_fast.envs.text_games import Outcome, TextGames
from lago_fast.errors import UnsupportedArgument


class StoryGames(TextGames):
    """N rows that play one of some games in each episode, drawn with equal probabilities.

    The reward is the change of the game's score; to win is a success, to win or to lose ends the episode.
    """

    max_actions = None

    def __init__(self, num_envs: int, games: Sequence[Callable[[], Engine]], horizon: int, seed: int) -> None:
        super().__init__(num_envs, horizon, seed)
        self._starts, self._closed = list(games), False
        self._memos = [GameMemo(start) for start in games]
        self.game = np.zeros(num_envs, np.int64)  # which of the games each row plays
        self._plays: list[Play] = []

    @property
    def engine_steps(self) -> int:
        """How many commands were given to the games' engines, all in all; the others were known."""
        return sum(memo.engine_steps for memo in self._memos)

    def share(self, other: "StoryGames") -> None:
        """Let both know from now on what `other` has seen, or either will see, of the same games.

        Episodes under way here end: call reset. One process, one thread; either may be closed before the other.

        Raises:
            UnsupportedArgument: `other` has another number of games, or other games or settings; or one is closed.
        """
        if self._closed or other._closed:
            raise UnsupportedArgument("other: it or this one is closed; share before that")
        if len(other._memos) != len(self._memos):
            raise UnsupportedArgument(f"other: it has {len(other._memos)} games, this one {len(self._memos)}")
        for number, (theirs, ours) in enumerate(zip(other._games(), self._games(), strict=True)):
            if theirs != ours:
                raise UnsupportedArgument(
                    f"other: its game {number} is not this one's, or has other settings; make both of the same files"
                )
        self._let_go()
        self._memos, self._plays = other._memos, []
        self._over[:] = True

    def _games(self) -> list[Hashable]:
        """Return what tells each game from all others; equal ones answer alike."""
        return list(self._starts)

    def expert(self) -> np.ndarray:
        """Return the first commands [N] of ways to win from here; 0 where none is known, or the episode is over."""
        choice = np.zeros(self.num_envs, np.int64)
        for row in np.flatnonzero(~self._over):
            turn = self._plays[row].node.turn
            if turn.advice in turn.admissible:
                choice[row] = turn.admissible.index(turn.advice)
        return choice

    def _start(self, rows: np.ndarray) -> None:
        self.game[rows] = self._draw(rows, len(self._memos))
        if not self._plays:
            self._plays = [Play(self._memos[game]) for game in self.game]
            return
        for row in rows:
            self._plays[row].end()
            self._plays[row] = Play(self._memos[self.game[row]])

    def _play(self, choice: np.ndarray, playing: np.ndarray) -> Outcome:
        reward, terminated, success = np.zeros(self.num_envs, np.float32), ~playing, np.zeros(self.num_envs, bool)
        for row in np.flatnonzero(playing):
            play = self._plays[row]
            before = play.node.turn
            after = play.step(before.admissible[choice[row]]).turn
            reward[row] = after.score - before.score
            terminated[row], success[row] = after.won or after.lost, after.won
        return Outcome(reward, terminated, success)

    def _see(self) -> tuple[list[str], list[str], list[tuple[str, ...]]]:
        turns = [play.node.turn for play in self._plays]
        return [t.instruction for t in turns], [t.observation for t in turns], [t.admissible for t in turns]

    def close(self) -> None:
        """Free the games' engines; a second call does nothing."""
        self._closed = True
        self._let_go()

    def _let_go(self) -> None:
        """Give back all engines and free the idle ones; who shares the memos starts others where it needs them."""
        for play in self._plays:
            play.end()
        for memo in self._memos:
            memo.close()


def content_of(path: Path) -> str:
    """Return the SHA-256 of a game file."""
    return sha256(path.read_bytes()).hexdigest()
