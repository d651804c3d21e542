"""What an update logs: Stable-Baselines3's keys with its meanings.

Test: pytest tests/algorithms/test_fast_kl_ppo.py tests/algorithms/test_sb3_parity.py
"""

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import explained_variance

from lago_fast.buffers import RolloutBuffer
from lago_fast.errors import NonFiniteLoss
from lago_fast.ops import GaussianOutputs


def record_update(
    logger: Logger,
    statistics: np.ndarray,
    epoch_start: int,
    coefficients: dict[str, float | None],
    buffer: RolloutBuffer,
) -> float:
    """Log one update and return its mean KL to the prior in nats.

    Args:
        logger: the model's.
        statistics: [gradient steps, 7], the loss op's outputs.
        epoch_start: the first gradient step of the last epoch.
        coefficients: that the loss op was given.
        buffer: that it learnt from.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite.
    """
    bad = np.flatnonzero(~np.isfinite(statistics).all(axis=1))
    if len(bad):
        before = GaussianOutputs(*statistics[: bad[0]].T).approx_kl
        moved = f"the policy had moved by {before.max():.3g} nats before" if len(before) else "at the first minibatch"
        raise NonFiniteLoss(
            f"loss: it became NaN or infinite, {moved}; lower learning_rate or kl_coef, or scale the rewards",
            int(bad[0]),
        )
    mean, last = (GaussianOutputs(*row) for row in (statistics.mean(axis=0), statistics[-1]))
    last_epoch = GaussianOutputs(*statistics[epoch_start:].mean(axis=0))
    record = logger.record
    record("train/entropy_loss", -mean.entropy)
    record("train/policy_gradient_loss", mean.policy_loss)
    record("train/value_loss", mean.value_loss)
    record("train/approx_kl", last_epoch.approx_kl)
    record("train/clip_fraction", mean.clip_fraction)
    record("train/loss", last.loss)
    valid = buffer.valid.cpu().numpy()
    values, returns = (column.cpu().numpy()[valid] for column in (buffer.values, buffer.returns))
    record("train/explained_variance", explained_variance(values, returns))
    record("train/clip_range", coefficients["clip_range"])
    if coefficients["clip_range_vf"] is not None:
        record("train/clip_range_vf", coefficients["clip_range_vf"])
    return float(mean.prior_kl)
