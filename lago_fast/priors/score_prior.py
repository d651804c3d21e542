"""The prior that scores: the log-probability of every admissible action under a causal language model.

Normalised by tokens or words as in TWOSOME (arXiv 2401.14151), or not at all. Test: pytest
tests/priors/test_score_prior.py. Bench: bench/bench_text_prior.py
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError, UnsupportedArgument
from lago_fast.priors.causal_lm import CausalLM
from lago_fast.priors.folder import check_choice
from lago_fast.priors.prompt import LongPrompt, Prompt, PromptReader
from lago_fast.priors.text_base import check_texts
from lago_fast.priors.tree_scores import TreeScorer

Normalise = Literal["token", "word", "none"]


class ScorePrior:
    """softmax over the admissible actions of log p(action | prompt) / length / temperature.

    Args:
        lm: what `find_causal_lm` returned.
        prompt: what the model reads.
        normalise: by how many tokens an action has, by how many words, or not.
        temperature: above 0.
        score_end: let `prompt.end` belong to the action, so that an action with which another one begins is not
            favoured for being shorter.
        long_prompts: see `PromptReader`.
        batch_tokens: padded tokens of a forward pass.

    Raises UnsupportedArgument for these, and as `TreeScorer` does.
    """

    def __init__(
        self,
        lm: CausalLM,
        *,
        prompt: Prompt | None = None,
        normalise: Normalise = "token",
        temperature: float = 1.0,
        score_end: bool = False,
        long_prompts: LongPrompt = "refuse",
        batch_tokens: int = 4096,
    ) -> None:
        check_choice("normalise", normalise, ("token", "word", "none"))
        check_temperature(temperature)
        self.lm, self.normalise, self.temperature, self.score_end = lm, normalise, temperature, score_end
        self._reader = PromptReader(lm, prompt or Prompt(), long_prompts)
        self._scorer = TreeScorer(lm, batch_tokens)
        self._log = dict.fromkeys(("lm_queries", "scored_actions", "shortened_prompts"), 0)

    @property
    def digest(self) -> str:
        """Return the SHA-256 over model, tokenizer, prompt and settings."""
        about = {
            **self._reader.about(),
            "class": "ScorePrior",
            "normalise": self.normalise,
            "temperature": self.temperature,
            "score_end": self.score_end,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return log-probabilities [B, A] float32 over each row's admissible actions, -inf where a row is padded.

        Raises:
            UnsupportedArgument: see `check_texts`; a prompt longer than the context.
            NonFiniteError: the model answers with NaN.
        """
        widest = check_texts(instruction, observation, admissible)
        if not admissible:
            return torch.empty(0, 0)
        actions = [self._reader.action_tokens(row, end=self.score_end) for row in admissible]
        room = [max(map(len, row)) for row in actions]
        before = self._reader.dropped
        prompts = self._reader.read(instruction, observation, admissible, room)
        sums = self._scorer.sums(prompts, actions)
        if self.normalise != "none":
            lengths = torch.ones(len(actions), widest)
            for row, (texts, tokens) in enumerate(zip(admissible, actions, strict=True)):
                counts = map(len, tokens) if self.normalise == "token" else (len(text.split()) for text in texts)
                lengths[row, : len(texts)] = torch.tensor(list(counts), dtype=torch.float32)
            sums = sums / lengths
        answer = (sums / self.temperature).log_softmax(dim=1)
        if bool(answer.isnan().any()):
            raise NonFiniteError("lm: its log-probabilities are NaN or all minus infinity; look at weights and dtype")
        self._log["lm_queries"] += len(actions)
        self._log["scored_actions"] += sum(map(len, actions))
        self._log["shortened_prompts"] += self._reader.dropped - before
        return answer

    def telemetry(self) -> dict[str, float]:
        """Return counts since the last call: states that were put to the model, actions scored, prompts shortened."""
        log, self._log = self._log, dict.fromkeys(self._log, 0)
        return {f"prior/{name}": float(count) for name, count in log.items()}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the model, all of them frozen."""
        return self.lm.model.parameters()


def check_temperature(temperature: float) -> None:
    """Raise UnsupportedArgument unless a temperature is a finite number above 0."""
    if not 0 < temperature < math.inf:
        raise UnsupportedArgument(
            f"temperature: {temperature}; give a number above 0, a small one for nearly always the best action"
        )
