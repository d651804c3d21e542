"""The prior that writes: k sampled completions of the prompt, mapped to admissible actions and counted.

As in "Efficient Reinforcement Learning with Large Language Model Priors" (arXiv 2410.07927), whose released code
asks HF `generate` for k completions of at most 10 tokens. Test: pytest tests/priors/test_generate_prior.py
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.causal_lm import CausalLM
from lago_fast.priors.completions import Sampler
from lago_fast.priors.folder import check_choice
from lago_fast.priors.mapping import RULES, Rule, named_action
from lago_fast.priors.prompt import LongPrompt, Prompt, PromptReader
from lago_fast.priors.score_prior import check_temperature
from lago_fast.priors.text_base import check_texts
from lago_fast.priors.text_keys import encoded, seed_of, text_keys

logger = logging.getLogger(__name__)


class GeneratePrior:
    """The shares that the admissible actions have among k sampled completions.

    A completion that names no admissible action is left out and counted as `unmatched`. A state none of whose
    completions names one is answered with equal shares for all of its actions and counted as `fallbacks`. What is
    sampled for a state depends on its texts and on `seed`, not on when or with which others it is asked.

    Args:
        lm: what `find_causal_lm` returned.
        k: completions per state.
        prompt: what the model reads; it stops writing at `prompt.end`.
        rule: from completions to actions, see `mapping`.
        temperature: above 0.
        top_p: in (0, 1].
        max_new_tokens: of a completion, at most.
        long_prompts: see `PromptReader`.
        seed: of the samples.
        batch_rows: completions that are written side by side.

    Raises UnsupportedArgument for these.
    """

    def __init__(
        self,
        lm: CausalLM,
        k: int = 5,
        *,
        prompt: Prompt | None = None,
        rule: Rule = "paper",
        temperature: float = 1.0,
        top_p: float = 1.0,
        max_new_tokens: int = 10,
        long_prompts: LongPrompt = "refuse",
        seed: int = 0,
        batch_rows: int = 64,
    ) -> None:
        check_choice("rule", rule, RULES)
        check_temperature(temperature)
        if min(k, max_new_tokens, batch_rows) < 1:
            raise UnsupportedArgument(
                f"k, max_new_tokens, batch_rows: {k}, {max_new_tokens} and {batch_rows}; give at least 1 of each: a "
                "prior without a completion proposes nothing"
            )
        if not 0 < top_p <= 1:
            raise UnsupportedArgument(f"top_p: {top_p}; give a share above 0, and 1 for every token")
        self.lm, self.k, self.rule, self.temperature, self.top_p = lm, k, rule, temperature, top_p
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self._reader = PromptReader(lm, prompt or Prompt(), long_prompts)
        self._sampler = Sampler(
            lm,
            k=k,
            temperature=temperature,
            top_p=top_p,
            max_new_tokens=max_new_tokens,
            end=self._reader.prompt.end,
            batch_rows=batch_rows,
        )
        self._key_seed = seed_of(self.digest)
        self._log = dict.fromkeys(("lm_queries", "completions", "unmatched", "fallbacks", "shortened_prompts"), 0)

    @property
    def digest(self) -> str:
        """Return the SHA-256 over model, tokenizer, prompt, settings and seed."""
        about = {
            **self._reader.about(),
            "class": "GeneratePrior",
            "k": self.k,
            "rule": self.rule,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
        }
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def query(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> Tensor:
        """Return log-probabilities [B, A] float32: of at most k actions per row, -inf for all others.

        Raises:
            UnsupportedArgument: see `check_texts`; a prompt longer than the context leaves room for.
            NonFiniteError: the model answers with NaN.
        """
        answer = torch.full((len(admissible), check_texts(instruction, observation, admissible)), -torch.inf)
        nameless = []
        for row, completions in enumerate(self.complete(instruction, observation, admissible)):
            named = [named_action(text, admissible[row], self.rule) for text in completions]
            counts = torch.zeros(len(admissible[row]))
            for action in named:
                if action is not None:
                    counts[action] += 1
            self._log["unmatched"] += named.count(None)
            if not bool(counts.any()):
                nameless.append(completions[0])
                counts += 1
            answer[row, : len(counts)] = (counts / counts.sum()).log()
        self._log["fallbacks"] += len(nameless)
        if nameless:
            logger.warning(
                "no completion names an admissible action in %d of %d states, whose actions get equal shares; the "
                "first such completion is %r",
                len(nameless),
                len(answer),
                nameless[0],
            )
        return answer

    def complete(
        self, instruction: Sequence[str], observation: Sequence[str], admissible: Sequence[Sequence[str]]
    ) -> list[list[str]]:
        """Return the k completions of each state, before they are mapped; raises as `query` does."""
        if not admissible:
            return []
        before = self._reader.dropped
        prompts = self._reader.read(instruction, observation, admissible, [self.max_new_tokens] * len(admissible))
        states = zip(instruction, observation, admissible, strict=True)
        keys = text_keys([encoded(i, o, *actions) for i, o, actions in states], self._key_seed)
        found = self._sampler.complete([read.tokens for read in prompts], keys[:, 0].tolist())
        self._log["lm_queries"] += len(found)
        self._log["completions"] += self.k * len(found)
        self._log["shortened_prompts"] += self._reader.dropped - before
        return found

    def telemetry(self) -> dict[str, float]:
        """Return counts since the last call: states that were put to the model, completions, those that named no
        action, states that fell back to equal shares, prompts shortened."""
        log, self._log = self._log, dict.fromkeys(self._log, 0)
        return {f"prior/{name}": float(count) for name, count in log.items()}

    def parameters(self) -> Iterable[nn.Parameter]:
        """Return the parameters of the model, all of them frozen."""
        return self.lm.model.parameters()
