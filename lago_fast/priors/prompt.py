"""What a language model reads before it names an action: the task, the state, the cue.

The task comes first, so that its states share the keys and values of that part; the cue last, so that tokens of an
action do not depend on the state before it. Test: pytest tests/priors/test_prompt.py
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.causal_lm import CausalLM
from lago_fast.priors.folder import check_choice
from lago_fast.priors.text_base import check_texts

LongPrompt = Literal["refuse", "drop_oldest"]


@dataclass(frozen=True)
class Prompt:
    """The four parts of a prompt, in their order, and what ends an action."""

    task: str = "Task: {instruction}\n"
    state: str = "{observation}\n"
    menu: str = "Possible actions: {actions}\n"  # "" where the actions are not to be read out
    cue: str = "Next action:"
    separator: str = ", "  # of the menu
    end: str = "\n"

    def __post_init__(self) -> None:
        """Refuse what cannot be filled in, or what an action cannot follow."""
        try:
            self.text("", "", ("",))
        except (LookupError, ValueError, AttributeError) as error:
            raise UnsupportedArgument(
                f"prompt: {error!r}; the parts may name {{instruction}}, {{observation}} and {{actions}} in this order"
            ) from error
        if not self.cue or self.cue != self.cue.rstrip() or not self.end:
            raise UnsupportedArgument(
                f"prompt: cue {self.cue!r}, end {self.end!r}; neither may be empty, and a space follows the cue anyway"
            )

    def text(self, instruction: str, observation: str, admissible: Sequence[str]) -> str:
        """Return the whole prompt; an action follows it behind a space."""
        return (
            self.task.format(instruction=instruction)
            + self.state.format(observation=observation)
            + self._rest(admissible)
        )

    def _rest(self, admissible: Sequence[str]) -> str:
        return self.menu.format(actions=self.separator.join(admissible)) + self.cue


class Read(NamedTuple):
    tokens: list[int]  # of the whole prompt
    shared: int  # of them the first that the task decides, at least one; another follows


class PromptReader:
    """Prompts and actions as a model's tokens.

    Args:
        lm: whose tokens.
        prompt: the parts.
        long_prompts: what becomes of a prompt that leaves the answer no room in the context: "refuse" it, or
            "drop_oldest": leave out the first tokens of the state, the oldest of a history, which is counted.

    Attributes:
        dropped: prompts that were shortened.
    """

    def __init__(self, lm: CausalLM, prompt: Prompt, long_prompts: LongPrompt) -> None:
        check_choice("long_prompts", long_prompts, ("refuse", "drop_oldest"))
        self.lm, self.prompt, self.long_prompts = lm, prompt, long_prompts
        self.dropped = 0
        bos = lm.tokenizer.bos_token_id
        self._first = [bos] if bos is not None and lm.tokenizer("a")["input_ids"][:1] == [bos] else []
        self._cue = self._tokens([prompt.cue])[0]
        self._actions: dict[str, list[int]] = {}

    def about(self) -> dict[str, Any]:
        """Return everything that can change the tokens, JSON-able."""
        limits = {"first": self._first, "max_tokens": self.lm.max_tokens}
        return {"lm": self.lm.digest, "prompt": asdict(self.prompt), "long_prompts": self.long_prompts, **limits}

    def read(
        self,
        instruction: Sequence[str],
        observation: Sequence[str],
        admissible: Sequence[Sequence[str]],
        room: Sequence[int],
    ) -> list[Read]:
        """Return the tokens of each state's prompt.

        Args:
            instruction: B texts.
            observation: B texts.
            admissible: B lists of texts.
            room: B numbers of tokens that the answer may need.

        Raises UnsupportedArgument: see `check_texts`; a prompt longer than the context leaves room for.
        """
        check_texts(instruction, observation, admissible)
        texts = [self.prompt.text(*row) for row in zip(instruction, observation, admissible, strict=True)]
        tasks = list(dict.fromkeys(instruction))
        heads = dict(zip(tasks, self._tokens([self.prompt.task.format(instruction=t) for t in tasks]), strict=True))
        found = []
        for row, tokens in enumerate(self._tokens(texts)):
            head = heads[instruction[row]]
            alike = (i for i, (a, b) in enumerate(zip(head, tokens, strict=False)) if a != b)
            shared = next(alike, min(len(head), len(tokens)))
            tokens = self._shortened(tokens, shared, room[row], admissible[row])
            whole = [*self._first, *tokens]
            if len(whole) < 2:
                raise UnsupportedArgument(f"prompt: row {row} has a single token; write more than the cue")
            # the first token is anyone's: keys and values of something are shared
            found.append(Read(whole, max(1, min(shared + len(self._first), len(whole) - 1))))
        return found

    def action_tokens(self, actions: Sequence[str], *, end: bool = False) -> list[list[int]]:
        """Return the tokens that each action has behind the cue, with those of `prompt.end` where it is wanted.

        Raises UnsupportedArgument where the cue's own tokens would change, or an action has none.
        """
        texts = [f" {action}{self.prompt.end if end else ''}" for action in actions]
        fresh = [text for text in dict.fromkeys(texts) if text not in self._actions]
        if fresh:
            for text, tokens in zip(fresh, self._tokens([self.prompt.cue + text for text in fresh]), strict=True):
                start = len(self._cue)
                if tokens[:start] != self._cue or len(tokens) == start:
                    raise UnsupportedArgument(
                        f"prompt: behind the cue {self.prompt.cue!r} the action {text!r} has no tokens of its own; "
                        "end the cue in a colon or a quotation mark"
                    )
                self._actions[text] = tokens[start:]
        return [self._actions[text] for text in texts]

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        # a warning about long texts would say what is said or counted here
        found: list[list[int]] = self.lm.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _shortened(self, tokens: list[int], shared: int, room: int, admissible: Sequence[str]) -> list[int]:
        limit = self.lm.max_tokens
        over = 0 if limit is None else len(self._first) + len(tokens) + room - limit
        if over <= 0:
            return tokens
        if self.long_prompts == "drop_oldest":
            kept = len(self._tokens([self.prompt._rest(admissible)])[0])
            if over <= len(tokens) - shared - kept:
                self.dropped += 1
                return tokens[:shared] + tokens[shared + over :]
        raise UnsupportedArgument(
            f"prompt: {len(self._first) + len(tokens)} tokens and {room} of an answer are {over} more than the "
            f"{limit} that the model reads; "
            + (
                'shorten the observation, or pass long_prompts="drop_oldest"'
                if self.long_prompts == "refuse"
                else "without the state it is too long as well: shorten instruction and menu"
            )
        )
