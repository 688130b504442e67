# SPDX-License-Identifier: Apache-2.0

"""Figure of SPG's guides, for notebooks and reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from .explanations.figures import AGAINST, CUT, FOR, show, strip

if TYPE_CHECKING:
    from .explanations.examples import Examples
    from .guides import Guides


def plot_guides(guides: Guides, block: int, examples: Examples | None = None, atoms: int = 8) -> Figure:
    """Show what SPG's local guides of a block look for: the atoms that push most to anomaly and to normal.

    An atom's strength is what it adds to the difference of the two cosines for a patch equal to the atom, see
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
    strengths = guides.local_strengths().cpu().nan_to_num(0, 0, 0)  # a broken model must not stop a run here
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
    limit = float(strengths.abs().max()) * 1.1 or 1.0
    for number, (name, chosen, colour) in enumerate(sides):
        axes = figure.add_subplot(columns[0, number * 2 if has_examples else number])
        axes.barh(range(len(chosen)), strengths[chosen].abs().numpy(), color=colour)
        axes.set(title=name, xlim=(0, limit), ylim=(atoms - 0.5, -0.5), xlabel="strength")
        axes.set_yticks(range(len(chosen)), [f"atom {int(guides.atom_indices[i])}" for i in chosen])
        axes.spines[["top", "right"]].set_visible(False)
        if examples is not None and has_examples:
            strips = columns[0, number * 2 + 1].subgridspec(atoms, 1)
            for row, i in enumerate(chosen):
                cuts = examples.of(block, int(guides.atom_indices[i]), CUT)
                if cuts:
                    show(figure.add_subplot(strips[row]), strip(cuts), "")
    return figure
