"""Soft tokens come at the scale of the words that they stand among, also where an embedding scales its weights."""

import pytest
import torch
from torch import nn

from lago_fast.priors import parts
from lago_fast.priors.backbone import find_backbone
from lago_fast.priors.config import PriorConfig
from lago_fast.priors.latent_action import LatentActionPrior
from tests.priors.conftest import WORDS, write_backbone

SMALL = {"vocab_size": len(WORDS) + 1, "max_position_embeddings": 16, "pad_token_id": 0}
GEMMA = {"hidden_size": 16, "head_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def scaled(name):
    from transformers import BartConfig, Gemma3TextConfig, GemmaConfig

    if name == "bart":
        sides = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
        return BartConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, scale_embedding=True, **sides, **SMALL)
    config = GemmaConfig if name == "gemma" else Gemma3TextConfig
    return config(num_key_value_heads=1, **GEMMA, **SMALL)


@pytest.mark.parametrize("name", ["gemma", "gemma3", "bart"])
def test_a_scaled_embedding_is_taken_as_the_transformer_reads_it(name, texts, tmp_path, monkeypatch):
    backbone = find_backbone(str(write_backbone(tmp_path / "backbone", scaled(name))))
    words = backbone.model.get_input_embeddings()
    monkeypatch.setattr(parts, "WORDS_AT_A_TIME", 4)
    prior = LatentActionPrior(PriorConfig("categorical", 6, 4), backbone, texts).freeze()
    read = words(torch.arange(len(words.weight)))
    torch.testing.assert_close(prior.token_rms, read.square().mean().sqrt())
    # what was fitted at another scale keeps it
    prior.token_rms /= 4
    again = LatentActionPrior.load(prior.save(tmp_path / "prior"))
    assert torch.equal(again.token_rms, prior.token_rms)


def test_of_a_plain_embedding_it_is_that_of_the_weights():
    words = nn.Embedding(10, 6)
    torch.testing.assert_close(parts.token_rms(words), words.weight.detach().square().mean().sqrt(), rtol=0, atol=0)
