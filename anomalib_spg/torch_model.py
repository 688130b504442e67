# SPDX-License-Identifier: Apache-2.0

"""SPG as a plain PyTorch module.

Reference: Sparse-Projected Guides for zero-shot anomaly detection (arXiv 2604.02871).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from einops import rearrange
from torch import nn

from .components.anomaly_map import AnomalyMapGenerator
from .components.backbone import DEFAULT_BACKBONE, Backbone, Tokens, warn_of_other_timm
from .components.module_list import ModuleList
from .components.precision import full_precision
from .distributed import any_process
from .guides import Guides, read_guides, save_guides, train_guides
from .rarity import rarity
from .sae import TopKSAE, train_sae
from .settings import GuideSettings
from .token_store import TokenStore

logger = logging.getLogger(__name__)

STAGE_2 = ("guide_epochs", "guide_top_k", "sparsity", "ema_decay", "ema_warmup")  # settings of the guides alone


class SPGModel(nn.Module):
    """Frozen backbone, sparse dictionary and four guides.

    In training mode a forward pass stores the tokens of images and their masks; :meth:`fit` then learns dictionary and
    guides from them. In evaluation mode a forward pass returns anomaly maps and scores.

    Args:
        backbone (str | None): timm model name. ``None`` is that of the guides file, else DINOv3-L/16 (paper).
        layers (Sequence[int] | None): 0-based blocks whose tokens are used, negative ones from the end; one dictionary
            and guide set is learned per layer and the maps are averaged. ``None`` is that of the guides file, else the
            last block (paper). Small backbones can need middle blocks; see the README.
        pre_trained (bool): Load the backbone's weights. Defaults to ``True``.
        weights (str | Path | None): Local weights file used instead of timm's hub. Defaults to ``None``.
        image_size (tuple[int, int] | None): Height and width images are expected to have. Others work, slightly slower.
            Defaults to ``None``: that of the guides file, else the size the weights were trained with.
        guides_file (str | Path | None): Guides to use, a local file or ``hf://owner/repository/path/file.safetensors``;
            nothing is learned then. Defaults to ``None``.
        temperature (float | None): Softmax temperature. ``None`` is that of the guides file, else 0.07 (paper).
        sigma (float): Gaussian smoothing of the map in pixels; 0 for none. Defaults to 4 (paper).
        image_score (str): How the map becomes a score: its maximum (``"max"``, paper), the mean of its top
            ``top_fraction`` of pixels (``"top"``), or ``T log mean exp(map / T)`` with the temperature (``"lse"``).
        top_fraction (float): Share of pixels for ``"top"``, in (0, 1]. Defaults to 0.01.
        cls_weight (float): Weight of the score by the pooled token against that of the map, in [0, 1]. 1 is the
            published CLS score. Defaults to 0 (paper).
        own_weight (float): Weight of a patch's :func:`.rarity` in its own image, added to the logit of the guides.
            Defaults to 0 (paper); 8 is advice for textures and for guides from other products (ours).

    Attributes:
        guides (ModuleList): The guides of each layer.
        store (TokenStore): Where training images' tokens go; replace it before training to keep them elsewhere.
        settings (dict[str, Any]): What the guides were learned with, as :class:`GuideSettings` names it.
        seconds (dict[str, float]): Time spent in the backbone, the dictionary and the guides.

    Raises:
        ValueError: If an argument is out of range, or the guides file belongs to another backbone or layer.
        RuntimeError: If the hub could not be asked for the guides file.

    Example:
        >>> model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False)
        >>> masks = torch.zeros(4, 64, 64)
        >>> masks[:2, :32, :32] = 1
        >>> _ = model.train()(torch.randn(4, 3, 64, 64), masks)
        >>> model.fit(GuideSettings(num_atoms=64, k=8, sae_epochs=1, guide_epochs=1))
        >>> batch = model.eval()(torch.randn(2, 3, 64, 64))
        >>> batch.anomaly_map.shape, batch.pred_score.shape
        (torch.Size([2, 1, 64, 64]), torch.Size([2]))
    """

    def __init__(
        self,
        backbone: str | None = None,
        layers: Sequence[int] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        guides_file: str | Path | None = None,
        temperature: float | None = None,
        sigma: float = 4.0,
        image_score: Literal["max", "top", "lse"] = "max",
        top_fraction: float = 0.01,
        cls_weight: float = 0.0,
        own_weight: float = 0.0,
    ) -> None:
        super().__init__()
        if image_score not in {"max", "top", "lse"}:
            msg = f"image_score='{image_score}' is unknown; choose 'max', 'top' or 'lse'."
            raise ValueError(msg)
        if not 0 <= cls_weight <= 1:
            msg = f"cls_weight={cls_weight} must lie in [0, 1]; 0 leaves the score to the map."
            raise ValueError(msg)
        if not 0 <= own_weight < math.inf:
            msg = f"own_weight={own_weight} must not be negative; 0 leaves the map to the guides."
            raise ValueError(msg)
        if not 0 < top_fraction <= 1:
            msg = f"top_fraction={top_fraction} must lie in (0, 1]: the share of pixels that make the score."
            raise ValueError(msg)
        if temperature is not None and not 0 < temperature < math.inf:
            msg = f"temperature={temperature} must be a positive number."
            raise ValueError(msg)

        tensors, stored = read_guides(guides_file) if guides_file is not None else ({}, {})
        self.backbone = Backbone(
            name=backbone or stored.get("backbone", DEFAULT_BACKBONE),
            layers=layers if layers is not None else stored.get("layers"),
            pre_trained=pre_trained,
            weights=weights,
            image_size=image_size or stored.get("image_size"),
        )
        self.temperature: float = stored.get("temperature", 0.07) if temperature is None else temperature
        self.image_score = image_score
        self.top_fraction = top_fraction
        self.cls_weight = cls_weight
        self.own_weight = own_weight
        self.anomaly_map_generator = AnomalyMapGenerator(self.backbone.patch_size, sigma, self.backbone.image_size)

        self.guides: ModuleList[Guides] = ModuleList(Guides(self.backbone.embed_dim) for _ in self.backbone.layers)
        if guides_file is not None:
            for name, own in (("backbone", self.backbone.name), ("layers", self.backbone.layers)):
                if stored.get(name) != own:
                    msg = (
                        f"The guides in '{guides_file}' were learned with {name}={stored.get(name)}, this model has "
                        f"{name}={own}. Leave {name} out to take the file's, or use guides learned for it."
                    )
                    raise ValueError(msg)
            try:
                self.guides.load_state_dict(tensors)
            except RuntimeError as exception:
                msg = f"The guides file '{guides_file}' is damaged or of another backbone: {exception}"
                raise ValueError(msg) from exception
            warn_of_other_timm(stored.get("versions", {}).get("timm"), guides_file)

        self.store = TokenStore()
        self.settings: dict[str, Any] = stored.get("settings", {})
        self.seconds: dict[str, float] = {"backbone": 0.0, "sae": 0.0, "guides": 0.0}

    def __getstate__(self) -> dict[str, Any]:
        """Keep tokens, which a fit that failed may have left, out of an exported model."""
        return {**self.__dict__, "store": TokenStore()}

    @property
    def is_fitted(self) -> bool:
        """Whether there are guides, learned or from a file."""
        return all(len(guides.atoms) > 0 for guides in self.guides)

    def forward(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        names: Sequence[str] | None = None,
    ) -> InferenceBatch | torch.Tensor:
        """Store tokens (training mode) or find anomalies (evaluation mode).

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``, or grey ones ``(B, 1, H, W)``.
            masks (torch.Tensor | None): Training mode only: anomaly masks ``(B, H, W)``.
            labels (torch.Tensor | None): Training mode only: image labels ``(B,)``, 1 for anomalous. ``None`` takes
                images whose mask is not empty.
            names (Sequence[str] | None): Training mode only: names of the images, see :class:`TokenStore`.

        Returns:
            InferenceBatch | torch.Tensor: ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, 1, H, W)``, both in [0, 1];
            in training mode the last layer's patch tokens ``(B, N, D)``.

        Raises:
            ValueError: If masks are missing or of another size in training mode.
            RuntimeError: If there are no guides yet in evaluation mode.
        """
        size = (images.shape[-2], images.shape[-1])
        if self.training:
            return self._store(images, masks, labels, names, size)
        tokens = self.backbone(images)
        if not torch.compiler.is_compiling() and not self.is_fitted:
            msg = "SPG has no guides yet. Train it, or give a checkpoint (--ckpt_path), or SPG(guides_file=<file>)."
            raise RuntimeError(msg)
        with full_precision(images.device):
            return self._predict(tokens, size)

    def _predict(self, tokens: Tokens, size: tuple[int, int]) -> InferenceBatch:
        """Scores and maps from the backbone's tokens of images of a height and width."""
        probability = torch.stack([
            torch.sigmoid(guides.local_logit(patches, self.temperature) + self.rarity(patches, tokens.grid))
            for guides, patches in zip(self.guides, tokens.patches, strict=True)
        ]).mean(dim=0)
        anomaly_map = self.anomaly_map_generator(rearrange(probability, "b (h w) -> b h w", h=tokens.grid[0]), size)
        score = self.score(anomaly_map.flatten(1))
        if self.cls_weight > 0:
            cls = torch.stack([
                guides.global_probability(pooled, self.temperature)
                for guides, pooled in zip(self.guides, tokens.pooled, strict=True)
            ]).mean(dim=0)
            score = torch.lerp(score, cls, self.cls_weight)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def rarity(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor | float:
        """Compute what rarity in their own image adds to the logits of patches.

        Args:
            patches (torch.Tensor): Patch tokens ``(B, N, D)``.
            grid (tuple[int, int]): Rows and columns of patches.

        Returns:
            torch.Tensor | float: ``(B, N)``; 0 where it has no weight.
        """
        return self.own_weight * rarity(patches, grid) if self.own_weight > 0 else 0.0

    def score(self, pixels: torch.Tensor) -> torch.Tensor:
        """Compute image scores from maps, as ``image_score`` says.

        Args:
            pixels (torch.Tensor): Pixels of the anomaly maps ``(B, P)``.

        Returns:
            torch.Tensor: Scores ``(B,)``.
        """
        if self.image_score == "max":
            return pixels.amax(dim=1)
        if self.image_score == "top":
            return pixels.topk(max(1, round(self.top_fraction * pixels.shape[1])), dim=1).values.mean(dim=1)
        mean = torch.logsumexp(pixels / self.temperature, dim=1) - math.log(pixels.shape[1])
        return self.temperature * mean

    def _store(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
        labels: torch.Tensor | None,
        names: Sequence[str] | None,
        size: tuple[int, int],
    ) -> torch.Tensor:
        if masks is None or tuple(masks.shape[-2:]) != size or len(masks) != len(images):
            found = "none" if masks is None else f"masks of shape {tuple(masks.shape)}"
            msg = (
                f"SPG learns from images with masks of their size: for images {tuple(images.shape)} there are {found}."
            )
            raise ValueError(msg)
        self.store.check_memory(self.backbone, len(self.store) + len(images), size)
        start = time.perf_counter()
        tokens = self.backbone(images)
        self.store.add(tokens, masks, (masks.flatten(1).any(dim=1) if labels is None else labels).tolist(), names)
        self.seconds["backbone"] += time.perf_counter() - start
        return tokens.patches[-1]

    def fit(
        self,
        settings: GuideSettings | None = None,
        log: Callable[[dict[str, float], int], None] = lambda *_: None,
        learned: Callable[[int, Guides, list[torch.Tensor]], None] = lambda *_: None,
        learn_on: bool = False,
    ) -> None:
        """Learn dictionary and guides from the stored tokens, layer by layer, and forget the tokens.

        Files of tokens on disk stay until :meth:`TokenStore.clear`, so that they survive a failure to save the guides.

        Args:
            settings (GuideSettings | None): Settings of the two stages. ``None`` takes the published ones.
            log (Callable): Receives losses by name and the epoch they belong to.
            learned (Callable): Called after every layer with its block, its guides, and the patch tokens ``(N, D)``
                of every training image, which are forgotten afterwards.
            learn_on (bool): Keep the atoms of the guides there are, and learn on from their coefficients: stage 2
                alone. Defaults to ``False``.

        Raises:
            ValueError: If nothing was stored, no image, or every image, is anomalous, or no mask marks anything.
        """
        settings = settings or GuideSettings()
        store = self.store
        if not len(store):
            msg = "SPG has no training images to learn from. Is the training set empty?"
            raise ValueError(msg)
        device = self.guides[0].vectors.device
        kinds = torch.tensor([any(store.labels), not all(store.labels)], device=device)
        has_anomalous, has_normal = any_process(kinds).tolist()
        if not (has_anomalous and has_normal):
            missing = "normal" if has_anomalous else "anomalous (with a mask)"
            msg = (
                f"SPG learns from normal and anomalous images; none of the {len(store)} stored ones is {missing}. "
                "Give more images, or more views of them: whether an anomaly is drawn on one is left to chance, and "
                "nothing shows on images of a single colour."
            )
            raise ValueError(msg)
        marked = any(bool(mask.any()) for mask, label in zip(store.masks, store.labels, strict=True) if label)
        if not any_process(torch.tensor([marked], device=device)).item():
            msg = "The masks of all anomalous images are empty; SPG learns from what they mark."
            raise ValueError(msg)
        # Validation hooks, where Lightning may call this, run in inference mode; learning needs gradients.
        with torch.inference_mode(mode=False), torch.enable_grad(), full_precision(device):
            for layer, block in enumerate(self.backbone.layers):
                start = time.perf_counter()
                recorder = _EpochLog(log, f"block{block}")
                atoms = alive = None
                if settings.dictionary and not learn_on:
                    sae = TopKSAE(self.backbone.embed_dim, settings.num_atoms, settings.k).to(device)
                    name = f"dictionary, block {block}"
                    alive = train_sae(sae, store.patches[layer], settings.sae_epochs, log=recorder, description=name)
                    atoms = sae.dictionary.detach()
                middle = time.perf_counter()
                train_guides(
                    self.guides[layer],
                    atoms,
                    alive,
                    store,
                    layer,
                    self.backbone.patch_size,
                    settings,
                    self.temperature,
                    log=_EpochLog(log, f"block{block}"),
                    description=f"guides, block {block}",
                    learn_on=learn_on,
                )
                learned(block, self.guides[layer], store.patches[layer])
                store.patches[layer], store.pooled[layer] = [], []
                self.seconds["sae"] += middle - start
                self.seconds["guides"] += time.perf_counter() - middle
        own = {name: value for name, value in asdict(settings).items() if not learn_on or name in STAGE_2}
        self.settings = {**self.settings, **own} if learn_on else own
        if store.path is None:
            store.clear()

    def save_guides(self, path: str | Path, **trained_on: Any) -> Path:
        """Write the guides, and the metadata needed to use them, to a safetensors file.

        Args:
            path (str | Path): File to write.
            **trained_on (Any): Plain data saying what they were learned from.

        Returns:
            Path: The file.
        """
        return save_guides(path, list(self.guides), {**self.metadata(), "trained_on": trained_on})

    def metadata(self) -> dict[str, Any]:
        """Metadata that a guides file holds beside the guides.

        Returns:
            dict[str, Any]: Backbone, layers, image size, temperature, image statistics, settings and versions.
        """
        return {
            "backbone": self.backbone.name,
            "layers": self.backbone.layers,
            "image_size": self.backbone.image_size,
            "temperature": self.temperature,
            "mean": self.backbone.mean,
            "std": self.backbone.std,
            "settings": self.settings,
            "versions": {name: version(name) for name in ("anomalib", "timm", "torch")},
        }


class _EpochLog:
    """Count a stage's epochs, and prefix the names of its losses with the block."""

    def __init__(self, log: Callable[[dict[str, float], int], None], prefix: str) -> None:
        self.log = log
        self.prefix = prefix
        self.epoch = 0

    def __call__(self, losses: dict[str, float]) -> None:
        self.log({f"{self.prefix}/{name}": value for name, value in losses.items()}, self.epoch)
        self.epoch += 1
