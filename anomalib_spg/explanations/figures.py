# SPDX-License-Identifier: Apache-2.0

"""Figures that explain a decision or a model, for notebooks and reports. Each returns a matplotlib figure."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from anomalib_spg.components.anomaly_map import to_pixels

from .examples import crop, patch_box

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from matplotlib.axes import Axes

    from .examples import Examples
    from .explanation import Explanation

FOR, AGAINST = "#c1272d", "#1f6fb4"  # red speaks for an anomaly, blue against
CUT = 5  # side of the cuts around patches, in patches


def overlay(picture: np.ndarray, values: torch.Tensor, patch_size: int, maximum: float) -> np.ndarray:
    """Colour a picture red where values are high.

    Args:
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        values (torch.Tensor): Value of each patch ``(h, w)``; negative ones show nothing.
        patch_size (int): Side of a patch in pixels.
        maximum (float): Value that is fully coloured.

    Returns:
        np.ndarray: Picture ``(H, W, 3)``, 8 bits, pale grey so that the colour stands out.

    Example:
        >>> import torch
        >>> overlay(np.zeros((4, 4, 3), np.uint8), torch.tensor([[1.0]]), patch_size=5, maximum=1)[0, 0].tolist()
        [218, 50, 54]
    """
    values = to_pixels(values[None] / max(maximum, 1e-12), patch_size, (picture.shape[0], picture.shape[1]))[0]
    alpha = values.clamp(0, 1).numpy()[..., None] * 0.85
    grey = 70 + 0.7 * picture.mean(axis=2, keepdims=True).repeat(3, axis=2)
    return (grey * (1 - alpha) + np.array([245, 47, 52]) * alpha).astype(np.uint8)


def heatmap(picture: np.ndarray, shown_map: np.ndarray | torch.Tensor) -> np.ndarray:
    """Lay a map of shown scores over a picture: blue where it is good, green at the threshold, red where it is not.

    Args:
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        shown_map (np.ndarray | torch.Tensor): Map ``(H, W)`` in [0, 1].

    Returns:
        np.ndarray: Picture ``(H, W, 3)``, 8 bits.

    Example:
        >>> import torch
        >>> heatmap(np.zeros((1, 1, 3), np.uint8), torch.full((1, 1), 0.2)).tolist()
        [[[31, 77, 127]]]
    """
    colours = colormaps["turbo"](np.asarray(shown_map, dtype=np.float32))[..., :3] * 255
    return (0.5 * picture + 0.5 * colours).astype(np.uint8)


def plot_explanation(
    explanation: Explanation,
    picture: np.ndarray,
    examples: Examples | None = None,
    threshold: float | None = None,
    patch_size: int = 16,
    parts: int = 5,
    title: str | None = None,
    shown_map: torch.Tensor | None = None,
    words: str = "",
    mask: torch.Tensor | None = None,
    pixel_aspect: float = 1.0,
) -> Figure:
    """Show why an image has its score.

    Left: the image and its heatmap, with a square around the deciding patch, and the outlines of defects. Middle: the
    parts that add most, and where in the image. Right: for atoms their max-activating training patches, for
    LAKE the deciding patch and the nearest normal one. Below: the sum that makes the score.

    Args:
        explanation (Explanation): What :meth:`SPG.explain` or :meth:`LAKE.explain` returns.
        picture (np.ndarray): The image ``(H, W, 3)``, 8 bits; see :func:`.examples.to_picture`.
        examples (Examples | None): Training images to take example patches from. Defaults to ``None``.
        threshold (float | None): Raw score above which images are rejected. Defaults to ``None``.
        patch_size (int): Side of the backbone's patches in pixels.
        parts (int): Parts to show. Defaults to 5.
        title (str | None): First line. ``None`` says raw score and decision.
        shown_map (torch.Tensor | None): Anomaly map ``(H, W)`` of shown scores. ``None`` takes the raw one.
        words (str): The decision in plain words, see :func:`.words.in_words`, above the sum. Defaults to none.
        mask (torch.Tensor | None): Where the defects are ``(H, W)``, to outline them. Defaults to none.
        pixel_aspect (float): Width over height of what a pixel of the picture shows; other than 1 where the image was
            squeezed, see :func:`.pre_processor.pixel_aspect`. Defaults to 1.

    Returns:
        Figure: 12 (without examples 6.5) inches wide, about 8 high with five parts.

    Example:
        >>> import torch
        >>> from anomalib_spg.explanations.explanation import Explanation
        >>> explanation = Explanation("atom", 0.8, 0.5, torch.tensor([5]), torch.tensor([17]), torch.tensor([0.3]),
        ...                           torch.rand(1, 4, 4), torch.rand(64, 64), (1, 2))
        >>> figure = plot_explanation(explanation, np.zeros((64, 64, 3), np.uint8), threshold=0.6)
        >>> figure.get_suptitle()
        'Rejected: raw score 0.800, threshold 0.600'
    """
    top = explanation.top(parts)
    nearest = None
    if explanation.nearest is not None and examples is not None:
        number, patch, compared = explanation.nearest
        nearest = examples.crop(number, patch, max(CUT, compared + 2), outline=compared)
    cuts = [
        examples.of(int(explanation.blocks[part]), int(explanation.units[part]), CUT) if examples is not None else []
        for part in top
    ]
    has_right = nearest is not None or any(cuts)
    figure = Figure(figsize=(12 if has_right else 6.5, 0.6 + 1.35 * max(parts, 1) + 0.5), layout="constrained")
    figure.suptitle(title or decision(explanation.score, threshold, name="raw score"), fontweight="bold")
    columns = figure.add_gridspec(1, 3, width_ratios=(3, 2.7, 5 if has_right else 0.01))
    left, right = columns[0].subgridspec(2, 1), columns[2]
    grid = (explanation.maps.shape[1], explanation.maps.shape[2])
    box = patch_box(explanation.peak, grid, patch_size, CUT)
    is_outlined = mask is not None and bool(mask.any())
    for row, (shown, name) in enumerate((
        (
            picture,
            "image, what decides framed, defects outlined" if is_outlined else "image, and the patch that decides",
        ),
        (heatmap(picture, explanation.anomaly_map if shown_map is None else shown_map), "anomaly map"),
    )):
        axes = show(figure.add_subplot(left[row]), shown, name, pixel_aspect)
        if mask is not None:
            outline(axes, mask)
        axes.add_patch(Rectangle((box[1], box[0]), box[2], box[2], fill=False, color="white", linewidth=2))
        axes.add_patch(Rectangle((box[1], box[0]), box[2], box[2], fill=False, color=FOR, linewidth=1))
    rows = columns[1].subgridspec(max(parts, 1), 2, width_ratios=(1, 1.6))
    strips = right.subgridspec(max(parts, 1), 1)
    shares = explanation.shares
    maximum = float(explanation.maps[top].max()) if top else 1.0
    for row, part in enumerate(top):
        name = f"{explanation.unit} {int(explanation.units[part])}\nof block {int(explanation.blocks[part])}"
        opposed = explanation.opposed is not None and bool(explanation.opposed[part])
        share = f"adds {float(explanation.contributions[part]):.3f},\n{float(shares[part]):.0%} of all that adds"
        share += "\nbecause the image\npoints away from it" if opposed else ""
        axes = figure.add_subplot(rows[row, 0])
        axes.axis("off")
        axes.text(0, 0.72, name, fontsize=9, va="center", fontweight="bold", color=FOR)
        axes.text(0, 0.28, share, fontsize=8, va="center")
        where = overlay(picture, explanation.maps[part], patch_size, maximum)
        show(figure.add_subplot(rows[row, 1]), where, "", pixel_aspect)
        if cuts[row]:
            axes = figure.add_subplot(strips[row])
            drawn = " (with drawn anomalies)" if examples is not None and examples.drawn else ""
            show(axes, strip(cuts[row]), f"max-activating training patches{drawn}" if row == 0 else "")
    if nearest is not None:
        pair = right.subgridspec(2, 1)
        own = crop(picture, explanation.peak, grid, patch_size, max(CUT, compared + 2), outline=compared)
        name = "patch" if compared == 1 else f"window of {compared} x {compared} patches"
        show(figure.add_subplot(pair[0]), own, f"the {name} that decides, and around it", pixel_aspect)
        show(figure.add_subplot(pair[1]), nearest, f"the nearest normal {name}, and around it")
    caption = filter(None, (words, sentence(explanation, top, threshold)))
    figure.supxlabel("\n".join(fill(line, 150 if has_right else 80) for line in caption), fontsize=9)
    return figure


def decision(score: float, threshold: float | None = None, rejected: bool | None = None, name: str = "score") -> str:
    """State decision, score and threshold in a line.

    Args:
        score (float): Score.
        threshold (float | None): Threshold on the scale of the score, if there is one.
        rejected (bool | None): Decision. ``None`` compares score and threshold.
        name (str): What the score is called. Defaults to ``"score"``.

    Returns:
        str: Line.

    Example:
        >>> decision(0.25, 0.5), decision(0.25)
        ('Accepted: score 0.250, threshold 0.500', 'Score 0.250')
    """
    words = f"{name} {score:.3f}" + (f", threshold {threshold:.3f}" if threshold is not None else "")
    if rejected is None:
        if threshold is None:
            return words.capitalize()
        rejected = score > threshold
    return f"{'Rejected' if rejected else 'Accepted'}: {words}"


def sentence(explanation: Explanation, top: Sequence[int], threshold: float | None = None) -> str:
    """Write the sum that makes the raw score.

    Args:
        explanation (Explanation): Explanation.
        top (Sequence[int]): Parts to name; the others are summed.
        threshold (float | None): Raw score above which images are rejected. Defaults to ``None``.

    Returns:
        str: Sum.

    Example:
        >>> import torch
        >>> from anomalib_spg.explanations.explanation import Explanation
        >>> parts = torch.tensor([0.3, -0.1])
        >>> atoms = torch.tensor([17, 4])
        >>> explanation = Explanation("atom", 0.7, 0.5, torch.zeros(2), atoms, parts, parts, parts, (0, 0))
        >>> sentence(explanation, [0])
        'Raw score: 0.500 (no preference) + 0.300 (atom 17) - 0.100 (1 other atom) = 0.700'
    """
    several = len(explanation.blocks.unique()) > 1
    named = []
    for part in top:
        number = f"{int(explanation.blocks[part])}:" * several + str(int(explanation.units[part]))
        named.append((f"{explanation.unit} {number}", float(explanation.contributions[part])))
    others, rest = explanation.others(top)
    if others:
        named.append((f"{others} other {explanation.unit}{'s' * (others > 1)}", rest))
    named += explanation.other.items()
    words = [f"{explanation.base:.3f} (no preference)"] if explanation.base else []
    for name, value in named:
        sign = "-" if value < 0 else "+" if words else ""
        words.append(f"{sign} {abs(value):.3f} ({name})".strip())
    limit = "" if threshold is None else f" (raw threshold {threshold:.3f})"
    return f"Raw score: {' '.join(words)} = {explanation.score:.3f}{limit}"


def show(axes: Axes, picture: np.ndarray, title: str, pixel_aspect: float = 1.0) -> Axes:
    """Put a picture into axes, without ticks.

    Args:
        axes (Axes): Axes to draw in.
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        title (str): Title.
        pixel_aspect (float): Width over height of what a pixel shows. Defaults to 1.

    Returns:
        Axes: The axes.
    """
    axes.imshow(picture, aspect=1 / pixel_aspect)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def outline(axes: Axes, mask: torch.Tensor) -> None:
    """Draw around the places of a mask, white on black, which shows on every picture.

    Args:
        axes (Axes): Axes that show the picture.
        mask (torch.Tensor): Mask ``(H, W)``; an empty one draws nothing.
    """
    if not mask.any():
        return
    padded = np.pad(mask.bool().cpu().numpy(), 1).astype(float)  # places at the border are closed, too
    limits = axes.axis()
    x, y = (np.arange(-1, length - 1) for length in (padded.shape[1], padded.shape[0]))
    for colour, width in (("black", 2.2), ("white", 0.9)):
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=width)
    axes.axis(limits)


def strip(cuts: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures side by side, with white between them.

    Args:
        cuts (Sequence[np.ndarray]): Pictures ``(H, W, 3)`` of one height, 8 bits.

    Returns:
        np.ndarray: One picture.

    Example:
        >>> strip([np.zeros((8, 8, 3), np.uint8)] * 2).shape
        (8, 20, 3)
    """
    gap = np.full((cuts[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for cut in cuts for part in (cut, gap)][:-1], axis=1)
