"""Trust falls with the distance from the demonstrations, is kept with the prior, and can be left out."""

import math

import pytest
import torch

from lago_fast.errors import UnsupportedArgument
from lago_fast.priors.cache import CacheConfig
from lago_fast.priors.cached_prior import CachedPrior
from lago_fast.priors.finetune import fit_prior
from lago_fast.priors.latent_action import LatentActionPrior
from lago_fast.priors.quantize import quantize_prior
from lago_fast.priors.trust import INSIDE, Demonstrated, encode_again, remember


@pytest.fixture(scope="module")
def prior(clones, encoder, texts) -> LatentActionPrior:
    return fit_prior(*clones, texts, backbone=encoder, epochs=3, lr=1e-2)


def test_by_hand():
    trust = Demonstrated(torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor(2.0))
    found = trust(torch.tensor([[0.0, 0.0], [0.0, 2.0], [0.0, 4.0], [10.0, -6.0]]))
    expected = [1.0, 1.0, math.exp((1 - 4) / 2), math.exp((1 - 9) / 2)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_demonstrated_states_are_trusted_and_others_less_the_further_they_are(prior, clones):
    away = [
        prior.query(clones.states + size * prior.std_state, clones.instruction_id).trust for size in (0.0, 1.5, 4.0)
    ]
    assert all(trust.shape == (800,) and bool(((trust >= 0) & (trust <= 1)).all()) for trust in away)
    assert away[0].mean() > 0.97
    assert away[0].mean() > away[1].mean() + 0.1 > away[2].mean() + 0.2


def test_the_unit_is_the_distance_between_episodes(prior, clones):
    found = remember(prior, clones.states, clones.instruction_id, clones.episode_id, 800)
    latent = prior.query(clones.states, clones.instruction_id).latent
    torch.testing.assert_close(found.latents, latent)
    same = clones.episode_id[:, None] == clones.episode_id
    others = torch.cdist(latent, latent).masked_fill(same, math.inf).amin(1)
    torch.testing.assert_close(found.scale, others.quantile(INSIDE))
    few = remember(prior, clones.states, clones.instruction_id, clones.episode_id, 5)
    torch.testing.assert_close(few.latents, latent[[0, 200, 400, 599, 799]])


def test_it_is_part_of_the_answer_and_of_the_digest_and_kept(prior, clones, encoder, texts, tmp_path):
    few = clones.states[:9], clones.instruction_id[:9]
    again = LatentActionPrior.load(prior.save(tmp_path / "prior"))
    assert torch.equal(again.query(*few).trust, prior.query(*few).trust)
    without = fit_prior(*clones, texts, backbone=encoder, epochs=3, lr=1e-2, trust_rows=0)
    assert without.query(*few).trust is None
    assert LatentActionPrior.load(without.save(tmp_path / "without")).query(*few).trust is None
    assert torch.equal(without.query(*few).mean, prior.query(*few).mean)
    assert without.digest != prior.digest
    with pytest.raises(UnsupportedArgument, match="trust_rows: finite and not negative"):
        fit_prior(*clones, texts, backbone=encoder, trust_rows=-1)


def test_one_episode_has_nothing_to_be_measured_by(clones, encoder, texts):
    first = [column[:20] for column in clones]
    prior = fit_prior(*first, texts, backbone=encoder, epochs=1, val_fraction=0)
    assert prior.demonstrated is None


def test_caches_and_quantized_priors_pass_it_on(prior, clones):
    few = clones.states[:9], clones.instruction_id[:9]
    trust = prior.query(*few).trust
    torch.testing.assert_close(CachedPrior(prior, CacheConfig(1 << 20)).query(*few).trust, trust, atol=1e-3, rtol=0)
    shown = {"calibration_states": clones.states, "calibration_ids": clones.instruction_id}
    quantized = quantize_prior(prior, "bf16", *few, **shown)
    torch.testing.assert_close(quantized.query(*few).trust, trust, atol=0.05, rtol=0)


def test_the_unit_grows_by_what_rounding_adds():
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(400, 8, generator=generator)
    known = Demonstrated(exact[:100], torch.tensor(3.0))
    same = encode_again(known, exact, exact)
    torch.testing.assert_close(same.scale, known.scale)
    shift = torch.ones(8)
    moved = encode_again(known, exact, exact + shift)
    torch.testing.assert_close(moved.scale, known.scale, atol=1e-3, rtol=0)
    torch.testing.assert_close(moved.latents, same.latents + shift)
    rounded = encode_again(known, exact, exact + 0.5 * torch.randn(400, 8, generator=generator))
    assert 3.1 < rounded.scale < (3.0**2 + 2 * 8 * 0.5**2) ** 0.5


def test_a_quantized_prior_trusts_what_the_exact_one_trusts(prior, clones, tmp_path, caplog):
    away = clones.states + 1.5 * prior.std_state * torch.linspace(0, 1, 800)[:, None]
    asked = away, clones.instruction_id
    exact, few = prior.query(*asked).trust, (clones.states[:64], clones.instruction_id[:64])
    shown = {"calibration_states": clones.states, "calibration_ids": clones.instruction_id}
    quantized = quantize_prior(prior, "nf4", *few, **shown)
    answer = quantized.query(*asked)
    off, before = ((t - exact).abs().mean() for t in (answer.trust, prior.demonstrated(answer.latent)))
    assert off < 0.05
    assert before > 2 * off, (off, before)
    assert quantized.metrics["quantization"]["trust_states"] == 512
    assert not torch.equal(quantized.demonstrated.latents, prior.demonstrated.latents)
    again = LatentActionPrior.load(quantized.save(tmp_path / "quantized"))
    assert torch.equal(again.query(*asked).trust, answer.trust)
    assert not caplog.records


def test_without_calibration_states_a_quantized_prior_has_no_trust_and_says_so(prior, clones, tmp_path, caplog):
    few = clones.states[:9], clones.instruction_id[:9]
    made = quantize_prior(prior, "bf16", *few)
    loaded = LatentActionPrior.load(prior.save(tmp_path / "prior"), quantization="bf16")
    for quantized in (made, loaded):
        assert quantized.query(*few).trust is None
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert all("have no trust" in r.message and "calibration_states" in r.message for r in caplog.records)
    assert made.metrics["quantization"]["trust_states"] == 0
    assert prior.query(*few).trust is not None
    # one that was saved with exact latents keeps them, as its digest says
    made.demonstrated = prior.demonstrated
    del made.metrics["quantization"]["trust_states"]
    again = LatentActionPrior.load(made.save(tmp_path / "made"))
    assert again.digest == made.digest
    assert "may be too low" in caplog.records[-1].message
