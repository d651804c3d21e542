"""What the tests of the command line share: a call, a refusal, and a tiny language model."""

from collections.abc import Callable
from pathlib import Path

import pytest

from lago_fast import cli


def lago(*words: object) -> int:
    """Run a command and return its exit code."""
    return cli.main([str(word) for word in words])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must fail as a user's mistake; return the one line that it prints."""

    def run(*words: object) -> str:
        capsys.readouterr()
        assert lago(*words) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        return lines[-1]

    return run


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights and a word-piece tokenizer, as a local folder."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    folder = tmp_path_factory.mktemp("backbone")
    letters = [prefix + chr(i) for i in range(ord("a"), ord("z") + 1) for prefix in ("", "##")]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return folder
