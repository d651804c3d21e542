"""Sampled continuations of prompts: each prompt read once for its k samples, drawn from seeds of its own.

A token is drawn by one uniform number against the cumulated probabilities, in batches as alone: what a prompt is
continued with depends on its seed and on no neighbour, up to the rounding of batched sums.
Test: pytest tests/priors/test_generate_prior.py
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lago_fast.errors import NonFiniteError
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.causal_lm import CausalLM


class Draw:
    """What HF `generate` calls on its logits: leaves the drawn token of each sequence as the only possible one.

    Args:
        uniform: [n, T] float64 in [0, 1), one number per sequence and new token.
        temperature: above 0.
        top_p: in (0, 1]; of the most probable tokens that many are left whose probabilities sum to it.
    """

    def __init__(self, uniform: Tensor, temperature: float, top_p: float) -> None:
        from transformers import TopPLogitsWarper

        self.uniform, self.temperature, self.step = uniform, temperature, 0
        self.nucleus = TopPLogitsWarper(top_p) if top_p < 1 else None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return logits [n, V] that allow one token each."""
        scores = scores.float() / self.temperature
        if self.nucleus is not None:
            scores = self.nucleus(input_ids, scores)
        cumulated = scores.softmax(dim=-1, dtype=torch.float64).cumsum(dim=-1)
        if not bool(cumulated[:, -1].isfinite().all()):
            raise NonFiniteError("lm: its logits are NaN or infinite; look at weights and dtype")
        drawn = torch.searchsorted(cumulated, self.uniform[:, self.step, None] * cumulated[:, -1:], right=True)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn, 0.0)


class Sampler:
    """Completions of a causal language model.

    Args:
        lm: the model.
        k: completions per prompt.
        temperature: see `Draw`.
        top_p: see `Draw`.
        max_new_tokens: of a completion, at most.
        end: text at which a completion ends; it is no part of it.
        batch_rows: completions that are written side by side, at most, unless k alone is more.

    Raises UnsupportedArgument for a model that keeps no keys and values.
    """

    def __init__(
        self, lm: CausalLM, *, k: int, temperature: float, top_p: float, max_new_tokens: int, end: str, batch_rows: int
    ) -> None:
        prefixes.check_supported(lm.model.base_model)
        self.lm, self.k, self.temperature, self.top_p = lm, k, temperature, top_p
        self.max_new_tokens, self.end = max_new_tokens, end
        self.prompts_at_once = max(1, batch_rows // k)
        pieces = lm.tokenizer.batch_decode([[i] for i in range(len(lm.tokenizer))])
        own = lm.model.generation_config.eos_token_id
        stops = {
            *([own] if isinstance(own, int) else own or []),
            *(i for i, piece in enumerate(pieces) if end in piece),
        }
        self._stops = sorted(stops)

    @torch.no_grad()
    def complete(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[str]]:
        """Return k completions of each prompt, whose draws its seed decides."""
        found: list[list[str]] = [[] for _ in prompts]
        # similar lengths together
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), self.prompts_at_once):
            rows = order[start : start + self.prompts_at_once]
            texts = self._write([prompts[i] for i in rows], [seeds[i] for i in rows])
            for place, row in enumerate(rows):
                found[row] = texts[place * self.k : (place + 1) * self.k]
        return found

    def _write(self, prompts: list[Sequence[int]], seeds: list[int]) -> list[str]:
        from transformers.cache_utils import DynamicCache

        model, longest = self.lm.model, max(map(len, prompts))
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64)
        mask = torch.zeros(len(prompts), longest, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        tokens, mask = tokens.to(model.device), mask.to(model.device)
        kept: dict[str, Any] = {prefixes.cache_name(model): DynamicCache()}
        model(
            input_ids=tokens[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, :-1],
            logits_to_keep=1,
            **kept,
        )
        for cache in kept.values():
            cache.batch_repeat_interleave(self.k)
        uniform = [
            torch.rand(self.k, self.max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for seed in seeds
        ]
        written = model.generate(
            input_ids=tokens.repeat_interleave(self.k, dim=0),
            attention_mask=mask.repeat_interleave(self.k, dim=0),
            logits_processor=[Draw(torch.cat(uniform).to(model.device), self.temperature, self.top_p)],
            do_sample=False,
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self._stops or None,
            pad_token_id=self._stops[0] if self._stops else 0,
            **kept,
        )
        texts = self.lm.tokenizer.batch_decode(written[:, longest:], skip_special_tokens=True)
        return [text.split(self.end)[0].strip() for text in texts]
