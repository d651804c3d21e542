"""A story game that fits on a page: a corridor of rooms with a lamp, to be lit in the last one."""

from lago_fast.envs.game_memo import Turn


class Corridor:
    """Rooms 0 to 2; to go back from room 0 loses."""

    started = 0

    def __init__(self):
        type(self).started += 1
        self.steps = self.closed = 0

    def reset(self):
        self.room, self.lit = 0, False
        return self._turn()

    def step(self, command):
        assert command in self._turn().admissible
        self.steps += 1
        if command == "light":
            self.lit = True
        elif command != "wait":
            self.room += 1 if command == "on" else -1
        return self._turn()

    def _turn(self):
        won = self.lit and self.room == 2
        return Turn(
            key=(self.room, self.lit),
            instruction="light the lamp",
            observation=f"room {self.room}{', light' if self.lit else ''}",
            admissible=("back", "light", "on", "wait") if self.room < 2 else ("back", "light", "wait"),
            score=self.room / 2 + self.lit,
            won=won,
            lost=self.room < 0,
            advice="light" if self.room == 2 else "on",
        )

    def close(self):
        self.closed += 1
