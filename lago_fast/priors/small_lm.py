"""A small causal language model trained on walkthroughs, for where no generative model is at hand.

    python -m lago_fast.priors.small_lm STEPS.jsonl OUT

It learns to write the action that a walkthrough takes behind its prompt, with a tokenizer of its own, and is saved as
transformers saves any model: priors load it as they load a Qwen or Llama checkpoint. Its folder states what it was
trained on (`lago_training.json`): it knows nothing else. STEPS.jsonl: see `walkthroughs.read_steps`.
Test: pytest tests/priors/test_small_lm.py
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lago_fast.errors import NonFiniteError, UnsupportedArgument, check_seed
from lago_fast.priors.backbone import pad_right, quietly
from lago_fast.priors.causal_lm import ABOUT, CausalLM
from lago_fast.priors.folder import check_choice, check_free
from lago_fast.priors.prompt import LongPrompt, Prompt, PromptReader
from lago_fast.priors.walkthroughs import Walkthroughs, first_episodes, numbers_of, read_steps

END_OF_TEXT = "<|endoftext|>"
WARM_UP = 0.1  # share of the training in which the learning rate rises


def train_small_lm(
    walkthroughs: Walkthroughs,
    folder: str | Path,
    *,
    prompt: Prompt | None = None,
    architecture: Literal["llama", "gpt2"] = "llama",
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    vocabulary: int = 1024,
    context: int = 512,
    epochs: int = 40,
    batch_size: int = 16,
    lr: float = 3e-3,
    label_smoothing: float = 0.01,
    max_seconds: float | None = 60.0,
    long_prompts: LongPrompt = "refuse",
    seed: int = 0,
) -> dict[str, Any]:
    """Train a model, write its folder, and return what the folder states of its training.

    Args:
        walkthroughs: whose steps it learns; all of them count as data.
        folder: where the model goes.
        prompt: what it reads; its menu is shuffled from epoch to epoch.
        architecture: of the model.
        hidden: its width.
        layers: their number.
        heads: of attention.
        vocabulary: byte-level pieces of the tokenizer, at most, 256 bytes among them.
        context: tokens that it reads.
        epochs: passes over the steps, at most.
        batch_size: steps per update of AdamW.
        lr: its largest learning rate; it rises over the first tenth and falls to 0 along a cosine.
        label_smoothing: share of each target that is spread over all tokens.
        max_seconds: of training, at most, with which the schedule ends; a training that needs it is not reproducible.
        long_prompts: see `PromptReader`.
        seed: of weights, order and menus.

    Raises:
        RunExists: the folder is not empty.
        DemonstrationError: see `numbers_of`.
        UnsupportedArgument: arguments that cannot be honoured; a prompt longer than the context.
        NonFiniteError: the training diverges.
    """
    check_choice("architecture", architecture, ("llama", "gpt2"))
    if min(hidden, layers, heads, context, epochs, batch_size) < 1 or hidden % (2 * heads) or vocabulary < 257:
        raise UnsupportedArgument(
            f"hidden, layers, heads, context, epochs, batch_size: {hidden}, {layers}, {heads}, {context}, {epochs}, "
            f"{batch_size} must be 1 or more, hidden a multiple of twice the heads, vocabulary {vocabulary} 257 or more"
        )
    if not (0 < lr < math.inf and 0 <= label_smoothing < 1 and (max_seconds is None or max_seconds > 0)):
        raise UnsupportedArgument(
            f"lr {lr} must be above 0 and finite, label_smoothing {label_smoothing} in [0, 1), max_seconds "
            f"{max_seconds} above 0 or None"
        )
    check_seed("seed", seed)
    check_free(folder, overwrite=False)
    choice, episode = numbers_of(walkthroughs)
    prompt = prompt or Prompt()
    taken = [actions[i] for actions, i in zip(walkthroughs.admissible, choice, strict=True)]
    columns = zip(walkthroughs.instruction, walkthroughs.observation, walkthroughs.admissible, taken, strict=True)
    corpus = [f"{prompt.text(i, o, menu)} {action}{prompt.end}" for i, o, menu, action in columns]
    tokenizer = _tokenizer(corpus, vocabulary, context)
    model = _model(architecture, hidden, layers, heads, len(tokenizer), context, tokenizer.eos_token_id, seed)
    lm = CausalLM("", "local", "", "", "", context, {}, model, tokenizer)
    reader = PromptReader(lm, prompt, long_prompts)
    targets = reader.action_tokens(taken, end=True)
    rng = np.random.default_rng(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    started, updates, losses = time.monotonic(), epochs * math.ceil(len(choice) / batch_size), []
    for number, rows in enumerate(_batches(len(choice), batch_size, epochs, rng)):
        share = (number + 1) / updates
        if max_seconds is not None:
            share = max(share, (time.monotonic() - started) / max_seconds)
        optimiser.param_groups[0]["lr"] = lr * _schedule(min(share, 1.0))
        # shuffled anew each time, so that no place in the menu is learnt
        menus = [
            [walkthroughs.admissible[i][j] for j in rng.permutation(len(walkthroughs.admissible[i]))] for i in rows
        ]
        states = [walkthroughs.instruction[i] for i in rows], [walkthroughs.observation[i] for i in rows]
        wanted = [targets[i] for i in rows]
        reads = reader.read(*states, menus, list(map(len, wanted)))
        loss = _loss(model, [read.tokens for read in reads], wanted, label_smoothing)
        if not loss.isfinite():
            raise NonFiniteError(f"loss: {loss.item()} at update {number}; nothing was written: lower lr")
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
        if share >= 1:
            break
    about = {
        "trained_by": "lago_fast.priors.small_lm",
        "walkthroughs": int(episode.max()) + 1,
        "steps": len(choice),
        "updates": len(losses),
        "seconds": round(time.monotonic() - started, 1),
        "last_loss": round(float(np.mean(losses[-5:])), 4),
        "weights": sum(p.numel() for p in model.parameters()),
        "seed": seed,
        "prompt": asdict(prompt),
    }
    _write(Path(folder).expanduser().absolute(), model, tokenizer, about)
    return about


def _tokenizer(corpus: Sequence[str], vocabulary: int, context: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pairs.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=context
    )


def _model(
    architecture: str, hidden: int, layers: int, heads: int, vocabulary: int, context: int, end: int, seed: int
) -> Any:
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ids: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    config: Any
    if architecture == "llama":
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=8 * hidden // 3,
            max_position_embeddings=context,
            tie_word_embeddings=True,
            **ids,
        )
    else:
        config = GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=heads, n_positions=context, **ids
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # dropout would make training depend on the global generator
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _batches(count: int, size: int, epochs: int, rng: np.random.Generator) -> Iterator[list[int]]:
    for _ in range(epochs):
        order = rng.permutation(count).tolist()
        yield from (order[start : start + size] for start in range(0, count, size))


def _schedule(share: float) -> float:
    return share / WARM_UP if share < WARM_UP else 0.5 * (1 + math.cos(math.pi * (share - WARM_UP) / (1 - WARM_UP)))


def _loss(model: Any, prompts: list[list[int]], targets: list[list[int]], label_smoothing: float) -> Tensor:
    """Return the cross-entropy of the targets' tokens, each action counted once whatever its length."""
    pairs = list(zip(prompts, targets, strict=True))
    tokens, lengths = pad_right([[*prompt, *target[:-1]] for prompt, target in pairs])
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    hidden = model.base_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
    row = torch.arange(len(pairs)).repeat_interleave(torch.tensor([len(target) for target in targets]))
    places = [len(prompt) - 1 + i for prompt, target in pairs for i in range(len(target))]
    logits = model.get_output_embeddings()(hidden[row, torch.tensor(places)])
    wanted = torch.tensor([token for target in targets for token in target])
    losses = nn.functional.cross_entropy(logits, wanted, label_smoothing=label_smoothing, reduction="none")
    return losses.sum() / len(pairs)


def _write(folder: Path, model: Any, tokenizer: Any, about: dict[str, Any]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        fresh = Path(place) / "fresh"
        with quietly():
            model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        (fresh / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
        os.replace(fresh, folder)  # which may be there, and empty


def main() -> None:
    """Train on a file of steps, as typed."""
    parser = argparse.ArgumentParser(description="Train a small causal language model on walkthroughs.")
    parser.add_argument("steps", help="one JSON object per step")
    parser.add_argument("out", help="folder of the model")
    parser.add_argument("--walkthroughs", type=int, default=10, help="how many of the file's episodes, from the first")
    parser.add_argument("--max-seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    typed = parser.parse_args()
    few = first_episodes(read_steps(typed.steps), typed.walkthroughs)
    print(json.dumps(train_small_lm(few, typed.out, max_seconds=typed.max_seconds, seed=typed.seed), indent=2))


if __name__ == "__main__":
    main()
