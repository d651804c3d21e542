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
from lago_fast.priors.trust import INSIDE, Demonstrated, remember


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
    with pytest.raises(UnsupportedArgument, match="trust_rows: not negative"):
        fit_prior(*clones, texts, backbone=encoder, trust_rows=-1)


def test_one_episode_has_nothing_to_be_measured_by(clones, encoder, texts):
    first = [column[:20] for column in clones]
    prior = fit_prior(*first, texts, backbone=encoder, epochs=1, val_fraction=0)
    assert prior.demonstrated is None


def test_caches_and_quantized_priors_pass_it_on(prior, clones):
    few = clones.states[:9], clones.instruction_id[:9]
    trust = prior.query(*few).trust
    torch.testing.assert_close(CachedPrior(prior, CacheConfig(1 << 20)).query(*few).trust, trust, atol=1e-3, rtol=0)
    torch.testing.assert_close(quantize_prior(prior, "bf16", *few).query(*few).trust, trust, atol=0.05, rtol=0)
