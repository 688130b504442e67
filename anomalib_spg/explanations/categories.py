# SPDX-License-Identifier: Apache-2.0

"""What categories have in common: atoms that explain their rejected images, and sensitive neurons."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


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
        rate (float): Share of a category's rejected images an atom must explain to be used there. Defaults to 0.1.
        atoms (int): Maximum number of atoms to show. Defaults to 30.

    Returns:
        Figure: Categories against atoms; the line separates general from specific ones.

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


def neuron_overlap(products: Mapping[str, Mapping[int, Sequence[int]]]) -> np.ndarray:
    """Compute how much the sensitive neurons of products overlap.

    Args:
        products (Mapping[str, Mapping[int, Sequence[int]]]): For every product the chosen channels by block.

    Returns:
        np.ndarray: Share of the first product's neurons that are also the second one's, ``(P, P)``.

    Example:
        >>> neuron_overlap({"nut": {5: [1, 2]}, "bolt": {5: [2, 3]}}).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    sets = [{(block, int(n)) for block, numbers in layers.items() for n in numbers} for layers in products.values()]
    return np.array([[len(a & b) / max(len(a), 1) for b in sets] for a in sets])


def plot_overlap(products: Mapping[str, Mapping[int, Sequence[int]]]) -> Figure:
    """Show how much the sensitive neurons of products overlap.

    Args:
        products (Mapping[str, Mapping[int, Sequence[int]]]): For every product the chosen channels by block.

    Returns:
        Figure: Products against products.

    Example:
        >>> plot_overlap({"nut": {5: [1, 2]}, "bolt": {5: [2, 3]}}).axes[0].get_title()
        'shared sensitive neurons'
    """
    table = neuron_overlap(products)
    figure = Figure(figsize=(2.6 + 0.6 * len(table), 2 + 0.6 * len(table)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(table, cmap="Reds", vmin=0, vmax=1)
    axes.set_title("shared sensitive neurons", fontsize=10)
    axes.set_xticks(range(len(table)), list(products), rotation=90, parse_math=False)
    axes.set_yticks(range(len(table)), list(products), parse_math=False)
    for (row, column), value in np.ndenumerate(table):
        axes.text(
            column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black", fontsize=8
        )
    return figure
