# SPDX-License-Identifier: Apache-2.0

"""Figures of LAKE's neurons, for notebooks and reports. Each returns a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from .torch_model import LAKEModel


def plot_neurons(model: LAKEModel) -> Figure:
    """Show how far the variance of the chosen neurons stands out, layer by layer.

    Args:
        model (LAKEModel): Model with chosen neurons.

    Returns:
        Figure: For every structural layer the variances of all channels, largest first, the chosen ones in red.

    Example:
        >>> import torch
        >>> from anomalib_lake import LAKEModel
        >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, neurons=20)
        >>> _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> model.fit()
        >>> plot_neurons(model).axes[0].get_title(loc="left")[:7]
        'block 5'
    """
    figure = Figure(figsize=(5 * len(model.layers), 3.4), layout="constrained")
    for column, (block, neurons) in enumerate(zip(model.layers, model.neurons, strict=True)):
        variances = neurons.variances.cpu().numpy()
        order = np.argsort(-variances, kind="stable")
        chosen = np.isin(order, neurons.indices.cpu().numpy())
        axes = figure.add_subplot(1, len(model.layers), column + 1)
        axes.bar(np.arange(len(order)), variances[order], width=1, color=np.where(chosen, "#c1272d", "#b0b0b0"))
        share = variances[order][chosen].sum() / variances.sum()
        axes.set_title(
            f"block {block}: {chosen.sum()} neurons hold {share:.0%} of the variance", fontsize=10, loc="left"
        )
        axes.set(yscale="log", xlabel="channels, by variance", ylabel="variance over normal patches")
        named = ", ".join(str(number) for number in order[chosen][:6])
        axes.text(0.98, 0.95, f"most sensitive: {named}", transform=axes.transAxes, ha="right", va="top", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def neuron_overlap(products: Mapping[str, Mapping[int, Sequence[int]]]) -> np.ndarray:
    """Compute how much the sensitive neurons of products overlap.

    Args:
        products (Mapping[str, Mapping[int, Sequence[int]]]): For every product the chosen channels by block.

    Returns:
        np.ndarray: Share of the first product's neurons that the second one has, too; ``(P, P)``.

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
