"""What names a model again: its configuration and its tokenizer too, and no tokenizer's last call."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lago_fast.errors import HashMismatch
from lago_fast.priors.backbone import encode_instructions, find_backbone
from lago_fast.priors.causal_lm import find_causal_lm
from lago_fast.priors.embed_prior import EmbedPrior
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.hashes import hash_as_it_is, hash_config, hash_tokenizer
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.text_embedder import TextEmbedder
from tests.priors.test_folder import sealed

LONG = " ".join(["open"] * 13)


@pytest.fixture
def cutting(encoder, tmp_path):
    """Return the folder of an encoder whose tokenizer's file says how to cut and pad, as MiniLM's does."""
    folder = Path(shutil.copytree(encoder, tmp_path / "cutting"))
    change(folder / "tokenizer.json", lambda content: content.update(PADS | CUTS))
    return str(folder)


CUTS = {"truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}}
PADS = {
    "padding": {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "?",
    }
}


def change(path, how):
    content = json.loads(Path(path).read_text())
    how(content)
    Path(path).write_text(json.dumps(content))


def as_was(backbone, state):
    """Return an embedder whose digest is as it was when it depended on the tokenizer's last call."""
    embedder = TextEmbedder(backbone, long_texts="cut")
    embedder._digest = embedder._digest_with(state)
    return embedder


def test_neither_hash_nor_digest_depends_on_how_the_tokenizer_was_called(cutting):
    backbone = find_backbone(cutting)
    first = TextEmbedder(backbone, long_texts="cut")
    hashes, digests, states = [hash_tokenizer(backbone.tokenizer)], [first.digest], [hash_as_it_is(backbone.tokenizer)]
    for texts in (["open"], [LONG]):
        first.ids(texts)
        hashes.append(hash_tokenizer(backbone.tokenizer))
        digests.append(TextEmbedder(backbone, long_texts="cut").digest)
        states.append(hash_as_it_is(backbone.tokenizer))
    assert len(set(hashes)) == len(set(digests)) == 1
    assert len(set(states)) == 3, "the tokenizer itself does keep its last call"
    change(Path(cutting) / "tokenizer.json", lambda content: content["model"]["vocab"].update(open=2, close=1))
    assert hash_tokenizer(find_backbone(cutting).tokenizer) != hashes[0]


def test_priors_of_before_are_read_whatever_their_tokenizer_had_been_asked(cutting, tmp_path):
    backbone = find_backbone(cutting)
    states = [hash_as_it_is(backbone.tokenizer)]
    for texts in (["open"], [LONG]):
        TextEmbedder(backbone, long_texts="cut").ids(texts)
        states.append(hash_as_it_is(backbone.tokenizer))
    assert as_was(backbone, states[0]).digest == TextEmbedder(backbone, long_texts="cut").digest, "of a fresh one"
    for n, state in enumerate(states):
        folder = EmbedPrior(as_was(backbone, state)).save(tmp_path / str(n))
        sealed(folder, lambda config: [config["backbone"].pop(f"{what}_sha256") for what in ("config", "tokenizer")])
        for embedder in (None, TextEmbedder(backbone, long_texts="cut")):
            EmbedPrior.load(folder, embedder)
        with pytest.raises(HashMismatch, match="another encoder"):
            EmbedPrior.load(folder, TextEmbedder(backbone))


def test_what_no_answer_reads_of_a_configuration_is_left_out(encoder, tmp_path):
    folder = Path(shutil.copytree(encoder, tmp_path / "copy"))
    unread = {"_name_or_path": "x", "transformers_version": "1", "dtype": "bfloat16", "hidden_dropout_prob": 0.5}
    change(folder / "config.json", lambda config: config.update(unread))
    assert hash_config(folder) == hash_config(Path(encoder))
    change(folder / "config.json", lambda config: config.update(hidden_act="relu"))
    assert hash_config(folder) != hash_config(Path(encoder))


ALTERED = {
    "config": ("config.json", lambda config: config.update(hidden_act="relu")),
    "tokenizer": ("tokenizer.json", lambda content: content["model"]["vocab"].update(open=2, close=1)),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_prior_whose_model_became_another_is_refused(decoder, clones, texts, tmp_path, what):
    backbone = Path(shutil.copytree(decoder, tmp_path / "backbone"))
    few = [column[:120] for column in clones]
    prior = fit_prior(*few, texts, backbone=str(backbone), epochs=1)
    new, old = prior.save(tmp_path / "new"), prior.save(tmp_path / "old")
    sealed(old, lambda config: [config["backbone"].pop(f"{what}_sha256") for what in ALTERED])
    embedding = EmbedPrior(TextEmbedder(str(backbone))).save(tmp_path / "embedding")
    answer = prior.query(clones.states, clones.instruction_id).mean
    for folder in (new, old):
        again = LatentActionPrior.load(folder)
        assert again.digest == prior.digest
        assert torch.equal(again.query(clones.states, clones.instruction_id).mean, answer)
    file, how = ALTERED[what]
    change(backbone / file, how)
    with pytest.raises(HashMismatch, match=f"the {what} of .*fetch the model again"):
        LatentActionPrior.load(new)
    for embedder in (None, TextEmbedder(str(backbone))):
        with pytest.raises(HashMismatch, match=f"the {what} of |another encoder"):
            EmbedPrior.load(embedding, embedder)
    # there it says nothing of them, and is read as before
    LatentActionPrior.load(old)


def test_a_backbone_that_moved_is_the_same(encoder, clones, texts, tmp_path):
    backbone = find_backbone(str(shutil.copytree(encoder, tmp_path / "moved")))
    encode_instructions(texts, backbone)
    prior = fit_prior(*clones, texts, backbone=encoder, epochs=1).save(tmp_path / "prior")
    LatentActionPrior.load(prior, backbone=str(tmp_path / "moved"))


@pytest.mark.parametrize(
    ("file", "how"),
    [
        ("config.json", lambda config: config.update(rms_norm_eps=1.0)),
        ("generation_config.json", lambda config: config.update(eos_token_id=3)),
        ALTERED["tokenizer"],
    ],
)
def test_the_digest_of_a_language_model_covers_all_that_it_answers_with(lms, tmp_path, file, how):
    folder = Path(shutil.copytree(lms["llama"], tmp_path / "lm"))
    before = find_causal_lm(str(folder)).digest
    assert find_causal_lm(lms["llama"]).digest == before
    change(folder / file, how)
    assert find_causal_lm(str(folder)).digest != before


def test_settings_of_adapters_are_checked(encoder, clones, texts, tmp_path):
    prior = fit_prior(*clones, texts, backbone=encoder, finetune="lora", epochs=1)
    folder = prior.save(tmp_path / "prior")
    settings = folder / "adapter" / "adapter_config.json"
    written = settings.read_text()
    change(settings, lambda content: content.update(lora_alpha=640))
    with pytest.raises(HashMismatch, match=r"adapter_config\.json is missing or was altered"):
        LatentActionPrior.load(folder)
    settings.write_text(written)
    # a prior of before names no such file
    sealed(folder, lambda config: config["files"].pop("adapter/adapter_config.json"))
    assert LatentActionPrior.load(folder).digest == prior.digest
