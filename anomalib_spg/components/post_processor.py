# SPDX-License-Identifier: Apache-2.0

"""Post-processor whose thresholds come from good parts, and which keeps the order of scores."""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import Batch, InferenceBatch
from anomalib.data.utils.synthetic import SyntheticAnomalyDataset
from anomalib.post_processing import PostProcessor
from lightning import LightningModule, Trainer
from torch import distributed
from torch.utils.data import DistributedSampler

from .held_out import validated_and_tested
from .threshold import WEAK_PRIOR, GoodPartThreshold, Prior, best_with_bad, good_part_threshold, logit

logger = logging.getLogger(__name__)

RATES = ("false_alarm_rate", "pixel_false_alarm_rate")
FALSE_ALARM_RATE = 0.08  # measured: half as many misses as with 0.02, and 30 good images are enough to guarantee it
PIXEL_FALSE_ALARM_RATE = 0.001
# Pixels of good parts are counted in bins of their logits: one per 0.01, of -40 to 20.
LOWEST, HIGHEST, BINS = -40.0, 20.0, 6000


class GoodPartsPostProcessor(PostProcessor):
    """Accept or reject by what good parts score.

    **Image threshold.** New good parts exceed it at ``false_alarm_rate``, see :func:`.threshold.good_part_threshold`.
    It rests on the good images that the model has not learned from: those it holds out itself while it is fitted
    (:meth:`add_good`), and those of validation. Anomalies that anomalib drew on validation images say little about
    where good parts end, and are ignored. Real bad images of validation move the threshold to where F1 is highest, but
    not further than to the named rate; to twice the default one where none is named.

    **Pixel threshold.** ``pixel_false_alarm_rate`` of the pixels of good parts exceed it. Only rejected images have a
    mask: an accepted part shows no outline.

    **Shown scores** are the same for every model: 0.5 is the threshold, 0.2 a typical good part (or pixel of one), and
    0.8 lies as far above the threshold as a typical good part lies below it, on the logit scale. They rise strictly
    with the raw scores, unlike anomalib's, which clamps and can lower a ranking metric.

    A score that is not finite is rejected.

    Thresholds are part of every checkpoint and export. The scores they come from are in the checkpoint, too, so that
    another rate needs no training: give it when the checkpoint is loaded, or call :meth:`place_thresholds`.

    Args:
        false_alarm_rate (float | None): Share of good parts that may be rejected, in (0, 0.5]. ``None`` is 0.08 when
            the model is fitted (ours), and leaves the thresholds of a checkpoint as they are.
        pixel_false_alarm_rate (float | None): Share of the pixels of good parts above the pixel threshold. ``None`` is
            0.001 when the model is fitted (ours), and leaves that of a checkpoint.
        prior (Prior): How much the logits of good parts usually vary for this model. Defaults to a weak one.
        **kwargs: Arguments of :class:`anomalib.post_processing.PostProcessor`.

    Attributes:
        threshold (GoodPartThreshold | None): The threshold good parts alone would give, and the rate to expect.

    Raises:
        ValueError: If a rate is out of range, or ``enable_normalization`` is false: anomalib would then compare raw
            scores with 0.5, wherever the threshold lies.

    Example:
        >>> post_processor = GoodPartsPostProcessor(false_alarm_rate=0.1)
        >>> post_processor.add_good(torch.linspace(0.30, 0.48, 19))
        >>> post_processor.place_thresholds()
        >>> shown = post_processor(InferenceBatch(pred_score=torch.tensor([0.39, 0.47, 0.6]), anomaly_map=None))
        >>> shown.pred_score.round(decimals=2), shown.pred_label
        (tensor([0.2000, 0.4900, 0.8500]), tensor([False, False,  True]))
    """

    def __init__(
        self,
        false_alarm_rate: float | None = None,
        pixel_false_alarm_rate: float | None = None,
        prior: Prior = WEAK_PRIOR,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_rates(false_alarm_rate, pixel_false_alarm_rate)
        if not self.enable_normalization:
            msg = (
                "enable_normalization=False would compare raw scores with 0.5, wherever the threshold lies. Leave it "
                "out: shown scores keep the order of raw ones, which the torch model returns."
            )
            raise ValueError(msg)
        self.false_alarm_rate = false_alarm_rate
        self.pixel_false_alarm_rate = pixel_false_alarm_rate
        self._is_rate_named = false_alarm_rate is not None or pixel_false_alarm_rate is not None
        self.prior = Prior(*prior)
        self.threshold: GoodPartThreshold | None = None
        self._forget()
        self.register_load_state_dict_post_hook(_place_anew)

    def _forget(self) -> None:
        # Logits of scores: held-out good images, leave-one-out ones of those learned from, those of validation.
        self._scores: dict[str, list[float]] = {"held_out": [], "learned": [], "good": [], "bad": []}
        self._pixels = {name: torch.zeros(BINS, dtype=torch.long) for name in ("held_out", "good")}
        self._validated = 0  # images of this process

    @staticmethod
    def to_unit(scores: torch.Tensor) -> torch.Tensor:
        """Bring raw scores of any shape into [0, 1], strictly rising; here they lie there already."""
        return scores

    def add_good(
        self,
        scores: torch.Tensor,
        maps: torch.Tensor | None = None,
        learned_from: bool = False,
        paths: Sequence[str] | None = None,
    ) -> None:
        """Take note of good parts.

        Args:
            scores (torch.Tensor): Raw scores ``(B,)``.
            maps (torch.Tensor | None): Raw anomaly maps ``(B, 1, H, W)``.
            learned_from (bool): Whether the model has learned from these images, so that their scores are estimates of
                what a new image would get. They count only where a tail is fitted.
            paths (Sequence[str] | None): Files of the images, for the message.

        Raises:
            ValueError: If a score is not a finite number.
        """
        self._scores["learned" if learned_from else "held_out"] += self._logits(scores, paths)
        if maps is not None:
            self._pixels["held_out"] += self._histogram(maps)

    def _logits(self, scores: torch.Tensor, paths: Sequence[str] | None = None) -> list[float]:
        broken = (~scores.detach().flatten().isfinite()).nonzero().flatten().tolist()
        if broken:
            names = ", ".join(str(paths[index]) for index in broken[:5]) if paths else "their files are not known here"
            msg = (
                f"{len(broken)} of {scores.numel()} images that should set the threshold have a score that is not a "
                f"finite number: {names}. Leave them out, or check the model's weights."
            )
            raise ValueError(msg)
        return logit(self.to_unit(scores.detach())).flatten().tolist()

    def _histogram(self, maps: torch.Tensor) -> torch.Tensor:
        values = logit(self.to_unit(maps.detach())).flatten().clamp(LOWEST, HIGHEST - 1e-3)
        return torch.histc(values.float().cpu(), BINS, LOWEST, HIGHEST).long()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier fit has seen, and say where images that place the threshold are tested on."""
        del pl_module
        self._forget()
        both = validated_and_tested(getattr(trainer, "datamodule", None))
        if both and trainer.enable_validation and trainer.is_global_zero:
            logger.warning(
                "Validation and test share %d images, which place the threshold and are then decided on: F1Score, "
                "FalseAlarmRate and MissRate will look better than they are on new parts. AUROC and average precision "
                "know no threshold. Give the datamodule val_split_mode=from_test to divide its test images, from_train "
                "to place the threshold by good images only, or for SPG and LAKE, which hold some out, none.",
                both,
            )

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an earlier validation has seen; held-out images stay."""
        del trainer, pl_module
        self._scores |= {"good": [], "bad": []}
        self._pixels["good"] = torch.zeros(BINS, dtype=torch.long)
        self._validated = 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type has no batches of anomalib
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Take note of good and bad images."""
        del pl_module, args, kwargs
        if outputs.pred_score is None or outputs.gt_label is None:
            return
        loader = getattr(trainer, "val_dataloaders", None)
        drawn = isinstance(getattr(loader, "dataset", None), SyntheticAnomalyDataset)
        bad = outputs.gt_label.detach().bool().flatten().to(outputs.pred_score.device)
        scores = outputs.pred_score.detach().flatten()
        new = self._first_time(loader, len(scores)).to(bad.device)
        for kind, chosen in (("good", ~bad & new), ("bad", bad & new & (not drawn))):
            paths = [path for path, is_chosen in zip(outputs.image_path or [], chosen, strict=False) if is_chosen]
            self._scores[kind] += self._logits(scores[chosen], paths)
        if outputs.anomaly_map is not None:
            self._pixels["good"] += self._histogram(outputs.anomaly_map[~bad & new])

    def _first_time(self, loader: Any, count: int) -> torch.Tensor:  # noqa: ANN401
        """Which of the next images of validation count: not those that only make all processes' shares equal."""
        numbers = torch.arange(self._validated, self._validated + count)
        self._validated += count
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return torch.ones(count, dtype=torch.bool)
        return numbers * sampler.num_replicas + sampler.rank < len(sampler.dataset)  # type: ignore[arg-type]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Place the thresholds, and say what they rest on."""
        del pl_module
        if getattr(trainer, "world_size", 1) > 1:
            self._gather()
        self.place_thresholds()
        logger.info(self.report())

    def _gather(self) -> None:
        """Put together what the processes have seen in validation, each of its share of the images."""
        shares: list[Any] = [None] * distributed.get_world_size()
        seen = ({name: self._scores[name] for name in ("good", "bad")}, self._pixels["good"])
        distributed.all_gather_object(shares, seen)
        for name in ("good", "bad"):
            self._scores[name] = [score for scores, _ in shares for score in scores[name]]
        self._pixels["good"] = torch.stack([pixels for _, pixels in shares]).sum(dim=0)

    def place_thresholds(
        self, false_alarm_rate: float | None = None, pixel_false_alarm_rate: float | None = None
    ) -> None:
        """Place the thresholds by the images that are known, for instance of a loaded checkpoint.

        Args:
            false_alarm_rate (float | None): Another rate from now on. ``None`` keeps it.
            pixel_false_alarm_rate (float | None): Another rate from now on. ``None`` keeps it.

        Raises:
            ValueError: If a rate is out of range.

        Example:
            >>> post_processor = GoodPartsPostProcessor()
            >>> post_processor.add_good(torch.linspace(0.2, 0.5, 99))
            >>> post_processor.place_thresholds(false_alarm_rate=0.02)
            >>> post_processor.image_threshold
            tensor(0.4972)
        """
        _check_rates(false_alarm_rate, pixel_false_alarm_rate)
        self.false_alarm_rate = false_alarm_rate or self.false_alarm_rate
        self.pixel_false_alarm_rate = pixel_false_alarm_rate or self.pixel_false_alarm_rate
        named, scores = self.false_alarm_rate, self._scores
        rate = named or FALSE_ALARM_RATE
        held_out = [*scores["held_out"], *scores["good"]]
        good = [*held_out, *scores["learned"]]
        self.threshold = good_part_threshold(held_out, rate, scores["learned"], self.prior) if good else None
        if self.threshold is not None:
            limit = self.threshold.logit
            if scores["bad"]:
                if named is None:
                    limit = good_part_threshold(held_out, 2 * rate, scores["learned"], self.prior).logit
                limit = best_with_bad(good, scores["bad"], self.threshold.logit, limit)
            self._store("image", limit, float(torch.tensor(good).median()))
        elif scores["bad"]:  # no good image at all: half of the known bad ones are found
            middle = float(torch.tensor(scores["bad"]).median())
            self._store("image", middle, middle - 1)
        pixels = self._pixels["held_out"] + self._pixels["good"]
        if int(pixels.sum()):
            share = self.pixel_false_alarm_rate or PIXEL_FALSE_ALARM_RATE
            self._store("pixel", _quantile(pixels, 1 - share), _quantile(pixels, 0.5))
        elif self.threshold is not None:
            self._pixel_threshold.fill_(float("nan"))  # that of the images takes its place

    def _store(self, kind: str, threshold: float, typical: float) -> None:
        """Keep a threshold and a typical good score where anomalib keeps thresholds and smallest scores."""
        typical = min(typical, threshold - 1e-3)  # so that shown scores rise even where all good parts are alike
        values = torch.sigmoid(torch.tensor([threshold, typical, 2 * threshold - typical], dtype=torch.double))
        for name, value in zip((f"_{kind}_threshold", f"{kind}_min", f"{kind}_max"), values, strict=True):
            getattr(self, name).copy_(value)

    def good_below(self, score: float) -> tuple[int, int]:
        """Compare a score with those of the good images that are known.

        Args:
            score (float): Raw score.

        Returns:
            tuple[int, int]: How many of them score lower, and how many there are.

        Example:
            >>> post_processor = GoodPartsPostProcessor()
            >>> post_processor.add_good(torch.tensor([0.2, 0.3, 0.4]))
            >>> post_processor.good_below(0.35)
            (2, 3)
        """
        good = [*self._scores["held_out"], *self._scores["learned"], *self._scores["good"]]
        limit = float(logit(self.to_unit(torch.tensor(score))))
        return sum(x < limit for x in good), len(good)

    def report(self) -> str:
        """Say what the threshold rests on and what to expect of it.

        Returns:
            str: A few sentences.
        """
        if self.threshold is None:
            return "No good image has been seen: there is no threshold that says where good parts end."
        known = self.threshold
        low, high = known.interval
        named = self.false_alarm_rate or FALSE_ALARM_RATE
        own, placed = float(torch.sigmoid(torch.tensor(known.logit))), float(logit(self.image_threshold))
        expected = f"about {known.rate:.1%} of good parts ({low:.1%} to {high:.1%} with 90 % probability)"
        if abs(placed - known.logit) < 1e-3:
            learned = 0 if known.is_conformal else len(self._scores["learned"])
            of_them = f" ({learned} of them learned from)" if learned else ""
            images = f"{known.images} good images{of_them}"
            words = f"Threshold {own:.3f} (shown as 0.5) from {images}. It will reject {expected}."
        else:
            good = [*self._scores["held_out"], *self._scores["good"]]
            words = (
                f"Threshold {float(self.image_threshold):.3f} (shown as 0.5), moved by bad images: "
                f"{sum(x > placed for x in good)} of the {len(good)} good images that are not learned from lie above "
                f"it. Good images alone would place it at {own:.3f}, to reject {expected}."
            )
        if not known.is_conformal:
            enough = math.ceil(2 / named - 1e-9) - 1
            words += f" That rests on a fitted tail; {enough} good images that are not learned from would guarantee it."
        if known.images == 1:
            words += " One image hardly tells how good parts vary: take the decisions as provisional."
        bad = self._scores["bad"]
        if not bad:
            return f"{words} How many bad parts it misses is unknown: there were no bad images to place it by."
        found = sum(x > placed for x in bad)
        return f"{words} It finds {found} of the {len(bad)} bad images it was placed by."

    def checkpoint_config(self) -> dict[str, Any]:
        """Plain data for a checkpoint: anomalib's, and the scores the thresholds come from."""
        pixels = {name: counts.tolist() for name, counts in self._pixels.items()}
        rates = {name: getattr(self, name) for name in RATES}
        return {**super().checkpoint_config(), "scores": self._scores, "pixels": pixels, "rates": rates}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore what :meth:`checkpoint_config` gave."""
        super().load_checkpoint_config(config)
        self._is_rate_named = any(getattr(self, name) is not None for name in RATES)
        for name, rate in config.get("rates", {}).items():
            if getattr(self, name) is None:  # a rate that is not named now stays
                setattr(self, name, rate)
        self._scores |= config.get("scores", {})
        self._pixels |= {name: torch.tensor(counts) for name, counts in config.get("pixels", {}).items()}

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Post-process predictions; only rejected images keep a mask."""
        result = super().forward(predictions)
        if result.pred_mask is None or result.pred_label is None or not self.enable_thresholding:
            return result
        return result._replace(pred_mask=_of_rejected(result.pred_mask, result.pred_label))

    def threshold_batch(self, batch: Batch) -> None:
        """Threshold a batch; only rejected images keep a mask."""
        super().threshold_batch(batch)
        if batch.pred_mask is not None and batch.pred_label is not None:
            batch.pred_mask = _of_rejected(batch.pred_mask, batch.pred_label)

    @staticmethod
    def _apply_threshold(preds: torch.Tensor | None, threshold: torch.Tensor) -> torch.Tensor | None:
        """Reject what is not at or below the threshold: a score that is not a number, too."""
        return None if preds is None else ~(preds <= threshold)

    @classmethod
    def _normalize(
        cls,
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        r"""Map raw scores onto shown ones: :math:`\frac 1 2 + \frac{3 x / 2}{2 + 3 |x|}`.

        Here :math:`x` is the distance from the threshold on the logit scale, in units of that of a typical good part.

        Args:
            preds (torch.Tensor | None): Raw scores or maps of any shape.
            norm_min (torch.Tensor): Score of a typical good part, in [0, 1].
            norm_max (torch.Tensor): Unused.
            threshold (torch.Tensor): Threshold, in [0, 1].

        Returns:
            torch.Tensor | None: Shown scores; raw ones where there are no thresholds.
        """
        del norm_max
        if preds is None:
            return preds
        unit = logit(threshold) - logit(norm_min)
        x = ((logit(cls.to_unit(preds)) - logit(threshold)) / unit).float()
        shown = 0.5 + 1.5 * x / (2 + 3 * x.abs())
        return torch.where(torch.isnan(threshold) | torch.isnan(norm_min), preds.to(shown.dtype), shown)


def _check_rates(false_alarm_rate: float | None, pixel_false_alarm_rate: float | None) -> None:
    rates = {"false_alarm_rate": false_alarm_rate, "pixel_false_alarm_rate": pixel_false_alarm_rate}
    for name, rate in rates.items():
        if rate is not None and not 0 < rate <= 0.5:
            msg = f"{name}={rate} must lie in (0, 0.5]: the share of good parts, or of their pixels, above it."
            raise ValueError(msg)


def _quantile(counts: torch.Tensor, share: float) -> float:
    """Logit below which a share of the counted pixels lies, linear within a bin."""
    below = counts.double().cumsum(0) / counts.sum()
    bin_ = min(int(torch.searchsorted(below, share)), BINS - 1)
    start = float(below[bin_ - 1]) if bin_ else 0.0
    part = (share - start) / max(float(below[bin_]) - start, 1e-12)
    return LOWEST + (bin_ + min(max(part, 0.0), 1.0)) * (HIGHEST - LOWEST) / BINS


def _of_rejected(masks: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return masks & labels.view(-1, *[1] * (masks.ndim - 1))


def _place_anew(post_processor: GoodPartsPostProcessor, incompatible: Any) -> None:  # noqa: ANN401
    """After a checkpoint is loaded: another rate that was named moves its thresholds."""
    del incompatible
    if not post_processor._is_rate_named:  # noqa: SLF001
        return
    if any(post_processor._scores.values()):  # noqa: SLF001
        post_processor.place_thresholds()
    elif not post_processor.image_threshold.isnan():
        logger.warning(
            "The checkpoint holds no scores of good parts, so its thresholds stay as they are: a rate that is named "
            "now changes nothing. Train anew with it."
        )
