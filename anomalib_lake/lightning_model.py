# SPDX-License-Identifier: Apache-2.0

"""LAKE as an anomalib model.

Reference: Latent Anomaly Knowledge Excavation (arXiv 2604.07802).
"""

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, MemoryBankMixin
from anomalib.visualization import Visualizer
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities.types import STEP_OUTPUT
from matplotlib.figure import Figure
from torch import nn

from anomalib_spg.components.backbone import Tokens
from anomalib_spg.components.checkpoint import check_identity
from anomalib_spg.components.held_out import ENOUGH, MOST, choose, good_validation_images
from anomalib_spg.components.lightning import FrozenBackboneMixin, check_seed
from anomalib_spg.components.normal_images import AUTO, copies, draw_normal_images, image_labels
from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from anomalib_spg.components.pre_processor import pixel_aspect
from anomalib_spg.components.threshold import Prior
from anomalib_spg.explanations.examples import Examples
from anomalib_spg.explanations.explanation import Explanation

from .explain import explain
from .extension import Extension, earlier_images, read_fitted
from .figures import plot_neurons
from .neurons import Normalization, Selection
from .text import prompts
from .torch_model import DEFAULT_BACKBONE, LAKEModel

logger = logging.getLogger(__name__)


class LAKE(FrozenBackboneMixin, MemoryBankMixin, AnomalibModule):
    """LAKE: Latent Anomaly Knowledge Excavation.

    Training-free. A few normal images show which neurons of a frozen foundation model are sensitive; how far a patch
    deviates there from every normal patch, and with CLIP how far it leans to the anomalous text, marks defects.

    Args:
        backbone (str): timm model name. Defaults to OpenAI's CLIP ViT-L/14@336 (paper: a CLIP model).
        layers (Sequence[int] | None): 0-based blocks whose raw tokens give the structural deviation, negative ones from
            the end. ``None`` is 5/12 and 8/12 of the depth (ours): blocks 9 and 15 of 24, 4 and 7 of 12.
        scales (Sequence[int]): Windows, in patches a side, over which tokens are averaged before they are compared; a
            defect need stand out at one of them only. Odd numbers. Defaults to ``(1, 3)`` (ours).
        semantic_layer (int): Block for the semantic activation. Defaults to -1, the last (ours; paper: a deeper one).
        pre_trained (bool): Load the backbone's weights. Defaults to ``True``.
        weights (str | Path | None): Local weights file used instead of the hub: an OpenCLIP checkpoint serves both
            towers; without text a file in timm's naming will do. Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Size images are resized to. ``None`` is 448, or 518 for CLIP (ours).
        k_shot (int | Literal["auto"] | None): Normal images to compare with, drawn with the seed; others, at most 100,
            set the threshold. ``"auto"`` is all there are, but at most 32 (ours). ``None`` is all, however many: memory
            and the time per test image stay bounded, see :class:`LAKEModel`. Defaults to ``"auto"``.
        few_shot_source (str | Path | None): Folder of normal images to draw from instead of the training set.
        extend (str | Path | None): Checkpoint of a fitted LAKE whose bank takes the normal images in, instead of a new
            bank of them alone. Neurons and text stay; the threshold is set anew. Defaults to ``None``.
        num_neurons (int): Sensitive neurons per layer, K, at least 2. Defaults to 100 (paper).
        selection (Literal["variance", "random", "lowest", "pca", "all"]): Rule that chooses them: variance (paper), or
            a control.
        normalization (Literal["after", "before", "none"]): Bring tokens to unit length after the selection (ours),
            before it, or not at all.
        bank_size (int | None): Most tokens per layer in the bank of single patches; that of windows has room for
            half as many (of 3x3), a third (of 5x5). ``None`` keeps all. Defaults to 5504 (ours).
        num_neighbors (int): Nearest tokens of the bank whose distances are averaged. Defaults to 1 (ours);
            more help where good parts vary more than the images show, and forget the one that is taken alike.
        num_rotations (int): Directions in which each normal image goes into the bank: 8 takes it as it is and rotated
            by 45, 90, ... degrees, for parts that may lie in any direction. Defaults to 1 (ours), as it is only.
        num_shifts (int): Places on the grid of patches, along height and along width, at which each of 2 to 16
            normal images goes into the bank: 2 takes it as it is and shifted by half a patch down, right, and both. Not
            with one image or over 16, nor beside rotated copies, nor with ``extend``. Defaults to 2 (ours); 1 takes it
            as it is (paper).
        place_weight (float | None): Weight of the squared distance between the places of patches, 1 being the image's
            longer side, beside that of their tokens. ``None`` is 10 where the normal images show that parts lie in
            place, else 0 (ours); 0 compares patches wherever they lie (paper). Not with one image, nor beside rotated
            copies; with ``extend`` as the checkpoint has it.
        own_weight (float): Weight of a patch's distance to the rest of its own image beside that to the bank, in
            [0, 1]. Defaults to 0.3 (ours); 0 compares with the bank alone (paper).
        top_patches (int): Highest patches whose mean is the image's score. Defaults to 3 (ours); 1 takes the maximum
            (paper).
        text_weight (float | None): Weight of the semantic activation, in [0, 1]. ``None`` is 0.3 (paper) for CLIP and 0
            for a backbone without text; 0 turns the text side off.
        class_name (str | None): What the images show, for the prompts. ``None`` is the datamodule's category, else
            "object".
        normal_prompts (Sequence[str] | None): Descriptions of normal images. ``None`` takes WinCLIP's (ours).
        anomalous_prompts (Sequence[str] | None): Descriptions of anomalous ones. ``None`` takes WinCLIP's (ours).
        temperature (float): Softmax temperature of the semantic activation. Defaults to 0.07 (ours).
        sigma (float): Gaussian smoothing of the map in pixels; 0 for none. Defaults to 4 (ours).
        false_alarm_rate (float | None): Share of good parts that may be rejected. ``None`` is 0.08 (ours), or what a
            checkpoint was fitted with. Defaults to ``None``.
        pixel_false_alarm_rate (float | None): Share of the pixels of good parts that may exceed the pixel threshold.
            ``None`` is 0.001 (ours), or what a checkpoint was fitted with. Defaults to ``None``.
        seed (int | None): Seed everything with it before fitting, since ``anomalib train --seed_everything`` does not
            (anomalib 2.7 accepts the option and ignores it). ``None`` leaves the process's seed. Defaults to ``None``.
        pre_processor (nn.Module | bool, optional): Pre-processor instance or flag to use the default.
            Defaults to ``True``.
        post_processor (nn.Module | bool, optional): Post-processor instance or flag to use the default.
            Defaults to ``True``.
        evaluator (Evaluator | bool, optional): Evaluator instance or flag to use the default. Defaults to ``True``.
        visualizer (Visualizer | bool, optional): Visualizer instance or flag to use the default. Defaults to ``True``.

    Attributes:
        normal_images (list[str]): Paths of the normal images that were drawn.
        held_out_images (list[str]): Paths of other good images that set the threshold.
        examples (Examples | None): Set it before fitting to keep the normal images for explanations.

    Raises:
        ValueError: If an argument is out of range, or text is asked of a backbone that has none.

    Example:
        >>> from anomalib_lake import LAKE
        >>> model = LAKE(backbone="vit_tiny_patch16_224", pre_trained=False, image_size=224)
        >>> model.model.layers, model.model.text_weight
        ([4, 7], 0.0)
    """

    default_backbone = DEFAULT_BACKBONE
    is_product_specific = True
    learns_on = "to take further good images into its bank, give it as extend"
    prior = Prior(spread=0.06, weight=8.0)  # measured on twelve small datasets, where spreads are 0.03 to 0.13

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        scales: Sequence[int] = (1, 3),
        semantic_layer: int = -1,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        k_shot: int | Literal["auto"] | None = "auto",
        few_shot_source: str | Path | None = None,
        extend: str | Path | None = None,
        num_neurons: int = 100,
        selection: Selection = "variance",
        normalization: Normalization = "after",
        bank_size: int | None = 5504,
        num_neighbors: int = 1,
        num_rotations: int = 1,
        num_shifts: int = 2,
        place_weight: float | None = None,
        own_weight: float = 0.3,
        top_patches: int = 3,
        text_weight: float | None = None,
        class_name: str | None = None,
        normal_prompts: Sequence[str] | None = None,
        anomalous_prompts: Sequence[str] | None = None,
        temperature: float = 0.07,
        sigma: float = 4.0,
        false_alarm_rate: float | None = None,
        pixel_false_alarm_rate: float | None = None,
        seed: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if k_shot not in {None, "auto"} and not (isinstance(k_shot, int) and k_shot >= 1):
            msg = f"k_shot={k_shot} must be at least 1, 'auto' for up to {AUTO}, or null for every normal image."
            raise ValueError(msg)
        if extend is not None and not Path(extend).is_file():
            msg = f"extend='{extend}' is no file. Give the checkpoint of a fitted LAKE, weights/lightning/model.ckpt."
            raise ValueError(msg)
        size = self.resolve_image_size(image_size, backbone)
        check_seed(seed)
        super().__init__(
            pre_processor=self.configure_pre_processor(size, backbone) if pre_processor is True else pre_processor,
            post_processor=self.configure_post_processor(false_alarm_rate, pixel_false_alarm_rate)
            if post_processor is True
            else post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.seed = seed
        self.k_shot = k_shot
        self.few_shot_source = few_shot_source
        # Now, since anomalib lets `latest` be the folder of the run that is about to begin.
        self.extend = None if extend is None else Path(extend).resolve()
        self._extension: Extension | None = None
        self._taken: list[str] = []  # paths of the images it has taken in, in their order
        self._earlier_images: dict[int, bytes] = {}
        self._fitted_before: dict[str, Any] = {}  # what the post-processor of the checkpoint to extend knows
        self.class_name = class_name
        self.normal_images: list[str] = []
        self.held_out_images: list[str] = []
        self.examples: Examples | None = None
        self.model: LAKEModel = LAKEModel(
            backbone=backbone,
            layers=layers,
            scales=scales,
            semantic_layer=semantic_layer,
            pre_trained=pre_trained,
            weights=weights,
            image_size=self.input_size or size,
            num_neurons=num_neurons,
            selection=selection,
            normalization=normalization,
            bank_size=bank_size,
            num_neighbors=num_neighbors,
            num_rotations=num_rotations,
            num_shifts=num_shifts,
            place_weight=place_weight,
            own_weight=own_weight,
            top_patches=top_patches,
            text_weight=text_weight,
            normal_prompts=normal_prompts,
            anomalous_prompts=anomalous_prompts,
            temperature=temperature,
            sigma=sigma,
        )
        if class_name is not None and self.model.text_weight > 0:
            prompts(class_name, normal_prompts, anomalous_prompts)  # a mistake shows now, not after the images

    def setup(self, stage: str) -> None:
        """Before fitting, put the drawn normal images in the place of the training set, so that no other is decoded.

        Args:
            stage (str): Stage of the trainer.

        Raises:
            ValueError: If there are no normal images, or fewer than ``k_shot``, or there are several processes.
        """
        if stage == "fit" and self.trainer.world_size > 1:
            msg = (
                f"LAKE compares with a few normal images, which one process passes; this run has "
                f"{self.trainer.world_size}. Fit it with --trainer.devices 1 (and one node)."
            )
            raise ValueError(msg)
        super().setup(stage)
        if stage == "fit" and self.seed is not None:
            seed_everything(self.seed, workers=True)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit":
            self._begin_extension()
            self.begin_fit()
            self.model.forget()  # what a fit that failed has left
        if stage == "fit" and datamodule is None:
            logger.warning(
                "Without a datamodule LAKE uses every training image; k_shot and few_shot_source do nothing."
            )
        elif stage == "fit":
            training_set = datamodule.train_data
            known = _Known(self.normal_images if self._extension is not None else [])
            new = [index for index, (path, _) in enumerate(image_labels(training_set)) if path not in known]
            if known.paths and not new and self.few_shot_source is None:
                msg = (
                    f"The bank of '{self.extend}' holds every normal image of the training set already. Give further "
                    "ones: a folder as few_shot_source."
                )
                raise ValueError(msg)
            drawn, paths = draw_normal_images(
                training_set.subsample(new) if known.paths else training_set,
                self.k_shot,
                source=self.few_shot_source,
                transform=training_set.augmentations,
                name=datamodule.name,
            )
            copied = copies([*known.paths, *paths])
            again = [path for path in paths if path in known or copied.get(path, "") in known.paths]
            if again:
                msg = f"The bank of '{self.extend}' holds {len(again)} of the images already: {', '.join(again[:5])}."
                raise ValueError(msg)
            if copied:
                logger.warning(
                    "%d normal images are copies of others: %s. Leave them out: each is compared with its copy, which "
                    "lets the threshold come to lie too low.",
                    len(copied),
                    ", ".join(f"{copy} of {first}" for copy, first in list(copied.items())[:5]),
                )
            self.normal_images = [*known.paths, *paths]
            self.held_out = None
            if good_validation_images(datamodule) < ENOUGH:
                others = [
                    index
                    for index, (path, label) in enumerate(image_labels(training_set))
                    if label != 1 and path not in paths and path not in known
                ]
                self.held_out = training_set.subsample(choose(others, MOST))
            if self._extension is None:
                self.held_out_images = _paths(self.held_out)
            self.swap_training_set(drawn)
            shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
            logger.info("LAKE uses %d normal images: %s", len(paths), shown)
            need = self.model.memory_need(len(paths)) / 2**30
            if need > 1:
                remedy = " Give bank_size to bound it." if self.model.banks[0][0].size is None else ""
                logger.info("Learning from them takes up to %.1f GiB of memory beside the backbone.%s", need, remedy)

    def _begin_extension(self) -> None:
        """Restore the fitted model whose bank is to take images in."""
        self._extension, self._taken = None, []
        if self.extend is None:
            return
        checkpoint = read_fitted(self.extend)
        _add_former_defaults(checkpoint)
        check_identity(checkpoint, {"num_rotations": self.model.num_rotations})
        checkpoint.pop("anomalib_components_enabled", None)  # which components there are is this run's affair
        self.on_load_checkpoint(checkpoint)
        self.load_state_dict(checkpoint["state_dict"])
        self._extension = Extension(self.model, first=len(self.normal_images))
        self._earlier_images = earlier_images(self.model, self.extend)
        if isinstance(self.post_processor, GoodPartsPostProcessor):  # which forgets it when the fit starts
            self._fitted_before = copy.deepcopy(self.post_processor.checkpoint_config())

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Store the patch tokens of a batch of normal images.

        Args:
            batch (ImageBatch): Normal images.
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: A dummy loss for Lightning.
        """
        del args, kwargs
        start = self.model.num_stored if self._extension is None else self._extension.next
        images = cast("torch.Tensor", batch.image)
        is_blank = (images.amax(dim=(2, 3)) == images.amin(dim=(2, 3))).all(dim=1).tolist()
        blank = [path for path, found in zip(batch.image_path or [], is_blank, strict=False) if found]
        if blank:
            logger.warning(
                "%d normal images are of a single colour: %s. If good parts do not look like that, leave them out.",
                len(blank),
                ", ".join(blank),
            )
        learn = self.model if self._extension is None else self._extension.add
        if self.model.num_rotations == 1:
            learn(images)
        else:  # images of one batch may have been of several shapes
            for image, path in zip(images, batch.image_path or [""] * len(images), strict=True):
                self.model.pixel_aspect = pixel_aspect(self.pre_processor, path)
                learn(image[None])
        if self._extension is not None:
            self._taken += batch.image_path or []
        if self.examples is not None:
            aspects = [pixel_aspect(self.pre_processor, path) for path in batch.image_path or []]
            self.examples.add(images, self.model.backbone.mean, self.model.backbone.std, start, aspects=aspects)
        return self.no_loss()

    def fit(self) -> None:
        """Choose the sensitive neurons and fill the banks from the stored tokens, or take new ones into the banks."""
        if self._extension is not None:
            self._finish_extension(self._extension)
            return
        name = self.class_name or getattr(getattr(self.trainer, "datamodule", None), "category", None) or "object"
        with self.trainer.precision_plugin.forward_context():  # copies pass the backbone as the images have
            left_out = self.model.fit(str(name))
        scores = left_out.pred_score
        if isinstance(self.post_processor, GoodPartsPostProcessor) and scores is not None:
            # Each normal image against the others. Their maps count only where fewer other good images are left over.
            has_others = self.held_out is not None and len(self.held_out) >= len(scores)
            maps = None if has_others else left_out.anomaly_map
            self.post_processor.add_good(scores, maps, learned_from=True)
        self.add_good(self.held_out)
        self.place_thresholds()
        banks, places, in_place = self.model.banks[0], self.model.places, ""
        if places.columns:
            why = "Good parts lie in place" if places.weight is None else f"place_weight is {places.weight}"
            in_place = f" {why}, so patches are compared with what is normal there."
        logger.info(
            "Normality bank: %s tokens of %d channels in each of the blocks %s, at scales %s.%s",
            " and ".join(str(len(bank.tokens)) for bank in banks),
            banks[0].tokens.shape[1] - places.columns,
            self.model.layers,
            self.model.scales,
            in_place,
        )

    def _finish_extension(self, extension: Extension) -> None:
        """Thin the banks, and set the threshold anew by the good images there are and the new ones.

        What good images scored before the extension counts where they are not at hand: in a larger bank they would
        score less, if anything.
        """
        left_out = extension.left_out()
        extension.finish()
        self._extension = None
        if self.examples is not None:
            self.examples.images.update(self._earlier_images)
        self._earlier_images = {}  # no image of the training goes into an export
        before, self._fitted_before = self._fitted_before, {}
        post_processor, scores = self.post_processor, left_out.pred_score
        if isinstance(post_processor, GoodPartsPostProcessor) and scores is not None:
            paths, at_hand = self._taken[: len(scores)], _paths(self.held_out)
            known = list(zip(self.held_out_images, before["scores"]["held_out"], strict=False))
            new = [*self._taken, *at_hand]
            kept = [(path, score) for path, score in known if not _Known([path]).has_any(new)]
            if known and not kept:
                before["pixels"]["held_out"] = [0] * len(before["pixels"]["held_out"])
            if len(known) == len(before["scores"]["held_out"]):
                before["scores"]["held_out"] = [score for _, score in kept]
            else:  # a checkpoint that does not say which images they are of
                self.held_out, at_hand = None, []
            self.held_out_images = [path for path, _ in kept] + paths + at_hand
            post_processor.load_checkpoint_config(before)
            post_processor.add_good(scores, left_out.anomaly_map)
        self.add_good(self.held_out)
        self.place_thresholds()
        if isinstance(post_processor, GoodPartsPostProcessor) and scores is not None:
            accepted = int((scores <= post_processor.image_threshold).sum())
            logger.info("Compared with the others, %d of %d further normal images are accepted.", accepted, len(scores))

    def explain(self, images: torch.Tensor, tokens: Tokens | None = None) -> list[Explanation]:
        """Split the scores of images into neurons, places and text; see :func:`anomalib_lake.explain.explain`.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            tokens (Tokens | None): What the backbone gave for them, where that is at hand. Defaults to ``None``.

        Returns:
            list[Explanation]: One per image.
        """
        tokens = self.model.backbone(images) if tokens is None else tokens
        return explain(self.model, tokens, (images.shape[-2], images.shape[-1]))

    def figures(self, examples: Examples | None = None) -> dict[str, tuple[str, Figure]]:
        """Draw which neurons were chosen.

        Args:
            examples (Examples | None): Unused; SPG's counterpart shows example patches.

        Returns:
            dict[str, tuple[str, Figure]]: By a name fit for a file, the title and the matplotlib figure; none of
            principal components.
        """
        del examples
        if self.model.neurons[0].selection == "pca":
            return {}
        return {"neurons": ("which neurons were chosen", plot_neurons(self.model))}

    def chosen_neurons(self) -> dict[int, list[int]]:
        """Sensitive neurons by block, the most sensitive first; none of principal components."""
        chosen = zip(self.model.layers, self.model.neurons, strict=True)
        return {block: neurons.indices.tolist() for block, neurons in chosen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint stand alone: restoring it needs neither hub nor weights nor normal images."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["normal_images"] = self.normal_images
        checkpoint["held_out_images"] = self.held_out_images
        checkpoint["hyper_parameters"] |= {
            **self.identity(),
            "pre_trained": False,
            "weights": None,
            "few_shot_source": None,
            "extend": None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore component configuration and the drawn images' names, and refuse the checkpoint of another model."""
        named = "own_weight" in checkpoint.get("hyper_parameters", {})
        if not named and not any(".own_images." in name for name in checkpoint.get("state_dict", {})):
            self.model.compare_with_bank_only()  # an older one: bank and maximum only
        _add_former_defaults(checkpoint)
        super().on_load_checkpoint(checkpoint)
        self.normal_images = checkpoint.get("normal_images", [])
        self.held_out_images = checkpoint.get("held_out_images", [])

    def identity(self) -> dict[str, Any]:
        """Arguments that decide what a checkpoint's tensors mean."""
        model = self.model
        # Whether places count is what the checkpoint has learned, unless a weight is given.
        places = {} if model.places.weight is None else {"place_weight": model.places.weight}
        return places | {
            "backbone": model.backbone.name,
            "layers": model.layers,
            "scales": model.scales,
            "image_size": list(model.backbone.image_size),
            "num_neurons": model.neurons[0].count,
            "selection": model.neurons[0].selection,
            "normalization": model.neurons[0].normalization,
            "num_neighbors": model.banks[0][0].num_neighbors,
            "own_weight": model.own_weight,
            "top_patches": model.top_patches,
            "text_weight": model.text_weight,
        }

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of LAKE.

        Returns:
            dict[str, Any]: One epoch on one device, because the normal images are passed once.
        """
        return {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}


def _add_former_defaults(checkpoint: dict[str, Any]) -> None:
    """Name what a checkpoint of a release that had no such arguments was fitted with."""
    hyperparameters = checkpoint.setdefault("hyper_parameters", {})
    hyperparameters.setdefault("num_neighbors", 1)
    hyperparameters.setdefault("num_rotations", 1)
    hyperparameters.setdefault("num_shifts", 1)
    hyperparameters.setdefault("place_weight", 0.0)


def _paths(dataset: AnomalibDataset | None) -> list[str]:
    return [] if dataset is None else [path for path, _ in image_labels(dataset)]


class _Known:
    """Images that a bank holds: by their path, and where the data lie elsewhere now, by folder and name."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self._moved = {Path(path).parts[-2:] for path in paths if not Path(path).exists()}

    def __contains__(self, path: str) -> bool:
        return path in self.paths or Path(path).parts[-2:] in self._moved

    def has_any(self, paths: Sequence[str]) -> bool:
        return any(path in self for path in paths)
