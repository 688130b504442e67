# SPDX-License-Identifier: Apache-2.0

"""Visualizer that explains decisions: a picture per rejected image, pictures of the model, a page to browse them."""

import json
import logging
import math
import re
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch
from anomalib.data import ImageBatch
from anomalib.post_processing import PostProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import LightningModule, Trainer
from PIL import Image

from anomalib_spg.components.backbone import Tokens
from anomalib_spg.components.decisions import FILE, numbered
from anomalib_spg.components.files import atomic_write
from anomalib_spg.components.hub import beside, local_file
from anomalib_spg.components.lightning import category_of
from anomalib_spg.components.pictures import MOST, log_picture
from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from anomalib_spg.components.pre_processor import pixel_aspect
from anomalib_spg.components.regions import defects_of

from .examples import EXAMPLES, Examples, digest, to_picture
from .explanation import ExplainableModel, Explanation
from .figures import decision, heatmap, plot_explanation
from .report import RECORDS, UNFINISHED, write_report
from .words import in_words

if TYPE_CHECKING:
    from anomalib_spg.components.lightning import FrozenBackboneMixin

    class _Model(FrozenBackboneMixin, ExplainableModel):
        """What :meth:`ExplanationVisualizer.setup` lets through."""


logger = logging.getLogger(__name__)

PREDICTIONS = "explanations_of_predictions"
THUMBNAIL = 224  # pixels
DPI = 90


class ExplanationVisualizer(ImageVisualizer):
    """anomalib's visualizer, which also explains the decisions of SPG and LAKE during test and predict.

    Beside anomalib's ``images/`` it writes the folder ``explanations/``, or ``explanations_of_predictions/``: a picture
    per explained image, pictures of the model, ``explanations.json``, and the page ``index.html``, which opens without
    internet. A second test of one run replaces its explanations; those of earlier predictions are kept, and the next
    ones have the number of their table: ``explanations_of_predictions_2`` beside ``predictions_2.csv``. While a run has
    not finished, ``explanations.json`` says so.

    Explanations need no second pass through the backbone: a forward hook keeps the tokens of the current batch. During
    training the visualizer keeps up to 256 images as JPEG, with each atom's max-activating patches (SPG) or as the
    normal images to compare with (LAKE), and saves them as ``weights/examples.safetensors``. Without that file, or with
    one of another training, only these pictures are missing.

    Args:
        explain (str): Explain the ``"rejected"`` images or ``"all"``. Without a threshold all are explained. Defaults
            to ``"rejected"``.
        parts (int): Atoms or neurons to show. Defaults to 5.
        examples (str | Path | None): Examples file. ``None`` takes what this training kept, or looks beside the
            checkpoint or the guides file. Defaults to ``None``.
        **kwargs: Arguments of :class:`anomalib.visualization.ImageVisualizer`.

    Raises:
        ValueError: If ``explain`` is unknown or ``parts`` is not positive.

    Example:
        >>> from anomalib_spg import SPG, ExplanationVisualizer
        >>> model = SPG(backbone="vit_tiny_patch16_224", pre_trained=False, visualizer=ExplanationVisualizer())

        On the command line: ``--model.visualizer anomalib_spg.ExplanationVisualizer``.
    """

    def __init__(
        self,
        explain: Literal["rejected", "all"] = "rejected",
        parts: int = 5,
        examples: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if explain not in {"rejected", "all"}:
            msg = f"explain='{explain}' is unknown; choose 'rejected' or 'all'."
            raise ValueError(msg)
        if parts < 1:
            msg = f"parts={parts} must be at least 1."
            raise ValueError(msg)
        self.explain = explain
        self.parts = parts
        self.examples_path = examples
        self._examples: Examples | None = None
        self._hook: Any = None
        self._tokens: Tokens | None = None
        self._folder = Path()
        self._learned = ""
        self._records: list[dict[str, Any]] = []

    def __getstate__(self) -> dict[str, Any]:
        """Keep training images and the state of a run out of an exported model."""
        return {**self.__dict__, "_examples": None, "_hook": None, "_tokens": None, "_records": []}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse unsuitable models and files before the run starts.

        Raises:
            TypeError: If the model is neither SPG nor LAKE.
            ValueError: If the examples file cannot be read.
        """
        del trainer, stage
        if not isinstance(pl_module, ExplainableModel):
            msg = (
                f"ExplanationVisualizer explains SPG and LAKE, not {type(pl_module).__name__}. Leave the visualizer "
                "out, or take anomalib.visualization.ImageVisualizer."
            )
            raise TypeError(msg)
        if self.examples_path is not None:
            Examples.load(self.examples_path)

    @staticmethod
    def on_fit_start(trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to keep training images."""
        del trainer
        model = cast("_Model", pl_module)
        if getattr(model, "learns", True):
            model.examples = Examples(patch_size=model.model.backbone.patch_size)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the kept images beside the guides, and remove them from the model, which may be exported."""
        model = cast("_Model", pl_module)
        examples, model.examples = model.examples, None
        if examples is None or not examples.images:
            return
        examples.learned = digest(model.model)
        if trainer.is_global_zero:
            examples.save(Path(trainer.default_root_dir) / "weights" / EXAMPLES)
        self._examples = examples

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the backbone, find the examples, and prepare the folders."""
        results = Path(trainer.default_root_dir)
        folder = results / "explanations" if trainer.testing else _next_predictions(results)
        # anomalib gives each process its own results folder; all write to that of rank 0
        self._folder = Path(trainer.strategy.broadcast(str(folder)))
        kinds = ("pictures", "thumbnails")
        if trainer.is_global_zero:
            with _naming(self._folder):
                if (self._folder / RECORDS).is_file():  # else it may be a folder of the user's own
                    for kind in kinds:
                        shutil.rmtree(self._folder / kind, ignore_errors=True)
                    (self._folder / "index.html").unlink(missing_ok=True)
                for kind in kinds:
                    (self._folder / kind).mkdir(parents=True, exist_ok=True)
                _write_records(self._folder, UNFINISHED)
        trainer.strategy.barrier()
        self._records = []
        model = cast("_Model", pl_module)
        self._hook = model.model.backbone.register_forward_hook(self._keep_tokens)
        self._learned = digest(model.model)
        self._find_examples(trainer, model)

    on_predict_start = on_test_start

    def _keep_tokens(self, backbone: torch.nn.Module, images: Any, tokens: Tokens) -> None:  # noqa: ANN401  # a hook
        del backbone, images
        self._tokens = tokens

    def _find_examples(self, trainer: Trainer, model: "_Model") -> None:
        """Take the examples beside the checkpoint or the guides, else those of the training just done, if they fit."""
        guides_file = getattr(model, "guides_file", None)
        paths = []
        if self.examples_path is not None:
            paths = [Path(self.examples_path)]
        elif trainer.ckpt_path:  # weights/lightning/model.ckpt, or moved together
            paths = [folder / EXAMPLES for folder in list(Path(trainer.ckpt_path).absolute().parents)[:2]]
        if self.examples_path is None and guides_file is not None:
            try:
                paths.append(local_file(beside(guides_file, EXAMPLES)))
            except (RuntimeError, ValueError) as exception:  # the hub has none, or cannot be asked
                logger.warning("%s", exception)
        for path in filter(Path.is_file, paths):
            try:
                examples = Examples.load(path)
            except ValueError as exception:
                logger.warning("%s", exception)
                continue
            if examples.learned == self._learned:
                self._examples = examples
                return
            logger.warning("'%s' is not used: its example patches belong to another training than the model.", path)
        if self._examples is None or self._examples.learned != self._learned:
            self._examples = None
            logger.warning(
                "Explanations lack example patches: there is no examples.safetensors of this model beside the "
                "checkpoint or the guides. Train with this visualizer to get one, or give its path as examples."
            )

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401  # Lightning's type has no batches of anomalib
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write anomalib's pictures, and explain the images of the batch."""
        model = cast("_Model", pl_module)
        with _naming(self._folder):
            super().on_test_batch_end(trainer, model, outputs, batch, batch_idx, dataloader_idx)
        images, tokens = cast("torch.Tensor", batch.image), cast("Tokens", self._tokens)
        labels = batch.pred_label if _threshold(model) is not None else None
        rejected = [None] * len(images) if labels is None else labels.flatten().bool().tolist()
        for index in range(len(images)):
            if self.explain == "rejected" and rejected[index] is False:
                continue
            own = Tokens(
                [patches[index : index + 1] for patches in tokens.patches],
                [pooled[index : index + 1] for pooled in tokens.pooled],
                tokens.grid,
            )
            explanation = model.explain(images[index : index + 1], own)[0]
            with _naming(self._folder):
                self._write(trainer, model, batch, index, explanation, rejected[index])

    def _write(
        self,
        trainer: Trainer,
        model: "_Model",
        batch: ImageBatch,
        index: int,
        explanation: Explanation,
        rejected: bool | None,
    ) -> None:
        """Write the picture of one image, and remember its record."""
        backbone = model.model.backbone
        source = Path(cast("list[str]", batch.image_path)[index])
        score, threshold, raw_threshold = _shown(model, batch, index)
        picture = to_picture(cast("torch.Tensor", batch.image)[index], backbone.mean, backbone.std)
        shown_map = cast("torch.Tensor", batch.anomaly_map)[index].detach().float().squeeze().cpu()
        aspect = pixel_aspect(model.pre_processor, str(source))
        mask = None if batch.pred_mask is None else cast("torch.Tensor", batch.pred_mask)[index].squeeze().cpu()
        found = defects_of(batch, index)
        below = (0, 0)
        if isinstance(model.post_processor, GoodPartsPostProcessor):
            below = model.post_processor.good_below(explanation.score)
        has_nearest = explanation.nearest is not None and self._examples is not None
        words = in_words(explanation, rejected, below, found, has_nearest)
        figure = plot_explanation(
            explanation,
            picture,
            self._examples,
            raw_threshold,
            backbone.patch_size,
            self.parts,
            title=decision(score, threshold, rejected),
            shown_map=shown_map,
            words=words,
            mask=mask,
            pixel_aspect=aspect,
        )
        # File names may be equal in two folders, not valid in a URL, or as long as the file system allows.
        number = len(self._records) * trainer.world_size + trainer.global_rank
        file = f"{number:05}_{re.sub(r'[^A-Za-z0-9.-]', '_', source.stem)[:100]}.jpg"
        figure.savefig(self._folder / "pictures" / file, dpi=DPI, pil_kwargs={"quality": 85})
        if trainer.loggers and number < MOST:
            log_picture(trainer, np.asarray(Image.open(self._folder / "pictures" / file)), source, "explanations")
        shape = picture.shape[1] * aspect / picture.shape[0]  # width over height
        size = [max(1, round(THUMBNAIL * min(1, side))) for side in (shape, 1 / shape)]
        thumbnail = Image.fromarray(heatmap(picture, shown_map)).resize((size[0], size[1]))
        thumbnail.save(self._folder / "thumbnails" / file, quality=85)
        shares, top = explanation.shares, explanation.top(self.parts)
        others, rest = explanation.others(top)
        self._records.append({
            "category": _category(trainer, model) or source.parent.name,
            "path": _printable(str(source)),
            "unit": explanation.unit,
            "score": _finite(score),
            "threshold": threshold,
            "raw_score": _finite(explanation.score),
            "raw_threshold": raw_threshold,
            "rejected": rejected,
            "defective": None if batch.gt_label is None else bool(batch.gt_label[index]),
            "words": words,
            "picture": f"pictures/{file}",
            "thumbnail": f"thumbnails/{file}",
            "parts": [
                {
                    "block": int(explanation.blocks[part]),
                    "unit": int(explanation.units[part]),
                    "adds": _finite(explanation.contributions[part]),
                    "share": _finite(shares[part]),
                    "opposed": explanation.opposed is not None and bool(explanation.opposed[part]),
                }
                for part in top
            ],
            "base": explanation.base,
            "others": {"count": others, "adds": _finite(rest)},
            "other": {name: _finite(value) for name, value in explanation.other.items()},
            "defects": [defect._asdict() | {"score": _finite(defect.score)} for defect in found],
        })

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the pictures of the model, the records and the page."""
        self._release()
        of_processes = [self._records]
        if trainer.world_size > 1:
            of_processes = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(of_processes, self._records)
        if not trainer.is_global_zero:
            return
        # Where the images do not divide evenly among the processes, some are seen twice.
        records = {record["path"]: record for records in of_processes for record in records}
        names = _short_names(list(records))
        of_folders = sorted({record["category"] for record in records.values()})
        of_folders[3:] = ["..."] * (len(of_folders) > 3)
        figures = {}
        model = cast("_Model", pl_module)
        for name, (title, figure) in model.figures(self._examples).items():
            with _naming(self._folder):
                figure.savefig(self._folder / f"{name}.jpg", dpi=DPI, pil_kwargs={"quality": 85})
            figures[title] = f"{name}.jpg"
        run = {
            "model": type(model).__name__,
            "product": _printable(model.product or category_of(trainer) or ""),
            "category": _category(trainer, model) or ", ".join(of_folders) or self._folder.parent.parent.name,
            "figures": figures,
            "settings": _settings(model),
            "learned": self._learned,
            "neurons": model.chosen_neurons(),
            "images": [{"name": name, **record} for name, record in zip(names, records.values(), strict=True)],
        }
        with _naming(self._folder):
            _write_records(self._folder, run)
        page = write_report(self._folder)
        if records:
            logger.info("%d images explained: open %s.", len(records), page)
        else:
            logger.info("No image was rejected, so none is explained.")

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Remove the hook from the backbone, and the training images from the model of a fit that failed."""
        del trainer, exception
        if isinstance(pl_module, ExplainableModel):
            cast("_Model", pl_module).examples = None
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._tokens = None


def _next_predictions(results: Path) -> Path:
    """Folder of the first number that neither a table nor whole explanations of earlier predictions have."""
    pairs = ((results / numbered(FILE, number), results / numbered(PREDICTIONS, number)) for number in count(1))
    return next(folder for table, folder in pairs if not table.exists() and not _is_whole(folder))


def _is_whole(folder: Path) -> bool:
    """Whether a folder holds the explanations of a run that has finished."""
    path = folder / RECORDS
    return path.is_file() and path.read_text(encoding="utf-8", errors="replace") != _as_text(UNFINISHED)


def _category(trainer: Trainer, model: "_Model") -> str | None:
    """What the images show: the datamodule says it, else they are taken for the product that was learned."""
    category = category_of(trainer) or model.product
    return None if category is None else _printable(category)


def _settings(model: "_Model") -> dict[str, Any]:
    """The model's arguments as plain data, those its tensors depend on resolved; not where weights lie."""
    named = {**model.hparams, **model.identity()}
    plain = {name: value for name, value in named.items() if name not in {"pre_trained", "weights"}}
    return cast("dict[str, Any]", json.loads(json.dumps(plain, default=str)))


def _threshold(model: "_Model") -> float | None:
    """Raw threshold, if there is one."""
    if not isinstance(model.post_processor, PostProcessor):
        return None
    threshold = float(model.post_processor.image_threshold)
    return None if math.isnan(threshold) else threshold


def _shown(model: "_Model", batch: ImageBatch, index: int) -> tuple[float, float | None, float | None]:
    """Score and threshold as ``predictions.csv`` has them, and the raw threshold where it decides.

    The raw one does not decide with a changed sensitivity, nor without normalisation.
    """
    score = float(cast("torch.Tensor", batch.pred_score)[index])
    raw, post_processor = _threshold(model), model.post_processor
    if raw is None or not isinstance(post_processor, PostProcessor):
        return score, None, None
    decides = post_processor.enable_normalization and math.isclose(float(post_processor.image_sensitivity), 0.5)
    return score, round(float(post_processor.normalized_image_threshold), 6), raw if decides else None


def _printable(name: str) -> str:
    """Spell out bytes of a file name that cannot be encoded."""
    return name.encode("utf-8", "backslashreplace").decode()


def _short_names(paths: list[str]) -> list[str]:
    """Names with the folder, and with as many more folders as tell all of them apart."""
    parts = [Path(path).parts for path in paths]
    depth = 2
    while len({own[-depth:] for own in parts}) < len(set(parts)):
        depth += 1
    return [Path(*own[-depth:]).as_posix() for own in parts]


def _finite(value: float | torch.Tensor) -> float | None:
    """Return a number, or ``None`` where it is not finite, for which JSON has no word."""
    return float(value) if math.isfinite(value) else None


def _write_records(folder: Path, run: dict[str, Any]) -> None:
    """Write the records whole or not at all."""
    with atomic_write(folder / RECORDS) as temporary:
        temporary.write_text(_as_text(run), encoding="utf-8")


def _as_text(run: dict[str, Any]) -> str:
    return json.dumps(run, indent=1, allow_nan=False)


@contextmanager
def _naming(folder: Path) -> Generator[None, None, None]:
    """Say what could not be written, and what to do: matplotlib and PIL do not name the file.

    Raises:
        OSError: If anything in the block could not be written.
    """
    try:
        yield
    except OSError as exception:
        msg = (
            f"Cannot write explanations to '{folder}': {exception}. Free space there or choose another folder with "
            "--default_root_dir, and run `anomalib test` or `predict` with the checkpoint: training is not lost."
        )
        raise OSError(msg) from exception
