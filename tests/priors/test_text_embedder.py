"""The table of texts' vectors: each read once, equal to what the backbone says, kept in a file, stable ids."""

import dataclasses

import pytest
import torch

from lago_fast.errors import CacheMismatch, UnsupportedArgument
from lago_fast.priors.backbone import encode_instructions, find_backbone
from lago_fast.priors.text_base import TextEncoder
from lago_fast.priors.text_embedder import TextEmbedder


@pytest.fixture
def embedder(encoder):
    return TextEmbedder(encoder)


def test_it_keeps_the_contract(embedder):
    assert isinstance(embedder, TextEncoder)
    assert embedder.width == 16
    assert not any(p.requires_grad for p in embedder.parameters())
    assert embedder.encode([]).shape == (0, 16)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_vectors_are_those_of_the_backbone_whatever_the_batches(families, family, texts):
    expected = encode_instructions(texts, find_backbone(families[family]))
    for batch_tokens in (1, 6, 512):
        found = TextEmbedder(families[family], batch_tokens=batch_tokens).encode([*texts, *texts[::-1]])
        torch.testing.assert_close(found, torch.cat([expected, expected.flip(0)]))
        torch.testing.assert_close(found.norm(dim=1), torch.ones(6))


def test_each_text_is_read_once(embedder, texts):
    calls = []
    embedder.backbone.model.register_forward_hook(lambda *_: calls.append(1))
    first = embedder.encode([*texts, texts[0]])
    read = len(calls)
    assert torch.equal(embedder.encode(texts), first[:3])
    assert len(calls) == read
    log = embedder.telemetry()
    assert (log["text/asked"], log["text/read"], log["text/distinct"]) == (7, 3, 3)
    assert embedder.telemetry()["text/asked"] == 0


def test_ids_stay_while_the_table_grows(embedder, texts):
    ids = embedder.ids(texts)
    assert ids.dtype == torch.int64
    before = embedder.table.clone()
    many = [f"open the {i}" for i in range(3000)]
    embedder.ids(many)
    assert torch.equal(embedder.ids(texts), ids)
    assert torch.equal(embedder.table[:3], before)
    assert embedder.table.shape == (3003, 16)
    assert embedder.texts[:4] == [*texts, many[0]]
    square = torch.stack([ids, ids.flip(0)])
    assert torch.equal(embedder.rows(square), embedder.table[square])


def test_a_number_that_is_no_id_is_refused(embedder, texts):
    embedder.ids(texts)
    for wrong in (3, -1):
        with pytest.raises(UnsupportedArgument, match=r"0\.\.2"):
            embedder.rows(torch.tensor([wrong]))


def test_a_file_answers_the_next_process_bit_for_bit(encoder, texts, tmp_path):
    first = TextEmbedder(encoder, path=tmp_path / "texts")
    rows = first.encode(texts[:2])
    first.close()
    again = TextEmbedder(encoder, path=tmp_path / "texts")
    assert torch.equal(again.encode([texts[2], *texts[:2]])[1:], rows)
    log = again.telemetry()
    assert (log["text/read"], log["text/file_hits"]) == (1, 2)
    again.close()


def test_a_file_of_another_backbone_is_refused(encoder, families, tmp_path):
    TextEmbedder(encoder, path=tmp_path / "texts").close()
    with pytest.raises(CacheMismatch, match="salt"):
        TextEmbedder(families["bert"], path=tmp_path / "texts")


def test_a_long_text_is_refused_or_cut_as_asked(encoder):
    long = " ".join(["open"] * 13)
    with pytest.raises(UnsupportedArgument, match="at most 12"):
        TextEmbedder(encoder).encode([long])
    cutting = TextEmbedder(encoder, long_texts="cut")
    exactly = " ".join(["open"] * 12)
    found = cutting.encode([long, exactly])
    torch.testing.assert_close(found[0], found[1])
    assert cutting.telemetry()["text/cut"] == 1
    assert cutting.digest != TextEmbedder(encoder).digest
    shorter = dataclasses.replace(find_backbone(encoder), max_tokens=6)
    assert TextEmbedder(shorter, long_texts="cut").digest != cutting.digest


def test_what_cannot_be_honoured_is_refused(encoder):
    with pytest.raises(UnsupportedArgument, match="no tokens"):
        TextEmbedder(encoder).encode([""])
    with pytest.raises(UnsupportedArgument, match="long_texts"):
        TextEmbedder(encoder, long_texts="shorten")
    with pytest.raises(UnsupportedArgument, match="batch_tokens"):
        TextEmbedder(encoder, batch_tokens=0)


def test_the_pretrained_encoder_knows_what_is_alike(minilm):
    embedder = TextEmbedder()
    assert embedder.backbone.name == minilm
    rows = embedder.encode(["open the drawer", "pull the drawer open", "slice the tomato"])
    alike = rows @ rows.T
    assert alike[0, 1] > 0.7
    assert alike[0, 2] < 0.4
