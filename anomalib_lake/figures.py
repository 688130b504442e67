# SPDX-License-Identifier: Apache-2.0

"""Figures of LAKE's neurons, for notebooks and reports. Each returns a matplotlib figure."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
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
        >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, num_neurons=20)
        >>> _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> _ = model.fit()
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
