# SPDX-License-Identifier: Apache-2.0

"""Visualizer that explains decisions: a picture per rejected image, pictures of the model, a page to browse them."""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule
from anomalib.utils.path import generate_output_filename
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Trainer
from matplotlib.figure import Figure
from PIL import Image

from .examples import Examples, to_picture
from .explanation import Explanation
from .figures import decision, heatmap, plot_explanation
from .report import RECORDS, write_report

logger = logging.getLogger(__name__)

THUMBNAIL = 224  # pixels


class ExplanationVisualizer(ImageVisualizer):
    """anomalib's visualizer, which also explains the decisions of SPG and LAKE during test and predict.

    Beside anomalib's ``images/`` it writes the folder ``explanations/``: a picture per explained image, pictures of the
    model, ``explanations.json``, and the page ``index.html``, which opens without internet.

    Explanations need no second pass through the backbone: a hook keeps the tokens of the batch at hand. During training
    it keeps up to 256 images as JPEG, finds in them where each atom fires most (SPG) or keeps them as the normal images
    to compare with (LAKE), and leaves them as ``weights/examples.safetensors``. Without that file explanations lack
    these pictures only.

    Args:
        explain (str): Explain the ``"rejected"`` images or ``"all"``. Where there is no threshold, all. Defaults to
            ``"rejected"``.
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
        **kwargs,
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
        self._tokens: Any = None
        self._records: list[dict[str, Any]] = []

    @staticmethod
    def setup(trainer: Trainer, pl_module: AnomalibModule, stage: str) -> None:
        """Refuse models that cannot be explained.

        Raises:
            TypeError: If the model is neither SPG nor LAKE.
        """
        del trainer, stage
        if not hasattr(pl_module.model, "explain"):
            msg = (
                f"ExplanationVisualizer explains SPG and LAKE, not {type(pl_module).__name__}. Leave the visualizer "
                "out, or take anomalib.visualization.ImageVisualizer."
            )
            raise TypeError(msg)

    @staticmethod
    def on_fit_start(trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Keep training images from now on."""
        del trainer
        if getattr(pl_module, "guides", None) is None:  # else nothing is learned
            pl_module.model.examples = Examples(patch_size=pl_module.model.backbone.patch_size)

    @staticmethod
    def on_fit_end(trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Leave the kept images beside the guides."""
        examples = pl_module.model.examples
        if examples is not None and examples.images and trainer.is_global_zero:
            examples.save(Path(trainer.default_root_dir) / "weights" / "examples.safetensors")

    def on_test_start(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Listen to the backbone, and find the examples."""
        self._records = []
        self._hook = pl_module.model.backbone.register_forward_hook(self._keep_tokens)
        self._examples = self._find_examples(trainer, pl_module)
        if self._examples is None:
            logger.warning(
                "Explanations lack example patches: there is no examples.safetensors beside the checkpoint or the "
                "guides. Train with this visualizer to get one, or give its path as examples."
            )

    on_predict_start = on_test_start

    def _keep_tokens(self, backbone: torch.nn.Module, images: Any, tokens: Any) -> None:  # noqa: ANN401  # a hook
        del backbone, images
        self._tokens = tokens

    def _find_examples(self, trainer: Trainer, pl_module: AnomalibModule) -> Examples | None:
        if self.examples_path is not None:
            return Examples.load(self.examples_path)
        if pl_module.model.examples is not None and pl_module.model.examples.images:
            return pl_module.model.examples
        folders = [Path(trainer.ckpt_path).absolute().parents[1]] if trainer.ckpt_path else []
        if getattr(pl_module, "guides", None) is not None:
            folders.append(Path(pl_module.guides).parent)
        found = [folder / "examples.safetensors" for folder in folders if (folder / "examples.safetensors").is_file()]
        return Examples.load(found[0]) if found else None

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        outputs: ImageBatch,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write anomalib's pictures, and explain the images of the batch."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        rejected = None if batch.pred_label is None else batch.pred_label.flatten().bool().tolist()
        chosen = [
            index
            for index in range(len(batch.image))
            if self.explain == "all" or rejected is None or self._threshold(pl_module) is None or rejected[index]
        ]
        if not chosen:
            return
        tokens = type(self._tokens)(
            [patches[chosen] for patches in self._tokens.patches],
            [pooled[chosen] for pooled in self._tokens.pooled],
            self._tokens.grid,
        )
        explanations = pl_module.model.explain(batch.image[chosen], tokens)
        for index, explanation in zip(chosen, explanations, strict=True):
            self._write(trainer, pl_module, batch, index, explanation, None if rejected is None else rejected[index])

    def _write(
        self,
        trainer: Trainer,
        pl_module: AnomalibModule,
        batch: ImageBatch,
        index: int,
        explanation: Explanation,
        rejected: bool | None,
    ) -> None:
        """Write the picture of one image, and remember its record."""
        backbone = pl_module.model.backbone
        datamodule = getattr(trainer, "datamodule", None)
        source = Path(batch.image_path[index]) if batch.image_path else Path(f"images/{len(self._records):05}")
        category = getattr(datamodule, "category", None) or getattr(datamodule, "name", None) or source.parent.name
        threshold = self._threshold(pl_module)
        if threshold is not None and float(pl_module.post_processor.image_sensitivity) != 0.5:  # noqa: RUF069
            threshold = None  # the decision is another one then; it stands in the record
        picture = to_picture(batch.image[index], backbone.mean, backbone.std)
        figure = plot_explanation(
            explanation,
            picture,
            self._examples,
            threshold,
            backbone.patch_size,
            self.parts,
            title=f"{decision(explanation.score, threshold, rejected)}   ({source.parent.name}/{source.name})",
        )
        folder = self._folder(trainer)
        files = {}
        for kind in ("pictures", "thumbnails"):
            file = generate_output_filename(
                source.with_suffix(".jpg"),
                folder / kind,
                dataset_name=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
            )
            files[kind] = file.relative_to(folder).as_posix()
        _save(figure, folder / files["pictures"])
        thumbnail = heatmap(picture, explanation.anomaly_map, max(explanation.score, threshold or 0))
        Image.fromarray(thumbnail).resize((THUMBNAIL, THUMBNAIL)).save(folder / files["thumbnails"], quality=85)
        top = explanation.top(self.parts)
        shares = explanation.shares
        self._records.append({
            "category": str(category),
            "name": f"{source.parent.name}/{source.name}",
            "path": str(source),
            "score": explanation.score,
            "threshold": threshold,
            "rejected": rejected,
            "defective": None if batch.gt_label is None else bool(batch.gt_label[index]),
            "picture": files["pictures"],
            "thumbnail": files["thumbnails"],
            "parts": [
                {
                    "block": int(explanation.blocks[part]),
                    "unit": int(explanation.units[part]),
                    "adds": float(explanation.contributions[part]),
                    "share": float(shares[part]),
                    "absent": explanation.absent is not None and bool(explanation.absent[part]),
                }
                for part in top
            ],
            "other": explanation.other,
        })

    def on_test_end(self, trainer: Trainer, pl_module: AnomalibModule) -> None:
        """Write the pictures of the model, the records and the page."""
        self._release()
        folder = self._folder(trainer)
        folder.mkdir(parents=True, exist_ok=True)
        figures = {}
        for name, (title, figure) in pl_module.model.figures(self._examples).items():
            _save(figure, folder / f"{name}.jpg")
            figures[title] = f"{name}.jpg"
        run = {
            "model": type(pl_module).__name__,
            "unit": "neuron" if hasattr(pl_module.model, "neurons") else "atom",
            "figures": figures,
            "learned": _digest(pl_module.model),
            "images": self._records,
        }
        if hasattr(pl_module.model, "neurons"):
            run["neurons"] = {
                block: neurons.indices.tolist()
                for block, neurons in zip(pl_module.model.layers, pl_module.model.neurons, strict=True)
            }
        (folder / RECORDS).write_text(json.dumps(run, indent=1), encoding="utf-8")
        logger.info("%d images explained: open %s.", len(self._records), write_report(folder))

    on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: AnomalibModule, exception: BaseException) -> None:
        """Stop listening to the backbone."""
        del trainer, pl_module, exception
        self._release()

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = self._tokens = None

    @staticmethod
    def _folder(trainer: Trainer) -> Path:
        return Path(trainer.default_root_dir) / "explanations"

    @staticmethod
    def _threshold(pl_module: AnomalibModule) -> float | None:
        """Raw threshold, if there is one."""
        threshold = (
            float("nan") if pl_module.post_processor is None else float(pl_module.post_processor.image_threshold)
        )
        return None if math.isnan(threshold) else threshold


def _digest(model: torch.nn.Module) -> str:
    """Tell what was learned apart from what else was: atoms of different dictionaries have nothing in common."""
    learned = [tensor.cpu().numpy().tobytes() for name, tensor in model.state_dict().items() if "backbone" not in name]
    return hashlib.sha256(b"".join(learned)).hexdigest()[:16]


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, pil_kwargs={"quality": 85})
