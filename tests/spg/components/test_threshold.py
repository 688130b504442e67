# SPDX-License-Identifier: Apache-2.0

"""Thresholds from good parts: the promised rate, the formulas, and what bad images change."""

import numpy as np
import pytest
import torch
from scipy import stats

from anomalib_spg.components.threshold import Prior, best_with_bad, good_part_threshold, logit

DISTRIBUTIONS = {
    "normal": lambda rng, count: rng.normal(size=count),
    "exponential": lambda rng, count: rng.exponential(size=count),
    "two modes": lambda rng, count: rng.normal(size=count) + 5 * (rng.random(count) < 0.2),
}


def alarms(distribution: str, count: int, rate: float, runs: int = 400, **arguments) -> np.ndarray:
    """True false-alarm rates of thresholds from ``count`` good parts, over many draws."""
    rng = np.random.default_rng(0)
    unseen = np.sort(DISTRIBUTIONS[distribution](rng, 100_000))
    rates = []
    for _ in range(runs):
        threshold = good_part_threshold(DISTRIBUTIONS[distribution](rng, count), rate, **arguments)
        rates.append(1 - np.searchsorted(unseen, threshold.logit) / len(unseen))
    return np.array(rates)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("count", "rate"), [(24, 0.08), (39, 0.05), (99, 0.05), (300, 0.01), (30, 0.1)])
def test_the_rate_holds_whatever_the_distribution(distribution: str, count: int, rate: float) -> None:
    """With enough good parts new ones are rejected at most at the rate, on average over draws."""
    rates = alarms(distribution, count, rate)
    error = 2.5 * rates.std() / len(rates) ** 0.5
    assert rates.mean() <= rate + error
    assert rates.mean() >= 0.4 * rate, "so strict that it would miss defects for nothing"


@pytest.mark.parametrize("count", [1, 2, 4, 8, 12, 26])
def test_few_good_parts_of_the_usual_spread(count: int) -> None:
    """Where a tail is fitted, the rate holds for normal scores that vary as the prior says."""
    rates = alarms("normal", count, 0.05, prior=Prior(spread=1.0, weight=8.0))
    assert rates.mean() <= 0.05 + 2.5 * rates.std() / len(rates) ** 0.5


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_the_images_outweigh_a_wrong_prior(spread: float) -> None:
    """With 26 images a prior that is off by a factor of three changes little."""
    assert 0.005 < alarms("normal", 26, 0.05, prior=Prior(spread, weight=4.0)).mean() < 0.09


@pytest.mark.parametrize("count", [8, 26, 60])
def test_the_interval_covers_the_true_rate(count: int) -> None:
    """The 90 % interval that is printed holds the true rate in about 90 % of draws."""
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        known = good_part_threshold(rng.normal(size=count), 0.05, prior=Prior(1.0, 4.0))
        inside += known.interval[0] <= stats.norm.sf(known.logit) <= known.interval[1]
    assert 0.84 <= inside / 300 <= 0.99


def test_conformal_threshold_by_hand() -> None:
    """Of 39 scores the 38th smallest, a tenth of the way to the largest; single images do not decide with fewer."""
    scores = list(range(39))
    known = good_part_threshold(scores, 0.05)
    assert (known.logit, known.rate, known.images, known.is_conformal) == (pytest.approx(37.1), 0.05, 39, True)
    assert not good_part_threshold(scores[:38], 0.05).is_conformal


def test_fitted_threshold_by_hand() -> None:
    """The formula of the docstring; leave-one-out scores count where a tail is fitted."""
    held_out, others = [0.1, 0.3], [0.2]
    known = good_part_threshold(held_out, 0.05, others, Prior(0.06, 8.0))
    freedom, x = 8 + 3 - 1, np.array([0.1, 0.3, 0.2])
    spread = np.sqrt((8 * 0.06**2 + ((x - x.mean()) ** 2).sum()) / freedom)
    assert known.logit == pytest.approx(x.mean() + stats.t.ppf(0.95, freedom) * spread * np.sqrt(1 + 1 / 3))
    assert (known.images, known.is_conformal) == (3, False)


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [([], 0.05, "got 0"), ([0.1, float("nan")], 0.05, "finite"), ([0.1], 0.0, "0.0 must"), ([0.1], 0.6, "0.6 must")],
)
def test_impossible_requests(scores: list[float], rate: float, message: str) -> None:
    """Messages say what is wrong."""
    with pytest.raises(ValueError, match=message):
        good_part_threshold(scores, rate)


@pytest.mark.parametrize(
    ("good", "bad", "preferred", "lowest", "expected"),
    [
        ([0, 1], [3, 4], 2.0, 1.5, 2.0),  # separates them already
        ([0, 1], [3, 4], 5.0, 1.5, 2.25),  # too strict: halfway down to what both allow
        ([0, 1, 2], [3, 4], 1.5, 0.5, 2.5),  # a good part lies above it
        ([0, 1, 2, 3], [0.5, 5], 3.5, 2.5, 3.5),  # a bad part that would cost many good ones is given up
        ([0, 1], [0.2, 0.3], 2.0, 1.5, 2.0),  # nothing to be gained
    ],
)
def test_bad_images(good: list[float], bad: list[float], preferred: float, lowest: float, expected: float) -> None:
    """The best F1, nearest to what good parts say, and never below the limit."""
    assert best_with_bad(good, bad, preferred, lowest) == pytest.approx(expected)


def test_logit_keeps_every_order() -> None:
    """Of neighbouring numbers, near both ends too; half precision is widened first."""
    scores = torch.cat([torch.tensor([0.0, 1e-20, 1e-10]), torch.linspace(1e-4, 1, 2000)])
    assert (logit(scores).diff() > 0).all()
    assert logit(scores).isfinite().all()
    assert logit(torch.tensor([0.25], dtype=torch.bfloat16)).dtype == torch.float32
