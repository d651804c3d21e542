"""Causal language models: found, checked, and without a will of their own in sampling."""

import json
from pathlib import Path

import pytest

from lago_fast.errors import BackboneUnavailable, HashMismatch, UnsupportedArgument
from lago_fast.priors.causal_lm import ABOUT, find_causal_lm


def test_a_local_folder_is_read_frozen_and_named(lms):
    lm = find_causal_lm(lms["llama"])
    assert (lm.source, lm.max_tokens, lm.about) == ("local", 64, {})
    assert not any(p.requires_grad for p in lm.model.parameters())
    assert not lm.model.training
    assert find_causal_lm(lms["llama"], expected_sha256=lm.sha256).digest == lm.digest
    assert find_causal_lm(lms["llama"], dtype="bfloat16").digest != lm.digest
    assert find_causal_lm(lms["gpt2"]).digest != lm.digest


def test_what_a_checkpoint_would_have_sampled_with_does_not_count(lms, tmp_path):
    from transformers import GenerationConfig

    lm = find_causal_lm(lms["llama"])
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    GenerationConfig(do_sample=True, temperature=0.1, repetition_penalty=1.5, eos_token_id=[3, 4]).save_pretrained(
        tmp_path
    )
    own = find_causal_lm(str(tmp_path)).model.generation_config
    assert own.eos_token_id == [3, 4]
    assert own.repetition_penalty in (None, 1.0)
    assert own.temperature in (None, 1.0)


def test_a_window_of_attention_is_the_context(tmp_path):
    from transformers import MistralConfig
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    lm = find_causal_lm(_with_window(tmp_path, MistralConfig, AutoModelForCausalLM))
    assert lm.max_tokens == 8


def _with_window(folder, config, auto):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes = {"vocab_size": 4, "intermediate_size": 8, "max_position_embeddings": 64, "sliding_window": 8}
    auto.from_config(config(**small, **sizes)).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 0, "go": 1}, unk_token="?"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return str(folder)


def test_what_cannot_be_used_is_refused(lms, encoder, tmp_path):
    with pytest.raises(UnsupportedArgument, match="bert, no causal decoder"):
        find_causal_lm(encoder)
    with pytest.raises(HashMismatch, match="expected 00"):
        find_causal_lm(lms["gpt2"], expected_sha256="00")
    with pytest.raises(UnsupportedArgument, match="dtype"):
        find_causal_lm(lms["gpt2"], dtype="int8")
    with pytest.raises(BackboneUnavailable, match="no local folder"):
        find_causal_lm(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(("file", "damage"), [("config.json", {"n_embd": "wide"}), ("tokenizer.json", {"model": 0})])
def test_a_folder_that_is_not_whole_is_refused(lms, tmp_path, file, damage):
    for path in Path(lms["gpt2"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | damage))
    with pytest.raises(BackboneUnavailable, match=r"lm: .* cannot be loaded"):
        find_causal_lm(str(tmp_path))


@pytest.mark.parametrize("record", ["{", "[]", json.dumps({"walkthroughs": 3})])
def test_the_record_of_training_is_read(lms, tmp_path, record):
    for file in Path(lms["gpt2"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / ABOUT).write_text(record)
    if record.startswith('{"'):
        assert find_causal_lm(str(tmp_path)).about == {"walkthroughs": 3}
    else:
        with pytest.raises(BackboneUnavailable, match="damaged"):
            find_causal_lm(str(tmp_path))
