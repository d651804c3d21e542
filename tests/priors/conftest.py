"""Tiny backbones, built here: one-layer BERT and Llama with random weights and a word-level tokenizer."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

WORDS = ["open", "close", "push", "pull", "the", "drawer", "window", "door", "button", "slowly"]
Z = 16  # hidden size of both


class Clones(NamedTuple):
    """Demonstrations of a linear expert whose action depends on the instruction."""

    states: Tensor  # [n, 6]
    actions: Tensor  # [n, 2] float32, or [n] int64
    instruction_id: Tensor  # [n]
    episode_id: Tensor  # [n]


def write_backbone(folder: Path, config: Any, seed: int = 0) -> Path:
    """Write a randomly initialised model and a tokenizer as transformers would."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModel, PreTrainedTokenizerFast

    torch.manual_seed(seed)
    AutoModel.from_config(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", *WORDS])}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


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
