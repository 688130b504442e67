# SPDX-License-Identifier: Apache-2.0

"""SPG as an anomalib model.

Reference: Sparse-Projected Guides for zero-shot anomaly detection (arXiv 2604.02871).
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
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
from tqdm import tqdm

from .components.backbone import DEFAULT_BACKBONE, Tokens
from .components.checkpoint import check_identity
from .components.held_out import ENOUGH, MOST, choose, good_validation_images
from .components.lightning import FrozenBackboneMixin, check_seed
from .components.normal_images import image_labels, short_digest
from .components.pre_processor import pixel_aspect
from .components.precision import full_precision
from .components.threshold import Prior
from .explain import explain
from .explanations.examples import Examples
from .explanations.explanation import Explanation
from .figures import plot_guides
from .guides import Guides, guides_fault, learned_images, read_guides
from .settings import GuideSettings
from .synthesis import AnomalySynthesizer
from .token_store import GIB, TokenStore, memory_need
from .torch_model import SPGModel

logger = logging.getLogger(__name__)

FEWEST = 8  # good images from which on some are held out
OWN_IMAGES = 0.15  # by how much images it has learned from score less than new ones, on the logit scale (measured)


class SPG(FrozenBackboneMixin, MemoryBankMixin, AnomalibModule):
    """SPG: Sparse-Projected Guides.

    A sparse autoencoder's dictionary over the patch tokens of a frozen foundation model, and four sparse guides written
    in it, tell anomalous from normal patches. What it learns from is decided by the datamodule:

    - Training images with labels and masks (:class:`anomalib_spg.AuxiliaryTarget`): as published.
    - Normal training images only (any other datamodule of anomalib): synthetic anomalies are drawn on them (ours).
    - Nothing, with ``guides_file=<file>``: zero-shot. Training leaves such a file in ``weights/guides.safetensors``.

    Args:
        backbone (str | None): timm model name. ``None`` is that of the guides file, else DINOv3-L/16 (paper).
        layers (Sequence[int] | None): 0-based blocks whose tokens are used, negative ones from the end; one dictionary
            and guide set is learned per layer and the maps are averaged. ``None`` is that of the guides file, else the
            last block (paper).
        pre_trained (bool): Load the backbone's weights. Defaults to ``True``.
        weights (str | Path | None): Local weights file (safetensors or PyTorch, timm's naming) used instead of timm's
            hub. Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Size images are resized to. ``None`` is that of the guides file, else
            448, or 518 for CLIP (paper).
        guides_file (str | Path | None): Guides file, a local one or ``hf://owner/repository/path/file.safetensors``;
            nothing is learned then. Defaults to ``None``.
        learn_on (bool): Learn on from the guides file, on images of your own: its atoms stay, their weights in the
            guides move (ours). Defaults to ``False``.
        hold_out (float): Share of the normal training images, at most 100, that is not learned from and sets the
            threshold, unless validation has enough good images. 0 learns from all, for guides to be used elsewhere.
            Without effect on labelled data and below 8 images. Defaults to 0.25 (ours).
        views (int): How many times anomalies are drawn on each normal training image; without effect on labelled data.
            Defaults to 8 (ours).
        dictionary (bool): Write the guides in a dictionary's atoms (paper). ``False`` learns free vectors: the control.
            Defaults to ``True``.
        num_atoms (int): Dictionary size. Defaults to 4096 (paper).
        k (int): Atoms per token. Defaults to 32 (paper).
        sae_epochs (int): Epochs of stage 1. Defaults to 50 (paper).
        guide_epochs (int): Epochs of stage 2. Defaults to 15 (paper).
        guide_top_k (int | None): Atoms per guide; ``None`` leaves it to the L1 penalty (paper). Defaults to ``None``.
        sparsity (float): Weight of the guides' mean L1 norm. Defaults to 1e-3 (paper).
        ema_decay (float): Decay of the guides' moving average. Defaults to 0.999 (paper).
        ema_warmup (bool): Let that decay rise from low values, for small data (ours). Defaults to ``False`` (paper).
        temperature (float | None): Softmax temperature. ``None`` is that of the guides file, else 0.07 (paper).
        sigma (float): Gaussian smoothing of the map in pixels; 0 for none. Defaults to 4 (paper).
        image_score (Literal["max", "top", "lse"]): How the map becomes a score: its maximum (paper), the mean of its
            top ``top_fraction``, or log-mean-exp. Defaults to ``"max"``.
        top_fraction (float): Share of pixels for ``"top"``, in (0, 1]. About the area of the defects you look for:
            it ranks defects of that size better than the maximum, and much smaller ones worse. Defaults to 0.01.
        cls_weight (float): Weight of the score by the pooled token against that of the map. Defaults to 0 (paper).
        own_weight (float): Weight of a patch's rarity in its own image beside the guides; costs no training. Defaults
            to 0 (paper). 8 is advice for textures and for guides from other products (ours): see the README.
        memory_limit (float): Most memory stored tokens and masks may take, in GiB, in all processes of a machine
            together. Defaults to 16 (ours).
        tokens_dir (str | Path | None): Folder where they go when they need more. A run deletes its own once the
            guides are saved; if it is interrupted, the same command goes on from what it left. ``None`` refuses
            instead. Defaults to ``"tokens"`` (ours).
        false_alarm_rate (float | None): Share of good parts that may be rejected. ``None`` is 0.08 (ours), or what a
            checkpoint was trained with. Defaults to ``None``.
        pixel_false_alarm_rate (float | None): Share of the pixels of good parts that may exceed the pixel threshold.
            ``None`` is 0.001 (ours), or what a checkpoint was trained with. Defaults to ``None``.
        seed (int | None): Seed everything with it before fitting, since ``anomalib train --seed_everything`` does not
            (anomalib 2.7 accepts the option and ignores it). ``None`` leaves the process's seed. Defaults to ``None``.
        pre_processor (nn.Module | bool, optional): Pre-processor instance or flag to use the default.
            Defaults to ``True``.
        post_processor (nn.Module | bool, optional): Post-processor instance or flag to use the default.
            Defaults to ``True``.
        evaluator (Evaluator | bool, optional): Evaluator instance or flag to use the default. Defaults to ``True``.
        visualizer (Visualizer | bool, optional): Visualizer instance or flag to use the default. Defaults to ``True``.

    Attributes:
        settings (GuideSettings): Those arguments that decide the guides, given tokens and masks.
        synthesizer (AnomalySynthesizer): Draws the anomalies; replace it to draw others.
        examples (Examples | None): Set it before fitting to keep training images for explanations.

    Raises:
        ValueError: If an argument is out of range, or the guides file belongs to another backbone or layer.
        RuntimeError: If the hub could not be asked for the guides file.

    Example:
        >>> from anomalib_spg import SPG
        >>> model = SPG(backbone="vit_tiny_patch16_224", layers=[5], pre_trained=False, image_size=224)
        >>> model.model.backbone.layers
        [5]
    """

    own_epochs = ("sae_epochs", "guide_epochs")
    learns_on = "to learn on, give guides_file, weights/guides.safetensors of its run, and learn_on"
    prior = Prior(spread=0.4, weight=4.0)  # measured on six textures, where spreads are 0.2 to 1.1

    def __init__(
        self,
        backbone: str | None = None,
        layers: Sequence[int] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        guides_file: str | Path | None = None,
        learn_on: bool = False,
        hold_out: float = 0.25,
        views: int = 8,
        dictionary: bool = True,
        num_atoms: int = 4096,
        k: int = 32,
        sae_epochs: int = 50,
        guide_epochs: int = 15,
        guide_top_k: int | None = None,
        sparsity: float = 1e-3,
        ema_decay: float = 0.999,
        ema_warmup: bool = False,
        temperature: float | None = None,
        sigma: float = 4.0,
        image_score: Literal["max", "top", "lse"] = "max",
        top_fraction: float = 0.01,
        cls_weight: float = 0.0,
        own_weight: float = 0.0,
        memory_limit: float = 16.0,
        tokens_dir: str | Path | None = "tokens",
        false_alarm_rate: float | None = None,
        pixel_false_alarm_rate: float | None = None,
        seed: int | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        if not 0 <= hold_out < 1:
            msg = f"hold_out={hold_out} must lie in [0, 1): the share of good images that is not learned from."
            raise ValueError(msg)
        if views < 1:
            msg = f"views={views} must be at least 1: how many times anomalies are drawn on each normal image."
            raise ValueError(msg)
        if learn_on and guides_file is None:
            msg = "learn_on=True learns on from guides: give their file, guides_file=<file>."
            raise ValueError(msg)
        if not memory_limit >= 0:
            msg = f"memory_limit={memory_limit} must not be negative: the most GiB of memory that tokens may take."
            raise ValueError(msg)
        settings = GuideSettings(
            dictionary=dictionary,
            num_atoms=num_atoms,
            k=k,
            sae_epochs=sae_epochs,
            guide_epochs=guide_epochs,
            guide_top_k=guide_top_k,
            sparsity=sparsity,
            ema_decay=ema_decay,
            ema_warmup=ema_warmup,
        )
        stored = read_guides(guides_file)[1] if guides_file is not None else {}
        if learn_on and not stored.get("settings", {}).get("dictionary", True):
            msg = f"learn_on=True weighs atoms anew; the guides in '{guides_file}' are free vectors, without atoms."
            raise ValueError(msg)
        backbone = backbone or stored.get("backbone", DEFAULT_BACKBONE)
        size = self.resolve_image_size(image_size if image_size is not None else stored.get("image_size"), backbone)
        check_seed(seed)
        super().__init__(
            pre_processor=self.configure_pre_processor(size, backbone) if pre_processor is True else pre_processor,
            post_processor=self.configure_post_processor(false_alarm_rate, pixel_false_alarm_rate)
            if post_processor is True
            else post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.guides_file = guides_file
        self.learn_on = learn_on
        self.settings = settings
        self.seed = seed
        self.memory_limit = memory_limit
        self.tokens_dir = tokens_dir
        self.hold_out = hold_out
        self.views = views
        self.synthesizer = AnomalySynthesizer()
        self.examples: Examples | None = None
        self.model: SPGModel = SPGModel(
            backbone=backbone,
            layers=layers,
            pre_trained=pre_trained,
            weights=weights,
            image_size=self.input_size or size,
            guides_file=guides_file,
            temperature=temperature,
            sigma=sigma,
            image_score=image_score,
            top_fraction=top_fraction,
            cls_weight=cls_weight,
            own_weight=own_weight,
        )
        if guides_file is None:
            self.model.settings = asdict(settings)
        self._is_fitted = torch.tensor([guides_file is not None])
        self._learned: AnomalibDataset | None = None
        self._known = learned_images(stored)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the dataset of a fit that failed out of an exported model, too."""
        return super().__getstate__() | {"_learned": None}

    def setup(self, stage: str) -> None:
        """Seed, refuse an empty training set, and hold good images out.

        Of normal training images ``hold_out`` are not learned from, unless validation has enough good images. With a
        guides file, from which nothing is learned, all are that its guides were not learned from; so are those that
        :class:`AuxiliaryTarget` has of its target. Fewer than 8 are all learned from. Where few are held out, those
        learned from help to place the threshold.

        Args:
            stage (str): Stage of the trainer.

        Raises:
            ValueError: If there are no training images.
        """
        super().setup(stage)
        if stage == "fit" and self.seed is not None:
            seed_everything(self.seed, workers=True)
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and len(getattr(datamodule, "train_data", [None])) == 0:
            msg = f"The training set of {datamodule.name} is empty. Check the datamodule's root, category and folders."
            raise ValueError(msg)
        if stage == "fit":
            self.begin_fit()
            # Guides from a file or from an auxiliary dataset are made to be used on other products.
            self.is_product_specific = self.learns and not self._is_labelled(getattr(datamodule, "train_data", None))
            self.model.store = TokenStore()  # forget what a fit that failed has left in memory
        if stage == "fit" and datamodule is not None:
            self._hold_out(datamodule)

    def _hold_out(self, datamodule: Any) -> None:  # noqa: ANN401  # any of anomalib's datamodules
        self.held_out, self._learned = None, None
        dataset = datamodule.train_data
        is_labelled = self._is_labelled(dataset)
        labelled = {path for path, _ in image_labels(dataset)} if is_labelled and self.learns else set()
        if is_labelled:  # AuxiliaryTarget has good parts of the target beside them
            dataset = getattr(datamodule, "good_data", None)
        if not dataset or self._is_labelled(dataset) or good_validation_images(datamodule) >= ENOUGH:
            return
        known: list[int] = []  # to the guides, or to those of the file that they go on from
        new: list[int] = []
        for index, (path, _) in enumerate(image_labels(dataset)):
            is_known = path in labelled or (self._known and short_digest(path) in self._known)
            (known if is_known else new).append(index)

        def chosen(indices: list[int], count: int) -> list[int]:  # by the first process, whose seed may be another
            return self.trainer.strategy.broadcast(choose(indices, count))

        learns = self.learns and not is_labelled
        if learns:
            holds_out = len(dataset) >= FEWEST and self.hold_out > 0
            held_out = chosen(new, min(MOST, max(1, int(len(dataset) * self.hold_out)))) if holds_out else []
            learned = sorted(set(range(len(dataset))) - set(held_out))
        else:
            held_out, learned = chosen(new, MOST), known
        if held_out:
            self.held_out = dataset.subsample(held_out)
            self._learned = dataset.subsample(learned) if learned and len(held_out) < ENOUGH else None
        else:
            self._learned = dataset.subsample(chosen(learned, MOST))
        if learns and held_out:
            self.swap_training_set(dataset.subsample(learned))

    def on_train_start(self) -> None:
        """Say what will be learned from, and decide where the tokens go, before it takes time.

        Raises:
            MemoryError: If they need more than the memory limit and there is no ``tokens_dir``.
            OSError: If the disk of ``tokens_dir`` is too small for them.
        """
        super().on_train_start()
        if not self.learns:
            logger.info("SPG uses the guides in %s; nothing is trained.", self.guides_file)
            return
        loader: Any = self.trainer.train_dataloader
        dataset = loader.dataset
        labelled = self._is_labelled(dataset)
        images = len(loader.sampler)  # this process's share
        total = images * (1 if labelled else self.views)
        backbone = self.model.backbone
        size = self.input_size or backbone.image_size
        self.model.store = store = TokenStore.fitting(
            backbone,
            total,
            size,
            self.memory_limit,
            self.tokens_dir,
            self._tokens_identity(dataset),
            self.trainer.num_devices,  # each has a process
        )
        place = f"in {store.path}, with {len(store)} images there already" if store.path else "in memory"
        logger.info(
            "SPG learns from %s: %d passes through the backbone, tokens take %.2f GiB %s.",
            "labelled images" if labelled else f"synthetic anomalies, {self.views} views of {images} images",
            total,
            memory_need(backbone, total, size) / GIB,
            place,
        )

    @property
    def learns(self) -> bool:
        """Whether a fit learns: without a guides file, or on from it."""
        return self.guides_file is None or self.learn_on

    def _tokens_identity(self, dataset: Any) -> dict[str, Any]:  # noqa: ANN401
        """What decides the tokens: a run for which all of this is equal may go on from stored ones."""
        samples = getattr(dataset, "samples", {})
        # Masks are stored beside the tokens; normal images have none.
        names = [name for column in ("image_path", "mask_path") for name in samples.get(column, ()) if name]
        paths = [Path(name) for name in [*names, self.model.backbone.weights] if isinstance(name, str | Path)]
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime) for path in sorted(paths) if path.is_file()]
        synthesizer = self.synthesizer
        drawn = {"views": self.views, "synthesizer": [str(type(synthesizer)), getattr(synthesizer, "__dict__", "")]}
        return {
            **self.identity(),
            "parameters": self.model.backbone.fingerprint(),
            "input_size": self.input_size,
            "transform": repr(getattr(self.pre_processor, "transform", None)),
            "augmentations": repr(getattr(dataset, "augmentations", None)),
            "precision": str(self.trainer.precision),
            "drawn": None if self._is_labelled(dataset) else drawn,
            "seed": self.seed,
            "process": [self.trainer.global_rank, self.trainer.world_size],
            "files": stats,
        }

    @staticmethod
    def _is_labelled(dataset: Any) -> bool:  # noqa: ANN401  # any dataset a user may bring
        return bool(getattr(dataset, "has_anomalous", False))

    def training_step(self, batch: ImageBatch, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        """Pass a batch through the backbone and store its tokens; see :meth:`fit` for the learning.

        Args:
            batch (ImageBatch): Labelled images with masks, or normal images.
            *args: Additional arguments (unused).
            **kwargs: Additional keyword arguments (unused).

        Returns:
            STEP_OUTPUT: A dummy loss for Lightning.

        Raises:
            ValueError: If an image labelled anomalous has no mask.
        """
        del args, kwargs
        if self.learns:
            loader: Any = self.trainer.train_dataloader
            labelled = self._is_labelled(loader.dataset)
            whole = cast("torch.Tensor", batch.image)
            if labelled and batch.gt_mask is None:
                msg = (
                    "SPG learns from masks, but the training images have none "
                    f"(first: {batch.image_path[0] if batch.image_path else 'unknown'}). Give the dataset's masks, "
                    "or train on normal images only."
                )
                raise ValueError(msg)
            views = 1 if labelled else self.views
            for view in tqdm(range(views), desc="views", unit="view", leave=False, disable=views == 1):
                names = [f"{path}#{view}" for path in batch.image_path or []]
                # without those that an interrupted run has stored
                new = [index for index in range(len(whole)) if not names or names[index] not in self.model.store]
                if not new:
                    continue
                new_names = [names[index] for index in new] if names else None
                images, labels = whole[new], None
                if labelled:
                    masks = cast("torch.Tensor", batch.gt_mask)[new]
                    labels = cast("torch.Tensor", batch.gt_label)[new]
                else:
                    with full_precision(images.device):
                        images, masks = self.synthesizer(images)
                start = len(self.model.store)
                self.model(images, masks, labels, new_names)
                if self.examples is not None:
                    paths, own = batch.image_path or [], self.model.backbone
                    aspects = [pixel_aspect(self.pre_processor, paths[index]) for index in new if paths]
                    self.examples.add(images, own.mean, own.std, start, new_names, aspects)
                    self.examples.drawn = not labelled
        return self.no_loss()

    def fit(self) -> None:
        """Learn dictionary and guides from the stored tokens, and save the guides file."""
        if not self.learns:
            self._place_thresholds()
            return

        def log(losses: dict[str, float], epoch: int) -> None:
            for trainer_logger in self.trainer.loggers:
                trainer_logger.log_metrics(losses, step=epoch)

        def learned(block: int, guides: Guides, patches: Sequence[torch.Tensor]) -> None:
            if self.examples is not None:
                self.examples.find(block, guides.atoms, guides.atom_indices, patches)

        self.model.fit(self.settings, log, learned, self.learn_on)
        datamodule = getattr(self.trainer, "datamodule", None)
        loader: Any = self.trainer.train_dataloader
        path = Path(self.trainer.default_root_dir) / "weights" / "guides.safetensors"
        if self.trainer.is_global_zero:
            self.model.save_guides(
                path,
                dataset=getattr(datamodule, "name", None),
                category=getattr(datamodule, "category", None),
                categories=getattr(datamodule, "auxiliary_categories", None),
                images=len(loader.dataset),
                labels="labelled" if self._is_labelled(loader.dataset) else "synthetic",
                digests=self._digests(loader.dataset),
            )
        self.model.store.clear()
        self._place_thresholds()
        logger.info("Seconds spent: %s.", ", ".join(f"{name} {s:.0f}" for name, s in self.model.seconds.items()))
        if self.trainer.is_global_zero:
            logger.info("Guides saved to %s. SPG(guides_file=...) uses them on other data without training.", path)

    def _digests(self, dataset: Any) -> list[str]:  # noqa: ANN401  # any dataset a user may bring
        """Good images that the guides have been learned from, so that another run does not take them for new."""
        good = [path for path, label in image_labels(dataset) if label != 1] if hasattr(dataset, "samples") else []
        return sorted({*self._known, *map(short_digest, good)} - {""})

    def _place_thresholds(self) -> None:
        self.add_good(self._learned, learned_from=True, correction=OWN_IMAGES)
        self.add_good(self.held_out)
        self.place_thresholds()
        self._learned = None

    def explain(self, images: torch.Tensor, tokens: Tokens | None = None) -> list[Explanation]:
        """Split the scores of images into atoms; see :func:`anomalib_spg.explain.explain`.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            tokens (Tokens | None): What the backbone gave for them, where that is at hand. Defaults to ``None``.

        Returns:
            list[Explanation]: One per image.
        """
        tokens = self.model.backbone(images) if tokens is None else tokens
        return explain(self.model, tokens, (images.shape[-2], images.shape[-1]))

    def figures(self, examples: Examples | None = None) -> dict[str, tuple[str, Figure]]:
        """Draw what the guides look for.

        Args:
            examples (Examples | None): Training images to take example patches from. Defaults to ``None``.

        Returns:
            dict[str, tuple[str, Figure]]: By a name fit for a file, the title and the matplotlib figure of each layer.
        """
        return {
            f"guides_block{block}": (f"what the guides of block {block} look for", plot_guides(guides, block, examples))
            for block, guides in zip(self.model.backbone.layers, self.model.guides, strict=True)
        }

    @staticmethod
    def chosen_neurons() -> dict[int, list[int]]:
        """SPG compares all channels: no neurons are chosen."""
        return {}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the checkpoint stand alone: restoring it needs neither hub nor weights nor guides file."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["identity"] |= self._scoring()
        checkpoint["hyper_parameters"] |= {
            **self.identity(),
            "temperature": self.model.temperature,
            "pre_trained": False,
            "weights": None,
            "guides_file": None,
            "learn_on": False,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore component configuration, and refuse the checkpoint of another model, or a damaged one.

        Raises:
            ValueError: If an argument that determines the meaning of the tensors or of the thresholds differs, or the
                guides contradict themselves.
        """
        super().on_load_checkpoint(checkpoint)
        checkpoint.get("hyper_parameters", {}).setdefault("own_weight", 0.0)  # of a release that had none
        check_identity(checkpoint, self._scoring())
        prefix = "model.guides."
        state = checkpoint.get("state_dict", {}).items()
        tensors = {name.removeprefix(prefix): value for name, value in state if name.startswith(prefix)}
        fault = guides_fault(tensors) if tensors else None  # Lightning names what is missing
        if fault:
            msg = f"The guides in the checkpoint are damaged: {fault}. Copy it again, or train SPG again."
            raise ValueError(msg)

    def _scoring(self) -> dict[str, Any]:
        """Arguments that decide what a checkpoint's thresholds mean."""
        model = self.model
        fraction = {"top_fraction": model.top_fraction} if model.image_score == "top" else {}
        weights = {"cls_weight": model.cls_weight, "own_weight": model.own_weight}
        return {"image_score": model.image_score, **fraction, **weights}

    def identity(self) -> dict[str, Any]:
        """Arguments that decide what a checkpoint's tensors mean."""
        backbone = self.model.backbone
        return {"backbone": backbone.name, "layers": backbone.layers, "image_size": list(backbone.image_size)}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """Trainer arguments of SPG.

        Returns:
            dict[str, Any]: One epoch, because the images are passed once and the stages run on stored tokens; with a
                guides file a single batch, because nothing is learned.
        """
        arguments = {"gradient_clip_val": 0, "max_epochs": 1, "num_sanity_val_steps": 0}
        return arguments | ({} if self.learns else {"limit_train_batches": 1})
