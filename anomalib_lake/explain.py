# SPDX-License-Identifier: Apache-2.0

"""Why an image has its score: the score split exactly into contributions of neurons, of places and of the text."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn import functional as F  # noqa: N812

from anomalib_spg.components.own_image import kept_patches, outside
from anomalib_spg.components.precision import full_precision
from anomalib_spg.explanations.explanation import Explanation

from .bank import average_neighbors, stride_of

if TYPE_CHECKING:
    from anomalib_spg.components.backbone import Tokens

    from .torch_model import LAKEModel


@torch.no_grad()
def explain(model: LAKEModel, tokens: Tokens, image_size: tuple[int, int]) -> list[Explanation]:
    r"""Split the scores of a batch into neurons, places and text.

    A patch's squared distance to a normal patch is a sum over neurons, :math:`d^2 = \sum_k (x_k - m_k)^2`, where
    places count (:class:`~anomalib_lake.places.Places`) over their two coordinates, too; and so is that to the nearest
    one elsewhere in its image. The structural part of its anomaly is divided among them in proportion to those squares,
    block by block; the image's score is the mean anomaly of its highest patches, hence neurons, places and text sum to
    it.

    Args:
        model (LAKEModel): Model with a normality bank.
        tokens (Tokens): The backbone's output for the images.
        image_size (tuple[int, int]): Height and width of the images.

    Returns:
        list[Explanation]: One per image. ``other`` holds what the text adds, where it has a weight, and what places
            add, where they count; ``nearest`` names the normal patch of the block in which the highest patch deviates
            most from the bank.

    Example:
        >>> from anomalib_lake import LAKEModel
        >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, num_neurons=20)
        >>> _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> _ = model.fit()
        >>> images = torch.randn(1, 3, 64, 64)
        >>> explanation = explain(model.eval(), model.backbone(images), (64, 64))[0]
        >>> torch.allclose(explanation.contributions.sum(), model(images).pred_score[0], atol=1e-5)
        True
    """
    with full_precision(tokens.patches[0].device):
        return _explain(model, tokens, image_size)


def _explain(model: LAKEModel, tokens: Tokens, image_size: tuple[int, int]) -> list[Explanation]:
    by_block = dict(zip(model.backbone.layers, tokens.patches, strict=True))
    text = model.semantic_activation(by_block[model.semantic_layer]) if model.text_weight > 0 else None
    return [
        _explain_image(
            model,
            {block: patches[index] for block, patches in by_block.items()},
            None if text is None else text[index],
            tokens.grid,
            image_size,
        )
        for index in range(len(tokens.patches[0]))
    ]


def _explain_image(
    model: LAKEModel,
    by_block: dict[int, torch.Tensor],
    text: torch.Tensor | None,
    grid: tuple[int, int],
    image_size: tuple[int, int],
) -> Explanation:
    """Explain one image from its raw tokens ``(N, D)`` by block and its semantic activation ``(N,)``."""
    splits: list[torch.Tensor] = []  # by scale: (N, L, K)
    distances: list[torch.Tensor] = []  # to the bank (N, L)
    matches: list[torch.Tensor] = []  # (N, L)
    for number, scale in enumerate(model.scales):
        found = []
        for block_number, (block, neurons, banks) in enumerate(
            zip(model.layers, model.neurons, model.banks, strict=True)
        ):
            projected = neurons.project(by_block[block])[None]
            x = neurons.normalize(average_neighbors(projected, grid, scale))[0]
            bank, placed = banks[number], model.places(x, block_number, grid)
            neighbors = min(bank.num_neighbors, len(bank.tokens))
            match = torch.cdist(placed, bank.tokens).topk(neighbors, dim=1, largest=False).indices  # the nearest first
            split = _split(placed[:, None], bank.tokens[match]).mean(dim=1) / bank.distance_scale
            distance = split.sum(dim=1)
            if model.own_weight > 0:
                own = model.own_images[block_number][number]
                kept = kept_patches(grid, stride_of(scale), x.device)
                elsewhere = (
                    torch
                    .cdist(x, x[kept])
                    .masked_fill(~outside(grid, stride_of(scale), x.device), float("inf"))
                    .argmin(dim=1)
                )
                own_split = _split(x, x[kept[elsewhere]]) / own.distance_scale
                own_split = F.pad(own_split, (0, split.shape[1] - own_split.shape[1]))  # places do not count there
                split = torch.lerp(split, own_split, model.own_weight)
            found.append((split, distance, match[:, 0]))
        for collected, values in zip((splits, distances, matches), zip(*found, strict=True), strict=True):
            collected.append(torch.stack(values, dim=1))
    deviations = torch.stack(splits).sum(dim=3).mean(dim=2)  # (S, N)
    deviation, winner = deviations.max(dim=0)
    patches = torch.arange(len(winner), device=winner.device)
    split = torch.stack(splits)[winner, patches] / len(model.layers)  # (N, L, K)
    structural = (1 - model.text_weight) / (1 + deviation)
    parts = split * structural[:, None, None]
    count = split.shape[2] - model.places.columns
    maps, places = parts[..., :count].flatten(1), parts[..., count:].sum(dim=(1, 2))
    anomaly = structural * deviation
    if text is not None:
        anomaly = anomaly + model.text_weight * text
    highest = anomaly.topk(min(model.top_patches, len(anomaly))).indices
    peak = int(highest[0])
    scale = int(winner[peak])
    layer = int(distances[scale][peak].argmax())
    bank = model.banks[layer][scale]
    match = matches[scale][peak, layer]
    other = {} if text is None else {"text": float(model.text_weight * text[highest].mean())}
    if model.places.columns:
        other["place"] = float(places[highest].mean())
    numbers = [neurons.indices if len(neurons.indices) else torch.arange(neurons.count) for neurons in model.neurons]
    patch_map = rearrange(anomaly, "(h w) -> 1 h w", h=grid[0])
    return Explanation(
        unit="component" if model.neurons[0].selection == "pca" else "neuron",
        score=float(anomaly[highest].mean()),
        base=0.0,
        blocks=torch.tensor(model.layers).repeat_interleave(count),
        units=torch.cat([indices.cpu() for indices in numbers]),
        contributions=maps[highest].mean(dim=0).float().cpu(),
        maps=rearrange(maps, "(h w) part -> part h w", h=grid[0]).float().cpu(),
        anomaly_map=model.anomaly_map_generator(patch_map, image_size)[0, 0].float().cpu(),
        peak=divmod(peak, grid[1]),
        other=other,
        nearest=(int(bank.image_indices[match]), int(bank.patch_indices[match]), model.scales[scale]),
    )


def _split(x: torch.Tensor, matches: torch.Tensor) -> torch.Tensor:
    """Distances of tokens ``(..., K)`` to their matches, divided among the neurons ``(..., K)``."""
    squares = (x - matches).square()
    # distance = sum of squares / distance
    return squares / squares.sum(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)
