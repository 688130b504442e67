# SPDX-License-Identifier: Apache-2.0

"""Figures that explain a decision or a model, for notebooks and reports. Each returns a matplotlib figure."""

from __future__ import annotations

from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .examples import crop, patch_box
from .guides import to_pixels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from matplotlib.axes import Axes

    from .examples import Examples
    from .explanation import Explanation
    from .guides import Guides

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


def heatmap(picture: np.ndarray, anomaly_map: np.ndarray | torch.Tensor, high: float = 1.0) -> np.ndarray:
    """Lay an anomaly map over a picture.

    Args:
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        anomaly_map (np.ndarray | torch.Tensor): Map ``(H, W)``.
        high (float): Value that is red; the map's lowest value is blue. Defaults to 1.

    Returns:
        np.ndarray: Picture ``(H, W, 3)``, 8 bits.

    Example:
        >>> import torch
        >>> heatmap(np.zeros((2, 2, 3), np.uint8), torch.ones(2, 2)).shape
        (2, 2, 3)
    """
    values = np.asarray(anomaly_map)
    colours = colormaps["turbo"]((values - values.min()) / max(high - values.min(), 1e-12))[..., :3] * 255
    return (0.5 * picture + 0.5 * colours).astype(np.uint8)


def plot_explanation(
    explanation: Explanation,
    picture: np.ndarray,
    examples: Examples | None = None,
    threshold: float | None = None,
    patch_size: int = 16,
    parts: int = 5,
    title: str | None = None,
) -> Figure:
    """Show why an image has its score.

    On the left the image and its heatmap, with a square around the patch that decides. Beside them the parts that add
    most: where in the image they do, and for atoms the training patches they stand for. For LAKE the deciding patch and
    the nearest normal one. Below the sum that makes the score.

    Args:
        explanation (Explanation): What :meth:`SPGModel.explain` or :meth:`LAKEModel.explain` returns.
        picture (np.ndarray): The image ``(H, W, 3)``, 8 bits; see :func:`anomalib_spg.examples.to_picture`.
        examples (Examples | None): Training images to take example patches from. Defaults to ``None``.
        threshold (float | None): Raw score above which images are rejected. Defaults to ``None``.
        patch_size (int): Side of the backbone's patches in pixels.
        parts (int): Parts to show. Defaults to 5.
        title (str | None): First line. ``None`` says score and decision.

    Returns:
        Figure: 12 (without examples 6.5) inches wide, about 8 high with five parts.

    Example:
        >>> import torch
        >>> from anomalib_spg.explanation import Explanation
        >>> explanation = Explanation("atom", 0.8, 0.5, torch.tensor([5]), torch.tensor([17]), torch.tensor([0.3]),
        ...                           torch.rand(1, 4, 4), torch.rand(64, 64), (1, 2))
        >>> figure = plot_explanation(explanation, np.zeros((64, 64, 3), np.uint8), threshold=0.6)
        >>> figure.get_suptitle()
        'Rejected: score 0.800, threshold 0.600'
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
    figure.suptitle(title or decision(explanation.score, threshold), fontweight="bold")
    left, middle, right = figure.add_gridspec(1, 3, width_ratios=(3, 2.7, 5 if has_right else 0.01))
    left = left.subgridspec(2, 1)
    grid = tuple(explanation.maps.shape[1:])
    box = patch_box(explanation.peak, grid, patch_size, CUT)
    for row, (shown, name) in enumerate((
        (picture, "image, and the patch that decides"),
        (heatmap(picture, explanation.anomaly_map, max(explanation.score, threshold or 0)), "anomaly map"),
    )):
        axes = _show(figure.add_subplot(left[row]), shown, name)
        axes.add_patch(Rectangle((box[1], box[0]), box[2], box[2], fill=False, color="white", linewidth=2))
        axes.add_patch(Rectangle((box[1], box[0]), box[2], box[2], fill=False, color=FOR, linewidth=1))
    rows = middle.subgridspec(max(parts, 1), 2, width_ratios=(1, 1.6))
    strips = right.subgridspec(max(parts, 1), 1)
    shares = explanation.shares
    maximum = float(explanation.maps[top].max()) if top else 1.0
    for row, part in enumerate(top):
        name = f"{explanation.unit} {int(explanation.units[part])}\nof block {int(explanation.blocks[part])}"
        opposed = explanation.opposed is not None and bool(explanation.opposed[part])
        share = f"adds {float(explanation.contributions[part]):.3f},\n{float(shares[part]):.0%} of all that adds"
        share += "\nfor the image\npoints away from it" if opposed else ""
        axes = figure.add_subplot(rows[row, 0])
        axes.axis("off")
        axes.text(0, 0.72, name, fontsize=9, va="center", fontweight="bold", color=FOR)
        axes.text(0, 0.28, share, fontsize=8, va="center")
        _show(figure.add_subplot(rows[row, 1]), overlay(picture, explanation.maps[part], patch_size, maximum), "")
        if cuts[row]:
            strip = figure.add_subplot(strips[row])
            _show(strip, _strip(cuts[row]), "training patches it fires on most" if row == 0 else "")
    if nearest is not None:
        pair = right.subgridspec(2, 1)
        own = crop(picture, explanation.peak, grid, patch_size, max(CUT, compared + 2), outline=compared)
        name = "patch" if compared == 1 else f"window of {compared} x {compared} patches"
        _show(figure.add_subplot(pair[0]), own, f"the {name} that decides, and around it")
        _show(figure.add_subplot(pair[1]), nearest, f"the nearest normal {name}, and around it")
    figure.supxlabel(fill(sentence(explanation, top), 150 if has_right else 80), fontsize=9)
    return figure


def decision(score: float, threshold: float | None = None, rejected: bool | None = None) -> str:
    """Say decision, score and threshold in a line.

    Args:
        score (float): Raw score.
        threshold (float | None): Raw threshold, if there is one.
        rejected (bool | None): Decision. ``None`` compares score and threshold.

    Returns:
        str: Line.

    Example:
        >>> decision(0.25, 0.5), decision(0.25)
        ('Accepted: score 0.250, threshold 0.500', 'Score 0.250')
    """
    words = f"score {score:.3f}" + (f", threshold {threshold:.3f}" if threshold is not None else "")
    if rejected is None:
        if threshold is None:
            return words.capitalize()
        rejected = score > threshold
    return f"{'Rejected' if rejected else 'Accepted'}: {words}"


def sentence(explanation: Explanation, top: Sequence[int]) -> str:
    """Write the sum that makes the score.

    Args:
        explanation (Explanation): Explanation.
        top (Sequence[int]): Parts to name; the others are put together.

    Returns:
        str: Sum.

    Example:
        >>> import torch
        >>> from anomalib_spg.explanation import Explanation
        >>> parts = torch.tensor([0.3, -0.1])
        >>> atoms = torch.tensor([17, 4])
        >>> explanation = Explanation("atom", 0.7, 0.5, torch.zeros(2), atoms, parts, parts, parts, (0, 0))
        >>> sentence(explanation, [0])
        '0.500 (no preference) + 0.300 (atom 17) - 0.100 (1 other atom) = 0.700'
    """
    several = len(explanation.blocks.unique()) > 1
    named = []
    for part in top:
        number = f"{int(explanation.blocks[part])}:" * several + str(int(explanation.units[part]))
        named.append((f"{explanation.unit} {number}", float(explanation.contributions[part])))
    others = len(explanation.contributions) - len(top)
    rest = float(explanation.contributions.sum()) - sum(value for _, value in named)
    if others:
        named.append((f"{others} other {explanation.unit}{'s' * (others > 1)}", rest))
    named += explanation.other.items()
    words = [f"{explanation.base:.3f} (no preference)"] if explanation.base else []
    for name, value in named:
        sign = "-" if value < 0 else "+" if words else ""
        words.append(f"{sign} {abs(value):.3f} ({name})".strip())
    return f"{' '.join(words)} = {explanation.score:.3f}"


def plot_guides(guides: Guides, block: int, examples: Examples | None = None, atoms: int = 8) -> Figure:
    """Show what SPG's local guides of a block look for: the atoms that push most to anomaly and to normal.

    An atom's strength is what it adds to the difference of the two cosines for a patch that is the atom itself, see
    :meth:`Guides.local_strengths`.

    Args:
        guides (Guides): Guides of the block.
        block (int): 0-based block.
        examples (Examples | None): Training images to take example patches from. Defaults to ``None``.
        atoms (int): Atoms on each side. Defaults to 8.

    Returns:
        Figure: Two lists of atoms, with their example patches where there are any.

    Example:
        >>> import torch
        >>> from anomalib_spg.guides import Guides
        >>> guides = Guides(dim=2)
        >>> guides.set(torch.eye(2), torch.arange(2), torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]))
        >>> [axes.get_title() for axes in plot_guides(guides, block=5).axes]
        ['push to anomaly', 'push to normal']
    """
    strengths = guides.local_strengths().cpu()
    order = strengths.argsort(descending=True)
    sides = [
        ("push to anomaly", [i for i in order[:atoms].tolist() if strengths[i] > 0], FOR),
        ("push to normal", [i for i in order.flip(0)[:atoms].tolist() if strengths[i] < 0], AGAINST),
    ]
    has_examples = examples is not None and bool(examples.patches)
    figure = Figure(figsize=(14 if has_examples else 8, 1 + 0.75 * atoms), layout="constrained")
    used = int((guides.coefficients[2:] > 0).any(dim=0).sum())
    figure.suptitle(f"Guides of block {block}: the strongest of {used} atoms", fontweight="bold")
    columns = figure.add_gridspec(1, 4 if has_examples else 2, width_ratios=(2, 3, 2, 3) if has_examples else None)
    limit = float(strengths.abs().max()) * 1.1
    for number, (name, chosen, colour) in enumerate(sides):
        axes = figure.add_subplot(columns[0, number * 2 if has_examples else number])
        axes.barh(range(len(chosen)), strengths[chosen].abs().numpy(), color=colour)
        axes.set(title=name, xlim=(0, limit), ylim=(atoms - 0.5, -0.5), xlabel="strength")
        axes.set_yticks(range(len(chosen)), [f"atom {int(guides.atom_indices[i])}" for i in chosen])
        axes.spines[["top", "right"]].set_visible(False)
        if has_examples:
            strips = columns[0, number * 2 + 1].subgridspec(atoms, 1)
            for row, i in enumerate(chosen):
                cuts = examples.of(block, int(guides.atom_indices[i]), CUT)
                if cuts:
                    _show(figure.add_subplot(strips[row]), _strip(cuts), "")
    return figure


def atom_usage(records: Sequence[Mapping], rate: float = 0.1) -> dict[tuple[int, int], dict[str, float]]:
    """Find which atoms explain the rejected images of which categories.

    An atom explains an image if it is among the named parts of its explanation, which are those that add most to the
    score. It is *used* in a category if it explains at least ``rate`` of its rejected images, and *category-general* if
    it is used in more than half of the categories; else *category-specific* (our rule).

    Args:
        records (Sequence[Mapping]): Records of images as :class:`ExplanationVisualizer` writes them.
        rate (float): Share of a category's rejected images. Defaults to 0.1.

    Returns:
        dict[tuple[int, int], dict[str, float]]: For a block and an atom that is used anywhere, the share of each
            category's rejected images it explains; the atom used in most categories first.

    Example:
        >>> part = {"block": 5, "unit": 17}
        >>> records = [{"category": name, "rejected": True, "parts": [part]} for name in ("nut", "bolt")]
        >>> atom_usage(records)
        {(5, 17): {'bolt': 1.0, 'nut': 1.0}}
    """
    rejected = [record for record in records if record["rejected"]]
    categories = sorted({record["category"] for record in rejected})
    counts = {name: sum(record["category"] == name for record in rejected) for name in categories}
    shares: dict[tuple[int, int], dict[str, float]] = {}
    for record in rejected:
        for part in record["parts"]:
            by_category = shares.setdefault((part["block"], part["unit"]), dict.fromkeys(categories, 0.0))
            by_category[record["category"]] += 1 / counts[record["category"]]
    used = {atom: values for atom, values in shares.items() if max(values.values()) >= rate}

    def rank(atom: tuple[int, int]) -> tuple[int, float]:
        return sum(value >= rate for value in used[atom].values()), sum(used[atom].values())

    return {atom: used[atom] for atom in sorted(used, key=rank, reverse=True)}


def plot_usage(records: Sequence[Mapping], rate: float = 0.1, atoms: int = 30) -> Figure:
    """Show which atoms explain rejections in which categories, and which are category-general.

    Args:
        records (Sequence[Mapping]): Records of images, see :func:`atom_usage` for them and for the rule.
        rate (float): Share of a category's rejected images from which an atom is used there. Defaults to 0.1.
        atoms (int): Most atoms to show. Defaults to 30.

    Returns:
        Figure: Categories against atoms; the line parts general from specific ones.

    Example:
        >>> part = {"block": 5, "unit": 17}
        >>> figure = plot_usage([{"category": "nut", "rejected": True, "parts": [part]}])
        >>> figure.axes[0].get_yticklabels()[0].get_text()
        'nut'
    """
    usage = atom_usage(records, rate)
    general = [atom for atom, shares in usage.items() if is_general(shares, rate)]
    shown = list(usage)[:atoms]
    categories = list(usage[shown[0]]) if shown else []
    figure = Figure(figsize=(2.5 + 0.35 * max(len(shown), 8), 1.8 + 0.4 * len(categories)), layout="constrained")
    axes = figure.add_subplot()
    if shown:
        table = np.array([[usage[atom][category] for atom in shown] for category in categories])
        image = axes.imshow(table, cmap="Reds", vmin=0, vmax=1, aspect="auto")
        figure.colorbar(image, label="share of rejected images")
        axes.set_xticks(range(len(shown)), [f"{block}:{atom}" for block, atom in shown], rotation=90)
        axes.set_yticks(range(len(categories)), categories, parse_math=False)
        if 0 < len(general) < len(shown):
            axes.axvline(len(general) - 0.5, color="black", linestyle="--")
    axes.set_title(
        f"{len(general)} category-general and {len(usage) - len(general)} category-specific atoms", fontsize=10
    )
    axes.set_xlabel("block:atom")
    return figure


def is_general(shares: Mapping[str, float], rate: float = 0.1) -> bool:
    """Whether an atom is category-general, used in more than half of several categories; see :func:`atom_usage`."""
    return len(shares) > 1 and sum(share >= rate for share in shares.values()) > len(shares) / 2


def _show(axes: Axes, picture: np.ndarray, title: str) -> Axes:
    axes.imshow(picture)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
    return axes


def _strip(cuts: Sequence[np.ndarray]) -> np.ndarray:
    """Put pictures of one size side by side, with white between them."""
    gap = np.full((cuts[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for cut in cuts for part in (cut, gap)][:-1], axis=1)
