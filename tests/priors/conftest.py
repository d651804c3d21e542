"""Tiny backbones, built here: BERT, Llama, Qwen2, GPT-2 and T5 with random weights and a word-level tokenizer."""

import importlib.metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lago_fast.priors.locate import DEFAULT_BACKBONE, PACKAGE

WORDS = ["open", "close", "push", "pull", "the", "drawer", "window", "door", "button", "slowly"]
Z = 16  # hidden size of both


class Clones(NamedTuple):
    """Demonstrations of a linear expert whose action depends on the instruction."""

    states: Tensor  # [n, 6]
    actions: Tensor  # [n, 2] float32, or [n] int64
    instruction_id: Tensor  # [n]
    episode_id: Tensor  # [n]


def write_backbone(folder: Path, config: Any, seed: int = 0) -> Path:
    """Write a randomly initialised model and a tokenizer, of one token per word, as transformers would."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, PreTrainedTokenizerFast, Qwen2Tokenizer

    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    if config.model_type == "qwen2":  # whose tokenizer is read as byte pairs whatever was written
        Qwen2Tokenizer(*_byte_pairs()).save_pretrained(folder)
        return folder
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


def write_causal_lm(folder: Path, config: Any, seed: int = 0) -> str:
    """Write a randomly initialised model with its head, and the tokenizer of one token per word."""
    from transformers import AutoModelForCausalLM

    write_backbone(folder, config)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def _byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges that make one token of every word, behind a space or not."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        merges |= {(word[:i], word[i]): None for i in range(1, len(word))} | {("Ġ", word): None}
    pieces = ["<|endoftext|>", *"Ġabcdefghijklmnopqrstuvwxyz", *("".join(pair) for pair in merges)]
    return {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, list(merges)


@pytest.fixture(scope="session")
def minilm() -> str:
    """Return the name of the pretrained encoder; skip where its package is not installed."""
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the PyPI package {PACKAGE} is not installed")
    return DEFAULT_BACKBONE


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Return three instructions of different lengths."""
    return ["open the drawer", "close the window slowly", "push the button"]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a one-layer BERT."""
    from transformers import BertConfig

    config = BertConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=Z,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.3,  # at the usual 0.02 so narrow a model hardly mixes its tokens
    )
    return str(write_backbone(tmp_path_factory.mktemp("encoder"), config))


@pytest.fixture(scope="session")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a one-layer Llama."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=len(WORDS) + 1,
        hidden_size=Z,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=12,
        initializer_range=0.3,  # at the usual 0.02 so narrow a model hardly mixes its tokens
    )
    return str(write_backbone(tmp_path_factory.mktemp("decoder"), config))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of two-layer backbones of every family, hidden size 32, by name."""
    from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen2Config, RobertaConfig, T5Config

    shared: dict[str, Any] = {"vocab_size": len(WORDS) + 1, "max_position_embeddings": 12, "initializer_range": 0.3}
    wide: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        "bert": BertConfig(intermediate_size=64, **shared, **wide),
        "roberta": RobertaConfig(intermediate_size=64, **shared, **wide),
        "llama": LlamaConfig(intermediate_size=64, num_key_value_heads=1, **shared, **wide),
        "qwen2": Qwen2Config(intermediate_size=64, num_key_value_heads=1, **{**shared, **wide, "vocab_size": 256}),
        "gpt2": GPT2Config(vocab_size=11, n_positions=12, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
        "t5": T5Config(vocab_size=11, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
    }
    root = tmp_path_factory.mktemp("families")
    return {name: str(write_backbone(root / name, config)) for name, config in configs.items()}


@pytest.fixture(scope="session")
def lms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the folders of two-layer causal language models that read 64 tokens, by family."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    shared: dict[str, Any] = {"max_position_embeddings": 64, "initializer_range": 0.3}
    wide: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    wide |= {"intermediate_size": 64, "num_key_value_heads": 1}
    configs = {
        "llama": LlamaConfig(vocab_size=11, **shared, **wide),
        "qwen2": Qwen2Config(vocab_size=256, **shared, **wide),
        "gpt2": GPT2Config(vocab_size=11, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    }
    root = tmp_path_factory.mktemp("lms")
    return {name: write_causal_lm(root / name, config) for name, config in configs.items()}


@pytest.fixture(scope="session")
def clones() -> Clones:
    """Return 40 episodes of 20 steps: action = W[instruction] @ state + noise of std 0.1."""
    generator = torch.Generator().manual_seed(1)
    weights = 0.25 * torch.randn(3, 2, 6, generator=generator)
    episode_id = torch.arange(40).repeat_interleave(20)
    ids = episode_id % 3
    states = 3 + 2 * torch.randn(800, 6, generator=generator)
    actions = torch.einsum("nds,ns->nd", weights[ids], (states - 3) / 2)
    actions = (actions + 0.1 * torch.randn(800, 2, generator=generator)).clamp(-1, 1)
    return Clones(states, actions, ids, episode_id)


@pytest.fixture(scope="session")
def choices(clones: Clones) -> Clones:
    """Return the same episodes with four discrete actions: the signs of the continuous one."""
    return clones._replace(actions=(clones.actions > 0).long() @ torch.tensor([1, 2]))
