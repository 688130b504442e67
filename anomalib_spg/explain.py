# SPDX-License-Identifier: Apache-2.0

"""Why an image has its score: the score split exactly into contributions of atoms."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch.nn import functional as F  # noqa: N812

from .components.precision import full_precision
from .explanations.explanation import Explanation

if TYPE_CHECKING:
    from .components.backbone import Tokens
    from .torch_model import SPGModel


@torch.no_grad()
def explain(model: SPGModel, tokens: Tokens, image_size: tuple[int, int]) -> list[Explanation]:
    r"""Split the scores of a batch into atoms.

    The cosines to the two local guides are sums over atoms :math:`c`. With :math:`w_c` of
    :meth:`Guides.local_strengths`,

    .. math:: \cos(x, g_a) - \cos(x, g_n) = \sum_c w_c \frac{A_c \cdot x}{\lVert x \rVert} = \sum_c t_c(x).

    The probability is the sigmoid of that sum, so its distance from 1/2, which is no preference, is divided among the
    atoms in proportion to their terms: :math:`p - 1/2 = \sum_c t_c \, (p - 1/2) / \sum_c t_c`. With ``own_weight`` the
    patch's rarity in its image is one more term. Averaging layers, upsampling and smoothing are linear, hence what the
    terms add sums to every pixel of the map and to the score.

    Args:
        model (SPGModel): Model with guides.
        tokens (Tokens): The backbone's output for the images.
        image_size (tuple[int, int]): Height and width of the images.

    Returns:
        list[Explanation]: One per image. ``other`` holds what the rarity adds, where it has a weight, and with
            ``image_score="lse"``, which is not linear, the difference between the score and the weighted mean of the
            pixels.

    Example:
        >>> from anomalib_spg import SPGModel
        >>> model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False).eval()
        >>> model.guides[0].set(F.normalize(torch.randn(6, 192), dim=1), torch.arange(6), torch.rand(4, 6))
        >>> images = torch.randn(1, 3, 64, 64)
        >>> explanation = explain(model, model.backbone(images), (64, 64))[0]
        >>> total = explanation.base + explanation.contributions.sum()
        >>> torch.allclose(total, model(images).pred_score[0], atol=1e-5), explanation.maps.shape
        (True, torch.Size([6, 4, 4]))
    """
    with full_precision(tokens.patches[0].device):
        return _explain(model, tokens, image_size)


def _explain(model: SPGModel, tokens: Tokens, image_size: tuple[int, int]) -> list[Explanation]:
    layers = list(zip(model.guides, tokens.patches, strict=True))
    terms, rare = [], []
    for guides, patches in layers:
        added = model.rarity(patches, tokens.grid)
        by_atom, by_rarity = _terms(patches, guides.atoms, guides.local_strengths(), model.temperature, added)
        terms.append(by_atom)
        rare.append(by_rarity)
    maps = torch.cat(terms, dim=2) / len(layers)
    rarity = torch.stack(rare).mean(dim=0)
    probability = 0.5 + maps.sum(dim=2) + rarity
    patch_map = rearrange(probability, "b (h w) -> b h w", h=tokens.grid[0])
    anomaly_map = model.anomaly_map_generator(patch_map, image_size)[:, 0]
    pixel_weights = _pixel_weights(model, anomaly_map)
    patch_weights = model.anomaly_map_generator.patch_weights(pixel_weights, tokens.grid).flatten(1)
    contributions = torch.einsum("bnc,bn->bc", maps, patch_weights)
    by_rarity = (rarity * patch_weights).sum(dim=1)
    scores = model.score(anomaly_map.flatten(1))
    rest = scores - 0.5 - contributions.sum(dim=1) - by_rarity
    if model.cls_weight > 0:
        pooled = [
            _terms(x, guides.atoms, guides.global_strengths(), model.temperature)[0]
            for guides, x in zip(model.guides, tokens.pooled, strict=True)
        ]
        by_pooled = torch.cat(pooled, dim=1) / len(layers)
        contributions = torch.lerp(contributions, by_pooled, model.cls_weight)
        scores = torch.lerp(scores, 0.5 + by_pooled.sum(dim=1), model.cls_weight)
        rest *= 1 - model.cls_weight
        by_rarity *= 1 - model.cls_weight
    blocks = torch.cat([
        torch.full((len(guides.atoms),), block)
        for guides, block in zip(model.guides, model.backbone.layers, strict=True)
    ])
    units = torch.cat([guides.atom_indices for guides in model.guides]).cpu()
    pushes_to_normal = torch.cat([guides.local_strengths() < 0 for guides in model.guides]).cpu()
    return [
        Explanation(
            unit="atom",
            score=float(scores[i]),
            base=0.5,
            blocks=blocks,
            units=units,
            contributions=contributions[i].float().cpu(),
            maps=rearrange(maps[i], "(h w) atom -> atom h w", h=tokens.grid[0]).float().cpu(),
            anomaly_map=anomaly_map[i].float().cpu(),
            opposed=None if model.cls_weight > 0 else (contributions[i] > 0).cpu() & pushes_to_normal,
            peak=divmod(int((patch_weights[i] * probability[i]).argmax()), tokens.grid[1]),
            other={
                **({"rare in its image": float(by_rarity[i])} if model.own_weight > 0 else {}),
                **({"image score": float(rest[i])} if model.image_score == "lse" else {}),
            },
        )
        for i in range(len(scores))
    ]


def _terms(
    tokens: torch.Tensor,
    atoms: torch.Tensor,
    strengths: torch.Tensor,
    temperature: float,
    added: torch.Tensor | float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Divide ``p - 1/2`` of tokens ``(..., D)`` among atoms ``(..., n)`` and what is added to the logit ``(...)``."""
    terms = F.normalize(tokens, dim=-1, eps=1e-8) @ atoms.T * strengths / temperature
    added = torch.zeros_like(terms[..., 0]) + added
    logit = (terms.sum(dim=-1) + added)[..., None]
    # (sigmoid(l) - 1/2) / l = tanh(l / 2) / 2l, which tends to 1/4 as l goes to 0
    safe = torch.where(logit.abs() > 1e-4, logit, 1.0)
    per_logit = torch.where(logit.abs() > 1e-4, torch.tanh(safe / 2) / (2 * safe), 0.25)
    return terms * per_logit, added * per_logit[..., 0]


def _pixel_weights(model: SPGModel, anomaly_map: torch.Tensor) -> torch.Tensor:
    """Weight of each pixel in the image score ``(B, H, W)``; they sum to 1."""
    # The gradient of the score. Tests run in inference mode, where tensors have no gradient.
    with torch.inference_mode(mode=False), torch.enable_grad():
        pixels = anomaly_map.flatten(1).clone().requires_grad_()
        return torch.autograd.grad(model.score(pixels).sum(), pixels)[0].view_as(anomaly_map)
