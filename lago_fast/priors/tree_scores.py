"""Log-probabilities of many continuations of each prompt in one pass: they hang on it as a tree.

Continuations of one prompt share it, and tokens with which they begin alike: each is read once. All tokens of a
prompt's tree stand in one row behind it, at the positions that they would have alone, and attend to their ancestors
only; the start of the prompts, which the task decides, has its keys and values kept from query to query.
Test: pytest tests/priors/test_score_prior.py. Bench: bench/bench_text_prior.py
"""

import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors import prefix as prefixes
from lago_fast.priors.backbone import pad_right
from lago_fast.priors.causal_lm import CausalLM
from lago_fast.priors.prompt import Read

KEPT_HEADS = 64  # starts of prompts whose keys and values are kept
LOGIT_BYTES = 1 << 28  # of the float32 logits of one pass, at most, unless one prompt alone needs more
# largest distance of a log-probability from the one that is read alone, as a share of 1 + its size
TOLERANCE, TOLERANCE_LOW_PRECISION = 1e-3, 0.1


class Tree(NamedTuple):
    tokens: list[int]  # of the nodes
    parents: list[int]  # of each the node that it follows, -1 for the prompt's end
    steps: list[tuple[int, int, int]]  # (node or -1, token that follows it, continuation)


def tree_of(continuations: Sequence[Sequence[int]]) -> Tree:
    """Return the tree of one prompt's continuations, whose last tokens are asked about and not read."""
    tokens: list[int] = []
    parents: list[int] = []
    steps = []
    known: dict[tuple[int, int], int] = {}
    for number, continuation in enumerate(continuations):
        node = -1
        for place, token in enumerate(continuation):
            steps.append((node, token, number))
            if place + 1 < len(continuation):
                child = known.setdefault((node, token), len(tokens))
                if child == len(tokens):
                    tokens.append(token)
                    parents.append(node)
                node = child
    return Tree(tokens, parents, steps)


@torch.no_grad()
def read_alone(lm: CausalLM, prompt: Sequence[int], continuation: Sequence[int]) -> Tensor:
    """Return the log-probability of each token of one continuation, [n] float32, all tokens read: the definition."""
    tokens = torch.tensor([[*prompt, *continuation]], device=lm.model.device)
    logits = lm.model(input_ids=tokens, logits_to_keep=len(continuation) + 1).logits[0, :-1].float()
    return logits.log_softmax(dim=-1).gather(1, tokens[0, len(prompt) :, None]).flatten().cpu()


class TreeScorer:
    """Sums of log-probabilities under a causal language model.

    Args:
        lm: the model.
        batch_tokens: padded tokens of a pass, at most, unless one prompt alone has more.

    Raises UnsupportedArgument for a model that keeps no keys and values, takes no mask of its own for each token, or
    answers otherwise than by the definition.
    """

    def __init__(self, lm: CausalLM, batch_tokens: int) -> None:
        if batch_tokens < 1:
            raise UnsupportedArgument(f"batch_tokens: {batch_tokens}; give at least 1")
        self.lm, self.batch_tokens = lm, batch_tokens
        prefixes.check_supported(lm.model.base_model)
        if "logits_to_keep" not in inspect.signature(lm.model.forward).parameters:
            raise UnsupportedArgument(f"lm: {type(lm.model).__name__} takes no logits_to_keep; choose another")
        self._heads: OrderedDict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = OrderedDict()
        self._check()

    @torch.no_grad()
    def sums(self, prompts: Sequence[Read], continuations: Sequence[Sequence[Sequence[int]]]) -> Tensor:
        """Return the summed log-probability of each prompt's continuations, [B, A] float32, -inf where padded."""
        trees = [tree_of(row) for row in continuations]
        sums = torch.full((len(prompts), max(map(len, continuations), default=0)), -torch.inf)
        for rows in self._chunks(prompts, trees):
            part = self._pass([prompts[i] for i in rows], [trees[i] for i in rows])
            for row, found in zip(rows, part, strict=True):
                count = len(continuations[row])
                number = torch.tensor([step[2] for step in trees[row].steps])
                sums[row, :count] = torch.zeros(count).index_add_(0, number, found)
        return sums

    def _chunks(self, prompts: Sequence[Read], trees: Sequence[Tree]) -> Iterator[list[int]]:
        """Yield the numbers of prompts of one pass, similar lengths together."""
        sizes = [
            len(prompt.tokens) - prompt.shared + len(tree.tokens) for prompt, tree in zip(prompts, trees, strict=True)
        ]
        row_bytes = 4 * self.lm.model.config.get_text_config().vocab_size
        chunk: list[int] = []
        longest = widest = 0
        for row in sorted(range(len(prompts)), key=sizes.__getitem__):
            longest, widest = max(longest, sizes[row]), max(widest, 1 + len(trees[row].tokens))
            rows = len(chunk) + 1
            if chunk and (rows * longest > self.batch_tokens or rows * widest * row_bytes > LOGIT_BYTES):
                yield chunk
                chunk, longest, widest = [], sizes[row], 1 + len(trees[row].tokens)
            chunk.append(row)
        if chunk:
            yield chunk

    def _pass(self, prompts: Sequence[Read], trees: Sequence[Tree]) -> list[Tensor]:
        """Return for each prompt the log-probabilities of its tree's steps."""
        from transformers.cache_utils import Cache

        device, dtype = self.lm.model.device, self.lm.model.dtype
        tokens, positions, mask, states = _packed(prompts, trees)
        heads = list(dict.fromkeys(tuple(prompt.tokens[: prompt.shared]) for prompt in prompts))
        numbers = {head: i for i, head in enumerate(heads)}
        head_id = torch.tensor([numbers[tuple(p.tokens[: p.shared])] for p in prompts], device=device)
        layer, room = prefixes.layer_type(), tokens.shape[1]
        layers = [layer(keys, values, head_id, room) for keys, values in self._kept(heads, room)]
        logits = self.lm.model(
            input_ids=tokens.to(device),
            attention_mask=prefixes.additive(mask.to(device), dtype),
            position_ids=positions.to(device),
            logits_to_keep=torch.arange(states - 1, room, device=device),
            **{prefixes.cache_name(self.lm.model): Cache(layers=layers)},
        ).logits.float()
        steps = [torch.tensor(tree.steps, dtype=torch.int64) for tree in trees]
        row = torch.arange(len(trees)).repeat_interleave(torch.tensor([len(part) for part in steps]))
        node, token = torch.cat(steps)[:, :2].to(device).unbind(1)
        row = row.to(device)
        found = logits[row, node + 1, token] - logits.logsumexp(dim=-1)[row, node + 1]
        return list(found.cpu().split([len(part) for part in steps]))

    def _kept(self, heads: list[tuple[int, ...]], room: int) -> list[tuple[Tensor, Tensor]]:
        """Return per layer the keys and values [M, heads, L + room, width] of starts of prompts."""
        missing = [head for head in heads if head not in self._heads]
        if missing:
            tokens, lengths = (column.to(self.lm.model.device) for column in pad_right(missing))
            words = self.lm.model.get_input_embeddings()(tokens)
            built = prefixes.build(
                self.lm.model.base_model, words, lengths, max(1, self.batch_tokens // tokens.shape[1])
            )
            for i, head in enumerate(missing):
                self._heads[head] = [
                    (keys[i, :, : len(head)].clone(), values[i, :, : len(head)].clone())
                    for keys, values in zip(built.keys, built.values, strict=True)
                ]
        longest = max(map(len, heads))
        layers = []
        for layer in zip(*(self._heads[head] for head in heads), strict=True):
            columns = []
            for parts in zip(*layer, strict=True):
                column = parts[0].new_zeros(len(parts), parts[0].shape[0], longest + room, parts[0].shape[2])
                for i, part in enumerate(parts):
                    column[i, :, : part.shape[1]] = part
                columns.append(column)
            layers.append((columns[0], columns[1]))
        for head in heads:
            self._heads.move_to_end(head)
        while len(self._heads) > KEPT_HEADS:
            self._heads.popitem(last=False)
        return layers

    def _check(self) -> None:
        """Compare a small tree with its continuations read alone."""
        prompts, continuations = [Read([0, 1, 2, 1], 2), Read([1, 0], 1)], [[2, 0, 1], [2, 0, 2], [1]]
        found = self.sums(prompts, [continuations, continuations])
        self._heads.clear()
        alone = torch.tensor([[float(read_alone(self.lm, p.tokens, c).sum()) for c in continuations] for p in prompts])
        off = float(((found - alone).abs() / (1 + alone.abs())).max())
        limit = TOLERANCE if self.lm.model.dtype == torch.float32 else TOLERANCE_LOW_PRECISION
        if not off <= limit:
            raise UnsupportedArgument(
                f"lm: {type(self.lm.model).__name__} is {off:.1%} off its own log-probabilities when it reads several "
                "continuations at once; choose a model with rotary or learned positions"
            )


def _packed(prompts: Sequence[Read], trees: Sequence[Tree]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return (tokens [B, Q], positions [B, Q], mask [B, Q, L + Q], width of the states' part of Q).

    A row is the state behind the kept start, padded on the left, and its tree, padded on the right.
    """
    states = max(len(prompt.tokens) - prompt.shared for prompt in prompts)
    width = states + max(len(tree.tokens) for tree in trees)
    heads = max(prompt.shared for prompt in prompts)
    tokens = torch.zeros(len(prompts), width, dtype=torch.int64)
    positions = torch.zeros(len(prompts), width, dtype=torch.int64)
    # a padded token attends to itself only, so that its softmax is over something
    mask = torch.cat([torch.zeros(width, heads, dtype=torch.bool), torch.eye(width, dtype=torch.bool)], dim=1)
    mask = mask.repeat(len(prompts), 1, 1)
    for row, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        length, nodes = len(prompt.tokens), len(tree.tokens)
        first, own = states - (length - prompt.shared), slice(states, states + nodes)
        tokens[row, first:states] = torch.tensor(prompt.tokens[prompt.shared :])
        positions[row, first:states] = torch.arange(prompt.shared, length)
        mask[row, first : states + nodes, : prompt.shared] = True
        mask[row, first:states, heads + first : heads + states] = _causal(states - first)
        if nodes:
            tokens[row, own] = torch.tensor(tree.tokens)
            mask[row, own, heads + first : heads + states] = True
            ancestors, depth = _ancestors(tree.parents)
            positions[row, own] = length + depth
            mask[row, own, heads + states : heads + states + nodes] = ancestors
    return tokens, positions, mask, states


def _causal(n: int) -> Tensor:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _ancestors(parents: list[int]) -> tuple[Tensor, Tensor]:
    """Return which nodes each node attends to, itself too, [n, n] bool, and how many stand above it, [n]."""
    ancestors = torch.eye(len(parents), dtype=torch.bool)
    for node, parent in enumerate(parents):
        if parent >= 0:
            ancestors[node] |= ancestors[parent]
    return ancestors, ancestors.sum(dim=1) - 1
