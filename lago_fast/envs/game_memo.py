"""A text game that is asked only for what it has not answered before.

A story game is deterministic: the world's state and a command decide the answer. Each state seen becomes a node, each
command taken in it an edge, and all rows that play the game share them; an engine is started, and brought to a row's
place by its commands since the start, only where an edge is missing. An interpreter's few hundred steps a second
become lookups. Tests: tests/envs/test_game_memo.py.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from lago_fast.errors import EnvironmentFailed


class Turn(NamedTuple):
    """What an engine says after a command."""

    key: Hashable  # of the world's state, with all that can change an answer from here on
    instruction: str
    observation: str
    admissible: tuple[str, ...]
    score: float
    won: bool
    lost: bool
    advice: str | None  # the next command on a way to win; None where none is known


class Engine(Protocol):
    def reset(self) -> Turn:
        """Start the game anew."""
        ...

    def step(self, command: str) -> Turn:
        """Take an admissible command."""
        ...

    def close(self) -> None:
        """Free the game."""
        ...


@dataclass(eq=False)
class Node:
    """A state of the game and where its commands lead."""

    turn: Turn
    edges: dict[str, "Node"] = field(default_factory=dict)


class GameMemo:
    """The known part of one game."""

    def __init__(self, start_engine: Callable[[], Engine]) -> None:
        self._start_engine = start_engine
        self._idle: list[Engine] = []
        self._nodes: dict[Hashable, Node] = {}
        self._root: Node | None = None
        self.engine_steps = 0  # commands that an engine was given

    @property
    def root(self) -> Node:
        """The start of the game."""
        if self._root is None:
            engine = self.borrow()
            self._root = self.node(engine.reset())
            self.give_back(engine)
        return self._root

    def node(self, turn: Turn) -> Node:
        """Return the one node of a state."""
        if not turn.admissible and not (turn.won or turn.lost):
            raise EnvironmentFailed("a game has no admissible command left and is neither won nor lost; leave it out")
        return self._nodes.setdefault(turn.key, Node(turn))

    def borrow(self) -> Engine:
        """Return an engine that nobody uses."""
        return self._idle.pop() if self._idle else self._start_engine()

    def give_back(self, engine: Engine) -> None:
        """Let others use an engine."""
        self._idle.append(engine)

    def close(self) -> None:
        """Free the idle engines."""
        while self._idle:
            self._idle.pop().close()


class Play:
    """One episode of a game, by lookups where possible."""

    def __init__(self, memo: GameMemo) -> None:
        self._memo, self.node = memo, memo.root
        self._commands: list[str] = []
        self._engine: Engine | None = None
        self._told = 0  # commands that the engine knows

    def step(self, command: str) -> Node:
        """Take a command and return the node it leads to."""
        there = self.node.edges.get(command)
        self._commands.append(command)
        if there is None:
            there = self.node.edges[command] = self._memo.node(self._ask())
        self.node = there
        return there

    def _ask(self) -> Turn:
        if self._engine is None:
            self._engine = self._memo.borrow()
            self._engine.reset()
        turn = None
        for command in self._commands[self._told :]:
            turn = self._engine.step(command)
        assert turn is not None  # the last command is a new one
        self._memo.engine_steps += len(self._commands) - self._told
        self._told = len(self._commands)
        return turn

    def end(self) -> None:
        """Give back the engine."""
        if self._engine is not None:
            self._memo.give_back(self._engine)
            self._engine = None
