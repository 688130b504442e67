# SPDX-License-Identifier: Apache-2.0

"""A decision in plain words: what was compared with what, and where to look."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anomalib_spg.components.regions import Defect

    from .explanation import Explanation


def in_words(
    explanation: Explanation,
    rejected: bool | None,
    below: tuple[int, int] = (0, 0),
    defects: Sequence[Defect] = (),
    has_nearest: bool = False,
) -> str:
    r"""Say why an image is rejected or accepted to someone who knows neither model nor scores.

    Args:
        explanation (Explanation): Explanation.
        rejected (bool | None): Decision. ``None`` where there is no threshold.
        below (tuple[int, int]): How many known good images score lower, and how many there are. Defaults to none.
        defects (Sequence[Defect]): Outlined places, the largest first. Defaults to none.
        has_nearest (bool): Whether the nearest normal patch is shown. Defaults to ``False``.

    Returns:
        str: A few sentences.

    Example:
        >>> import torch
        >>> from anomalib_spg.components.regions import Defect
        >>> from anomalib_spg.explanations.explanation import Explanation
        >>> explanation = Explanation("neuron", 0.8, 0.0, torch.tensor([5]), torch.tensor([17]), torch.tensor([0.8]),
        ...                           torch.rand(1, 4, 4), torch.rand(64, 64), (0, 3))
        >>> print(*in_words(explanation, True, (24, 24), [Defect((4, 8, 34, 28), 500, 0.9, [])]).split(". "), sep="\n")
        Rejected, because its score exceeds the threshold; all 24 known good parts score lower
        The framed place at the top right looks least like a good part
        One place is outlined as a defect, 30 x 20 pixels.
    """
    sentences = [_decision(explanation.score, rejected, *below), _place(explanation, has_nearest)]
    if rejected:
        sentences.append(_outlined(defects))
    return " ".join(sentences)


def _decision(score: float, rejected: bool | None, lower: int, known: int) -> str:
    if not math.isfinite(score):
        return "Its score is not a finite number, which is no sign of a good part."
    if rejected is None:
        return "Nothing is decided, because there is no threshold."
    words = f"{'Rejected' if rejected else 'Accepted'}, because its score "
    words += "exceeds the threshold" if rejected else "does not exceed the threshold"
    if known:
        number = f"all {known}" if lower == known > 1 else "none" if not lower else str(lower)
        of_all = "" if number.startswith("all") else f" of {known}"
        words += f"; {number}{of_all} known good part{'s' * (known > 1)} score{'s' * (lower == 1)} lower"
    return f"{words}."


def _place(explanation: Explanation, has_nearest: bool) -> str:
    row, column = explanation.peak
    height, width = explanation.maps.shape[1:]
    vertical = ("top", "", "bottom")[3 * row // height]
    horizontal = ("left", "", "right")[3 * column // width]
    where = " ".join(filter(None, (vertical, horizontal)))
    words = f"The framed place {'at the ' + where if where else 'in the middle'} looks "
    words += "most like a defect" if explanation.unit == "atom" else "least like a good part"
    return f"{words}; the most similar place of a good part is shown beside it." if has_nearest else f"{words}."


def _outlined(defects: Sequence[Defect]) -> str:
    if not defects:
        return "No place exceeds the threshold of pixels, so none is outlined."
    left, top, right, bottom = defects[0].box
    size = f"{right - left} x {bottom - top} pixels"
    if len(defects) == 1:
        return f"One place is outlined as a defect, {size}."
    return f"{len(defects)} places are outlined as defects, the largest {size}."
