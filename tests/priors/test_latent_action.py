"""The latent-action prior on tiny backbones: its sequence, what is tuned, how it answers, how it is kept."""

import json
from dataclasses import replace

import pytest
import torch

from lago_fast.errors import HashMismatch, NonFiniteError, PriorMismatch, RunExists, UnsupportedArgument
from lago_fast.priors.backbone import encode_instructions, find_backbone
from lago_fast.priors.base import ActionPrior
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior, PriorConfig

BOX = {"action_low": (-1.0, -1.0), "action_high": (1.0, 1.0)}
GAUSSIAN = PriorConfig("gaussian", 6, 2, **BOX)
CATEGORICAL = PriorConfig("categorical", 6, 4)


def build(name, texts, config=GAUSSIAN):
    torch.manual_seed(0)
    return LatentActionPrior(config, find_backbone(name), texts)


def assert_same(first, second):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert torch.equal(a, b)


# the sequence


@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_prompt_is_the_text_then_the_state_whatever_else_is_in_the_batch(family, texts, request):
    prior = build(request.getfixturevalue(family), texts, replace(GAUSSIAN, form="prompt")).freeze()
    state, ids = torch.randn(3, 6), torch.tensor([2, 1, 0])
    together = prior.query(state, ids).latent
    for row in range(3):
        backbone = find_backbone(request.getfixturevalue(family))
        tokens = torch.tensor([backbone.tokenizer(texts[ids[row]])["input_ids"]])
        words = backbone.model.get_input_embeddings()(tokens)
        token = prior.projector(prior.normalise(state[row : row + 1])) * prior.token_rms
        hidden = backbone.model(inputs_embeds=torch.cat([words, token[:, None]], dim=1)).last_hidden_state
        torch.testing.assert_close(together[row], hidden[0, -1], atol=1e-5, rtol=1e-5)


def test_pooled_is_the_instruction_latent_then_the_state(encoder, texts):
    prior = build(encoder, texts).freeze()
    state = torch.randn(1, 6)
    backbone = find_backbone(encoder)
    text = encode_instructions(texts, backbone)[1] * 4.0  # the root of 16: entries of mean square 1
    sequence = torch.stack([text, prior.projector(state)[0]]) * prior.token_rms
    hidden = backbone.model(inputs_embeds=sequence[None]).last_hidden_state
    torch.testing.assert_close(prior.query(state, torch.tensor([1])).latent[0], hidden[0, 1], atol=1e-5, rtol=1e-5)


def test_instructions_are_encoded_once(encoder, texts):
    prior = build(encoder, texts).freeze()
    calls = []
    prior.transformer.register_forward_pre_hook(lambda _, __, kwargs: calls.append(kwargs), with_kwargs=True)
    prior.query(torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1]))
    assert [tuple(c["inputs_embeds"].shape) for c in calls] == [(5, 2, 16)]


def test_the_table_is_of_unit_length_and_a_copy(encoder, texts):
    prior = build(encoder, texts)
    table = prior.instruction_table()
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, encode_instructions(texts, encoder))
    table.zero_()
    assert prior.instruction_table().norm() > 1


# what is tuned


@pytest.mark.parametrize("finetune", ["frozen", "lora", "full"])
def test_only_what_is_to_be_tuned_has_gradients_and_changes(finetune, clones, encoder, texts):
    prior = build(encoder, texts, replace(GAUSSIAN, finetune=finetune))
    trained = {n for n, p in prior.transformer.named_parameters() if p.requires_grad}
    every = dict(prior.transformer.named_parameters())
    expected = {"frozen": set(), "full": set(every), "lora": {n for n in every if "lora_" in n}}[finetune]
    assert trained == expected
    assert bool(trained) == (finetune != "frozen")

    before = dict(find_backbone(encoder).model.named_parameters())
    fitted = fit_prior(*clones, texts, backbone=encoder, finetune=finetune, epochs=2, lr=1e-2)
    assert not any(p.requires_grad for p in fitted.parameters())
    assert not fitted.training
    inner = fitted.transformer.get_base_model() if finetune == "lora" else fitted.transformer
    after = {n.replace(".base_layer", ""): p for n, p in inner.named_parameters() if "lora_" not in n}
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert bool(changed) == (finetune == "full")


def test_a_frozen_transformer_never_drops_anything(encoder, texts):
    prior = build(encoder, texts).train()
    assert prior.training
    assert not any(m.training for m in prior.transformer.modules())
    assert build(encoder, texts, replace(GAUSSIAN, finetune="full")).train().transformer.training


# how it answers


def test_it_is_a_prior_and_answers_by_contract(encoder, texts):
    prior = build(encoder, texts).freeze()
    assert isinstance(prior, ActionPrior)
    answer = prior.query(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))
    assert answer.mean.shape == answer.log_std.shape == (5, 2)
    assert answer.latent.shape == (5, 16)
    assert answer.log_probs is None
    assert not answer.mean.requires_grad
    assert prior.telemetry() == {}
    discrete = build(encoder, texts, CATEGORICAL).freeze().query(torch.randn(5, 6), torch.zeros(5, dtype=torch.int64))
    assert discrete.log_probs.shape == (5, 4)
    assert discrete.mean is None


def test_mean_is_clamped_to_the_box_and_std_floored(encoder, texts):
    config = PriorConfig("gaussian", 6, 2, (-0.5, -1.0), (0.5, 2.0), std_init=0.01, std_floor=0.2)
    prior = build(encoder, texts, config).freeze()
    torch.nn.init.constant_(prior.head.bias, 5.0)
    answer = prior.query(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64))
    assert torch.equal(answer.mean, torch.tensor([[0.5, 2.0]]).expand(4, 2))
    torch.testing.assert_close(answer.log_std.exp(), torch.full((4, 2), 0.2))
    torch.nn.init.constant_(prior.log_std, 0.0)
    assert torch.equal(prior.query(torch.randn(4, 6), torch.zeros(4, dtype=torch.int64)).log_std, torch.zeros(4, 2))


def test_chunks_do_not_change_answers(encoder, texts):
    prior = build(encoder, texts).freeze()
    state, ids = torch.randn(10, 6), torch.arange(10) % 3
    whole = prior.query(state, ids)
    prior.query_batch_size = 3
    for a, b in zip(whole, prior.query(state, ids), strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_prior_owns_its_normaliser(encoder, texts):
    prior = build(encoder, texts)
    states = torch.tensor([[0.0] * 6, [4.0] * 6])
    states[:, 5] = 7.0
    prior.fit_normaliser(states, torch.arange(2))
    assert prior.normalise(states).tolist() == [[-1.0] * 5 + [0.0], [1.0] * 5 + [0.0]]
    assert prior.normalise(states + 1e6).max() == prior.config.state_clip


def test_a_head_that_reads_the_state_starts_from_the_words_and_a_small_token(encoder, texts):
    config = replace(CATEGORICAL, head_hidden=8, state_path="token_and_head")
    prior = build(encoder, texts, config)
    states, ids = torch.randn(40, 6), torch.arange(40) % 2
    prior.fit_normaliser(states, ids)
    words = prior._instruction(torch.arange(2))
    torch.testing.assert_close(words, torch.stack([-words[1], words[1]]))  # standardised over the two that were named
    assert words.square().mean() == pytest.approx(1.0, abs=0.05)
    out = prior(states, ids)
    assert torch.equal(out.latent[:, -6:], prior.normalise(states))
    usual = torch.nn.Linear(6, prior.table.shape[1])(prior.normalise(states))
    assert prior.projector(prior.normalise(states)).std() < 0.5 * usual.std()


def test_who_reads_the_state_is_kept_and_a_prior_of_before_is_read(encoder, texts, tmp_path):
    for path in ("token", "token_and_head"):
        prior = build(encoder, texts, replace(CATEGORICAL, head_hidden=8, state_path=path)).freeze()
        folder = prior.save(tmp_path / path)
        state, ids = torch.randn(3, 6), torch.arange(3)
        assert_same(LatentActionPrior.load(folder).query(state, ids), prior.query(state, ids))
    config = json.loads((tmp_path / "token" / "config.json").read_text())
    del config["prior"]["state_path"], config["sha256"]
    (tmp_path / "token" / "config.json").write_text(json.dumps(config))
    assert LatentActionPrior.load(tmp_path / "token").digest == config["digest"]
    with pytest.raises(UnsupportedArgument, match=r"state_path: .*head_hidden"):
        replace(CATEGORICAL, state_path="token_and_head")
    with pytest.raises(UnsupportedArgument, match="state_path"):
        replace(CATEGORICAL, state_path="head")


def test_bad_queries_are_refused(encoder, texts):
    prior = build(encoder, texts).freeze()
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(PriorMismatch, match="rows of 6"):
        prior.query(torch.zeros(1, 7), zero)
    with pytest.raises(NonFiniteError, match="row 0"):
        prior.query(torch.full((1, 6), torch.nan), zero)


def test_what_cannot_be_built_is_refused(encoder, texts):
    with pytest.raises(PriorMismatch, match="action_low, action_high"):
        PriorConfig("gaussian", 6, 2)
    with pytest.raises(UnsupportedArgument, match="form: 'soft'"):
        replace(GAUSSIAN, form="soft")
    with pytest.raises(PriorMismatch, match="occurs twice"):
        build(encoder, [*texts, texts[0]])


# how it is kept


def test_the_digest_changes_with_any_weight_text_or_setting(encoder, texts):
    prior = build(encoder, texts, replace(GAUSSIAN, finetune="full")).freeze()
    seen = {prior.digest}
    assert prior.digest in seen
    for tensor in prior.state_dict().values():
        if tensor.numel():
            tensor.view(-1)[0] += 1
            seen.add(prior.digest)
    tensors = sum(1 for t in prior.state_dict().values() if t.numel())
    assert len(seen) == 1 + tensors
    seen |= {build(encoder, texts[:2]).digest, build(encoder, texts, replace(GAUSSIAN, std_floor=0.1)).digest}
    assert len(seen) == 3 + tensors


@pytest.mark.parametrize("finetune", ["frozen", "lora", "full"])
@pytest.mark.parametrize("family", ["encoder", "decoder"])
def test_a_saved_prior_answers_the_same(family, finetune, clones, texts, tmp_path, request):
    name = request.getfixturevalue(family)
    prior = fit_prior(*clones, texts, backbone=name, finetune=finetune, epochs=1, lr=1e-2)
    folder = prior.save(tmp_path / "deep" / "prior")
    again = LatentActionPrior.load(folder)
    assert again.digest == prior.digest
    assert again.instructions == texts
    assert again.metrics == prior.metrics
    assert not any(p.requires_grad for p in again.parameters())
    few = clones.states[:9], clones.instruction_id[:9]
    assert_same(prior.query(*few), again.query(*few))
    kept = {path.name for path in folder.iterdir()}
    assert (
        kept
        == {"config.json", "metrics.json", "prior.safetensors"}
        | {
            "frozen": set(),
            "lora": {"adapter"},
            "full": {"backbone.safetensors"},
        }[finetune]
    )
    assert {p.name for p in folder.parent.iterdir()} == {"prior"}, "nothing half-written is left"
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["sha256"] == find_backbone(name).sha256


def test_layers_and_random_weights_survive_saving(clones, encoder, texts, tmp_path):
    prior = fit_prior(*clones, texts, backbone=encoder, random_init=True, layers=1, head_hidden=8, epochs=1, seed=5)
    again = LatentActionPrior.load(prior.save(tmp_path / "prior"))
    assert again.reference["random_init"] is True
    few = clones.states[:9], clones.instruction_id[:9]
    assert_same(prior.query(*few), again.query(*few))


def test_altered_files_are_refused(encoder, texts, tmp_path):
    folder = build(encoder, texts).freeze().save(tmp_path / "prior")
    content = bytearray((folder / "prior.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "prior.safetensors").write_bytes(content)
    with pytest.raises(HashMismatch, match=r"prior\.safetensors is missing or was altered"):
        LatentActionPrior.load(folder)
    (folder / "prior.safetensors").unlink()
    with pytest.raises(HashMismatch):
        LatentActionPrior.load(folder)


def test_an_edited_configuration_is_refused(encoder, texts, tmp_path):
    folder = build(encoder, texts).freeze().save(tmp_path / "prior")
    config = json.loads((folder / "config.json").read_text())
    config["prior"]["std_floor"] = 0.01
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HashMismatch, match=r"config\.json was altered"):
        LatentActionPrior.load(folder)
    # nor one from before there was a checksum
    del config["sha256"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HashMismatch, match="digest"):
        LatentActionPrior.load(folder)


def test_another_backbone_is_refused(encoder, decoder, texts, tmp_path):
    folder = build(encoder, texts).freeze().save(tmp_path / "prior")
    with pytest.raises(HashMismatch, match="another revision"):
        LatentActionPrior.load(folder, backbone=decoder)


def test_a_moved_backbone_is_found_by_hand(encoder, texts, tmp_path):
    import shutil

    shutil.copytree(encoder, tmp_path / "first")
    prior = build(str(tmp_path / "first"), texts).freeze()
    folder = prior.save(tmp_path / "prior")
    (tmp_path / "first").rename(tmp_path / "second")
    again = LatentActionPrior.load(folder, backbone=str(tmp_path / "second"))
    again.extend_instructions(["push the door"])
    assert len(again.instructions) == 4
    assert again.digest != prior.digest


def test_nothing_is_overwritten_unasked(encoder, texts, tmp_path):
    prior = build(encoder, texts).freeze()
    folder = prior.save(tmp_path / "prior")
    with pytest.raises(RunExists, match="overwrite"):
        prior.save(folder)
    torch.nn.init.zeros_(prior.head.bias)
    prior.metrics = {"note": 1}
    prior.save(folder, overwrite=True)
    assert LatentActionPrior.load(folder).metrics == {"note": 1}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/thesis.txt").write_text("mine")
    with pytest.raises(RunExists, match="never replaced"):
        prior.save(tmp_path / "other", overwrite=True)


def test_a_folder_without_a_prior_is_refused(tmp_path):
    with pytest.raises(PriorMismatch, match="no readable prior"):
        LatentActionPrior.load(tmp_path)
    (tmp_path / "config.json").write_text('{"format_version": 99}')
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(PriorMismatch, match="in format 99"):
        LatentActionPrior.load(tmp_path)


@pytest.mark.parametrize("form", ["pooled", "prompt"])
def test_instructions_can_be_added(form, encoder, texts):
    prior = build(encoder, texts, replace(GAUSSIAN, form=form)).freeze()
    state = torch.randn(1, 6)
    before, digest = prior.query(state, torch.tensor([1])), prior.digest
    prior.extend_instructions([texts[0], "pull the door", "pull the door"])
    assert prior.instructions == [*texts, "pull the door"]
    assert prior.digest != digest
    torch.testing.assert_close(prior.query(state, torch.tensor([1])).mean, before.mean)
    expected = build(encoder, [*texts, "pull the door"], replace(GAUSSIAN, form=form)).freeze()
    torch.testing.assert_close(
        prior.query(state, torch.tensor([3])).mean, expected.query(state, torch.tensor([3])).mean
    )
    torch.testing.assert_close(prior.instruction_table(), expected.instruction_table())


@pytest.mark.parametrize(
    "wrong", [{"std_floor": float("nan")}, {"std_floor": float("inf")}, {"std_init": float("nan")}]
)
def test_stds_that_are_no_numbers_are_refused(wrong):
    with pytest.raises(UnsupportedArgument, match="std_init, std_floor"):
        replace(GAUSSIAN, **wrong)
