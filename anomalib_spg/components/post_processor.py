# SPDX-License-Identifier: Apache-2.0

"""Post-processor that keeps the order of scores, so that it cannot change a ranking metric."""

from typing import Any

import torch
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer


class OrderPreservingPostProcessor(PostProcessor):
    """anomalib's post-processor with a strictly rising normalisation, for models whose raw scores lie in [0, 1].

    anomalib's own normalisation clamps ``(score - threshold) / (max - min) + 0.5`` to [0, 1]: scores tie at 0 or 1 when
    the threshold is far from the middle of their range, and ranking metrics computed afterwards suffer. This one is
    piecewise linear through ``(0, 0)``, ``(min, 0.05)``, ``(threshold, 0.5)``, ``(max, 0.95)``, ``(1, 1)``, with the
    extremes of the validation scores: shown scores lie in [0, 1] with the threshold at 0.5, use most of that range, and
    no two different scores become equal.

    Two more differences. The image threshold lies halfway between the two neighbouring validation scores it separates,
    not on one of them, so that rounding cannot turn a decision. And where validation holds only normal images, which
    leaves no F1 score to maximise, it is three standard deviations above the mean normal score, on the logit scale.

    Args:
        **kwargs: Arguments of :class:`anomalib.post_processing.PostProcessor`.

    Example:
        >>> post_processor = OrderPreservingPostProcessor()
        >>> scores = torch.tensor([0.2, 0.3, 0.8, 0.99])
        >>> low, high, threshold = torch.tensor(0.2), torch.tensor(0.8), torch.tensor(0.3)
        >>> post_processor._normalize(scores, low, high, threshold)
        tensor([0.0500, 0.5000, 0.9500, 0.9975])
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._validation_scores: list[torch.Tensor] = []
        self._validation_labels: list[torch.Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type has no batches of anomalib
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Gather what the thresholds and the normalisation are computed from."""
        super().on_validation_batch_end(trainer, pl_module, outputs, *args, **kwargs)
        if self.enable_thresholding and outputs.pred_score is not None and outputs.gt_label is not None:
            self._validation_scores.append(outputs.pred_score.detach().float().flatten().cpu())
            self._validation_labels.append(outputs.gt_label.detach().flatten().cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute thresholds and normalisation; see the class for how the image threshold is placed."""
        super().on_validation_epoch_end(trainer, pl_module)
        if not self._validation_scores:
            return
        scores, labels = torch.cat(self._validation_scores), torch.cat(self._validation_labels).bool()
        self._validation_scores, self._validation_labels = [], []
        if labels.any():
            below = scores[scores < self._image_threshold.cpu()]
            if len(below):
                self._image_threshold.copy_((self._image_threshold + below.max().to(self._image_threshold)) / 2)
        else:
            logits = torch.logit(scores.double(), eps=1e-6)
            spread = logits.std(correction=0) if len(logits) > 1 else torch.zeros(())
            self._image_threshold.copy_(torch.sigmoid(logits.mean() + 3 * spread))
            # Normal pixels alone give no pixel threshold either: that of the images takes its place.
            self._pixel_threshold.fill_(float("nan"))

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """Map raw scores in [0, 1] onto [0, 1], strictly rising, with the threshold at 0.5.

        Args:
            preds (torch.Tensor | None): Raw scores or maps of any shape.
            norm_min (torch.Tensor): Smallest validation score.
            norm_max (torch.Tensor): Largest validation score.
            threshold (torch.Tensor): Raw threshold. NaN takes the middle of the range.

        Returns:
            torch.Tensor | None: Normalised scores; unchanged where there has been no validation.
        """
        if preds is None:
            return preds
        threshold = torch.where(torch.isnan(threshold), (norm_max + norm_min) / 2, threshold)
        low, high = torch.minimum(norm_min, threshold), torch.maximum(norm_max, threshold)
        zero, one = torch.zeros_like(threshold), torch.ones_like(threshold)
        knots = [zero, low, threshold, high, one]
        levels = [0.0, 0.05, 0.5, 0.95, 1.0]
        normalized = torch.zeros_like(preds)
        for start, stop, bottom, top in zip(knots, knots[1:], levels, levels[1:], strict=False):
            length = stop - start
            share = (preds - start).clamp(min=0)
            share = torch.minimum(share, length) / torch.where(length > 0, length, one)
            # A segment of no length is a step: scores beyond it get its whole rise, those on it half of none.
            share = torch.where(length > 0, share, (preds > start).to(preds.dtype))
            normalized = normalized + (top - bottom) * share
        # The clamp is for rounding only, see AnomalyMapGenerator.
        return torch.where(torch.isnan(norm_min) | torch.isnan(norm_max), preds, normalized.clamp(0, 1))
