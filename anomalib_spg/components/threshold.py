# SPDX-License-Identifier: Apache-2.0

"""Where good parts end: a threshold on their scores, for a false-alarm rate that is named beforehand.

Scores are compared on the logit scale, on which those of good parts are nearly normally distributed (measured).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats

DRAWS = 4096  # of the posterior, for the interval of the false-alarm rate


class Prior(NamedTuple):
    """How much scores of good parts usually vary, known from other products.

    Attributes:
        spread (float): Usual standard deviation of the logits of good parts.
        weight (float): Number of images that this knowledge counts for.
    """

    spread: float
    weight: float


WEAK_PRIOR = Prior(spread=0.2, weight=1.0)  # for any model: hardly counts once there are several images


@dataclass(frozen=True)
class GoodPartThreshold:
    """A threshold from good parts.

    Attributes:
        logit (float): Threshold on the logit scale.
        rate (float): Expected share of good parts above it.
        interval (tuple[float, float]): Interval that holds the true share with 90 % probability.
        images (int): Good images it rests on.
        is_conformal (bool): Whether the rate holds for any distribution of scores. Else it rests on a normal tail.
    """

    logit: float
    rate: float
    interval: tuple[float, float]
    images: int
    is_conformal: bool


def good_part_threshold(
    held_out: Sequence[float],
    rate: float = 0.08,
    others: Sequence[float] = (),
    prior: Prior = WEAK_PRIOR,
) -> GoodPartThreshold:
    r"""Place a threshold that new good parts exceed at a given rate.

    With enough images it is conformal: of :math:`m` held-out good parts the
    :math:`\lceil (m + 1)(1 - \alpha) \rceil`-th smallest score, which a new good part exceeds with probability at most
    :math:`\alpha`, whatever the distribution. That takes :math:`(m + 1) \alpha \ge 2`, so that single images do not
    decide: 24 of them for 8 %, 39 for 5 %.

    With fewer it is the prediction bound of a normal distribution with an empirical-Bayes variance,

    .. math:: \bar x + T_\nu(1 - \alpha) \, s \sqrt{1 + 1/n}, \qquad
              s^2 = \frac{\nu_0 s_0^2 + \sum_i (x_i - \bar x)^2}{\nu}, \qquad \nu = \nu_0 + n - 1,

    where :math:`s_0` and :math:`\nu_0` are the prior's spread and weight.

    Args:
        held_out (Sequence[float]): Logits of good parts the model has not learned from.
        rate (float): False-alarm rate :math:`\alpha`, in (0, 0.5]. Defaults to 0.08 (ours).
        others (Sequence[float]): Logits of good parts that are known by other means, such as leave-one-out. They count
            where the tail is fitted.
        prior (Prior): How much scores usually vary.

    Returns:
        GoodPartThreshold: Threshold, the rate to expect, and its interval.

    Raises:
        ValueError: If there is no score, one is not finite, or the rate is out of range.

    Example:
        >>> threshold = good_part_threshold([x / 100 for x in range(99)], rate=0.05)
        >>> round(threshold.logit, 3), round(threshold.rate, 3), threshold.is_conformal
        (0.941, 0.05, True)
    """
    if not 0 < rate <= 0.5:
        msg = f"false_alarm_rate={rate} must lie in (0, 0.5]: the share of good parts that may be rejected."
        raise ValueError(msg)
    values = np.sort(np.asarray(held_out, dtype=float))
    known = np.concatenate([values, np.asarray(others, dtype=float)])
    if not len(known) or not np.isfinite(known).all():
        broken = int((~np.isfinite(known)).sum())
        msg = f"A threshold needs finite scores of good parts; got {len(known)}, {broken} of them not finite."
        raise ValueError(msg)
    count = len(values)
    above = math.floor((count + 1) * rate + 1e-9)  # of the count + 1 ranks a new part may take
    if above >= 2:
        rank = count + 1 - above
        low, high = stats.beta.interval(0.9, above, rank)
        # Just above a score, so that rounding turns no decision about the image it is from.
        logit = 0.9 * values[rank - 1] + 0.1 * values[rank]
        return GoodPartThreshold(float(logit), above / (count + 1), (float(low), float(high)), count, True)  # noqa: FBT003
    total, freedom = len(known), prior.weight + len(known) - 1
    mean = known.mean()
    spread = math.sqrt((prior.weight * prior.spread**2 + ((known - mean) ** 2).sum()) / freedom)
    logit = mean + stats.t.ppf(1 - rate, freedom) * spread * math.sqrt(1 + 1 / total)
    # What mean and spread of the good parts may be, given the images.
    generator = np.random.default_rng(0)
    spreads = spread * np.sqrt(freedom / generator.chisquare(freedom, DRAWS))
    means = mean + spreads / math.sqrt(total) * generator.standard_normal(DRAWS)
    low, high = np.quantile(stats.norm.sf((logit - means) / spreads), (0.05, 0.95))
    return GoodPartThreshold(float(logit), rate, (float(low), float(high)), total, False)  # noqa: FBT003


def best_with_bad(good: Sequence[float], bad: Sequence[float], preferred: float, lowest: float) -> float:
    """Move a threshold to where F1 over known good and bad images is highest.

    Of all thresholds that share the highest F1 the one nearest to the preferred one is taken.

    Args:
        good (Sequence[float]): Logits of good images.
        bad (Sequence[float]): Logits of bad images.
        preferred (float): Threshold from good parts.
        lowest (float): Thresholds below this one would reject too many good parts.

    Returns:
        float: Threshold on the same scale.

    Example:
        >>> best_with_bad(good=[0.0, 1.0], bad=[3.0, 4.0], preferred=3.5, lowest=0.5)
        2.0
        >>> best_with_bad(good=[0.0, 1.0], bad=[3.0, 4.0], preferred=1.2, lowest=0.5)
        1.2
    """
    good_logits, bad_logits = np.asarray(good, dtype=float), np.asarray(bad, dtype=float)
    values = np.unique(np.concatenate([good_logits, bad_logits]))
    edges = np.concatenate([[lowest], values[values > lowest]])
    # At an edge everything above it is rejected: the same decisions up to the next one.
    hits = (bad_logits[None] > edges[:, None]).sum(axis=1)
    alarms = (good_logits[None] > edges[:, None]).sum(axis=1)
    f1 = 2 * hits / np.maximum(hits + alarms + len(bad), 1)
    candidates = []
    for index in np.flatnonzero(f1 >= f1.max() - 1e-12):
        low, high = edges[index], edges[index + 1] if index + 1 < len(edges) else math.inf
        if low <= preferred < high:
            return float(preferred)
        candidates.append(float((low + high) / 2 if high < math.inf else low))
    return min(candidates, key=lambda candidate: abs(candidate - preferred))


def logit(scores: torch.Tensor) -> torch.Tensor:
    """Logit of scores in [0, 1], finite at the ends.

    Args:
        scores (torch.Tensor): Scores of any shape.

    Returns:
        torch.Tensor: Logits of that shape, in single precision at least; about -69 for 0 and 17 for 1, 37 in double.

    Example:
        >>> logit(torch.tensor([0.5, 0.9])).tolist()
        [0.0, 2.1972...]
    """
    scores = scores.float() if scores.dtype in {torch.float16, torch.bfloat16} else scores
    return scores.clamp(min=1e-30).log() - torch.log1p(-scores.clamp(max=1 - torch.finfo(scores.dtype).eps / 2))
