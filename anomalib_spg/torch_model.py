# SPDX-License-Identifier: Apache-2.0

"""SPG as a plain PyTorch module.

Reference: Sparse-Projected Guides for zero-shot anomaly detection (arXiv 2604.02871).
"""

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from torch import nn

from .anomaly_map import AnomalyMapGenerator
from .backbone import DEFAULT_BACKBONE, Backbone, Tokens
from .distributed import any_process
from .examples import Examples
from .explanation import Explanation, explain
from .guides import Guides, read_guides, save_guides, train_guides
from .sae import TopKSAE, train_sae
from .token_store import GIB, TokenStore

logger = logging.getLogger(__name__)


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
        guides (str | Path | None): Guides file to use; nothing is left to learn then. Defaults to ``None``.
        dictionary (bool): Write the guides in a dictionary's atoms (paper). ``False`` learns free vectors and no
            dictionary: the control. Defaults to ``True``.
        num_atoms (int): Dictionary size C. Defaults to 4096 (paper).
        k (int): Atoms per token. Defaults to 32 (paper).
        sae_epochs (int): Epochs of stage 1. Defaults to 50 (paper).
        guide_epochs (int): Epochs of stage 2. Defaults to 15 (paper).
        guide_top_k (int | None): Atoms per guide; ``None`` leaves it to the L1 penalty (paper). Defaults to ``None``.
        sparsity (float): Weight of the guides' mean L1 norm. Defaults to 1e-3 (paper).
        ema_decay (float): Decay of the guides' moving average. Defaults to 0.999 (paper).
        ema_warmup (bool): Let that decay rise from low values, for small data (ours). Defaults to ``False`` (paper).
        temperature (float | None): Softmax temperature. ``None`` is that of the guides file, else 0.07 (paper).
        sigma (float): Gaussian smoothing of the map in pixels; 0 for none. Defaults to 4 (paper).
        image_score (str): How the map becomes a score: its maximum (``"max"``, paper), the mean of its top
            ``top_fraction`` of pixels (``"top"``), or ``T log mean exp(map / T)`` with the temperature (``"lse"``).
        top_fraction (float): Share of pixels for ``"top"``. Defaults to 0.01.
        cls_weight (float): Weight of the score by the pooled token against that of the map, in [0, 1]. 1 is the
            published CLS score. Defaults to 0 (paper).
        memory_limit (float): Most memory the stored tokens and masks may take, in GiB. Defaults to 16 (ours).

    Raises:
        ValueError: If an argument is out of range, or the guides file belongs to another backbone or layer.

    Example:
        >>> model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, num_atoms=64, k=8,
        ...                  sae_epochs=1, guide_epochs=1)
        >>> masks = torch.zeros(4, 64, 64)
        >>> masks[:2, :32, :32] = 1
        >>> _ = model.train()(torch.randn(4, 3, 64, 64), masks)
        >>> model.fit()
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
        guides: str | Path | None = None,
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
        memory_limit: float = 16.0,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_atoms:
            msg = f"k={k} atoms per token must lie between 1 and num_atoms={num_atoms}."
            raise ValueError(msg)
        if guide_top_k is not None and not 1 <= guide_top_k <= num_atoms:
            msg = f"guide_top_k={guide_top_k} must lie between 1 and num_atoms={num_atoms}."
            raise ValueError(msg)
        if guide_top_k is not None and not dictionary:
            msg = f"guide_top_k={guide_top_k} chooses atoms, and dictionary=False has none. Leave one of them out."
            raise ValueError(msg)
        if image_score not in {"max", "top", "lse"}:
            msg = f"image_score='{image_score}' is unknown; choose 'max', 'top' or 'lse'."
            raise ValueError(msg)
        for name, value in {"cls_weight": cls_weight, "top_fraction": top_fraction}.items():
            if not 0 <= value <= 1:
                msg = f"{name}={value} must lie in [0, 1]."
                raise ValueError(msg)

        tensors, stored = read_guides(guides) if guides is not None else ({}, {})
        self.backbone = Backbone(
            name=backbone or stored.get("backbone", DEFAULT_BACKBONE),
            layers=layers if layers is not None else stored.get("layers"),
            pre_trained=pre_trained,
            weights=weights,
            image_size=image_size or stored.get("image_size"),
        )
        self.temperature = temperature or stored.get("temperature", 0.07)
        self.dictionary = dictionary
        self.num_atoms = num_atoms
        self.k = k
        self.sae_epochs = sae_epochs
        self.guide_epochs = guide_epochs
        self.guide_top_k = guide_top_k
        self.sparsity = sparsity
        self.ema_decay = ema_decay
        self.ema_warmup = ema_warmup
        self.image_score = image_score
        self.top_fraction = top_fraction
        self.cls_weight = cls_weight
        self.memory_limit = memory_limit
        self.anomaly_map_generator = AnomalyMapGenerator(self.backbone.patch_size, sigma)

        self.guides = nn.ModuleList(Guides(self.backbone.embed_dim) for _ in self.backbone.layers)
        if guides is not None:
            for name, own in (("backbone", self.backbone.name), ("layers", self.backbone.layers)):
                if stored.get(name) != own:
                    msg = (
                        f"The guides in '{guides}' were learned with {name}={stored.get(name)}, this model has "
                        f"{name}={own}. Leave {name} out to take the file's, or use guides learned for it."
                    )
                    raise ValueError(msg)
            try:
                self.guides.load_state_dict(tensors)
            except RuntimeError as exception:
                msg = f"The guides file '{guides}' is damaged or of another backbone: {exception}"
                raise ValueError(msg) from exception

        self.store = TokenStore()
        self.examples: Examples | None = None  # set it to keep training images for explanations
        self.seconds: dict[str, float] = {"backbone": 0.0, "sae": 0.0, "guides": 0.0}

    @property
    def is_fitted(self) -> bool:
        """Whether there are guides, learned or from a file."""
        return all(len(guides.atoms) > 0 for guides in self.guides)

    def memory_need(self, num_images: int, image_size: tuple[int, int]) -> int:
        """Bytes that storing so many images takes: half-precision tokens of every layer, and a byte per mask pixel.

        Args:
            num_images (int): Images, or drawn views of images.
            image_size (tuple[int, int]): Their height and width.

        Returns:
            int: Bytes.

        Example:
            >>> model = SPGModel("vit_tiny_patch16_224", pre_trained=False)
            >>> model.memory_need(1, (224, 224)) == 197 * 192 * 2 + 224 * 224
            True
        """
        height, width = image_size
        patch = self.backbone.patch_size
        tokens = -(-height // patch) * -(-width // patch) + 1
        return num_images * (len(self.guides) * tokens * self.backbone.embed_dim * 2 + height * width)

    def check_memory(self, num_images: int, image_size: tuple[int, int]) -> None:
        """Refuse what does not fit ``memory_limit``.

        Args:
            num_images (int): Images, or drawn views of images.
            image_size (tuple[int, int]): Their height and width.

        Raises:
            MemoryError: If it does not fit; the message says how much is needed.
        """
        need = self.memory_need(num_images, image_size) / GIB
        if need > self.memory_limit:
            msg = (
                f"The tokens of {num_images} images of {image_size[0]}x{image_size[1]} need {need:.2f} GiB of memory, "
                f"memory_limit is {self.memory_limit} GiB. Raise it if there is more, keep them on disk with "
                "tokens_dir, or use fewer images, views or layers, or a smaller image_size."
            )
            raise MemoryError(msg)

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
                images whose mask has a pixel.
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
            msg = "SPG has no guides yet. Train it, or give a guides file: SPG(guides=<file>)."
            raise RuntimeError(msg)
        probability = torch.stack([
            guides.local_probability(patches, self.temperature)
            for guides, patches in zip(self.guides, tokens.patches, strict=True)
        ]).mean(dim=0)
        anomaly_map = self.anomaly_map_generator(probability.view(-1, *tokens.grid), size)
        score = self.score(anomaly_map.flatten(1))
        if self.cls_weight > 0:
            cls = torch.stack([
                guides.global_probability(pooled, self.temperature)
                for guides, pooled in zip(self.guides, tokens.pooled, strict=True)
            ]).mean(dim=0)
            score = torch.lerp(score, cls, self.cls_weight)
        return InferenceBatch(pred_score=score, anomaly_map=anomaly_map)

    def explain(self, images: torch.Tensor, tokens: Tokens | None = None) -> list[Explanation]:
        """Split the scores of images into atoms; see :func:`anomalib_spg.explanation.explain`.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            tokens (Tokens | None): What the backbone gave for them, where that is at hand. Defaults to ``None``.

        Returns:
            list[Explanation]: One per image.
        """
        tokens = self.backbone(images) if tokens is None else tokens
        return explain(self, tokens, (images.shape[-2], images.shape[-1]))

    def figures(self, examples: Examples | None = None) -> dict[str, tuple[str, Any]]:
        """Draw what the guides look for.

        Args:
            examples (Examples | None): Training images to take example patches from. Defaults to ``None``.

        Returns:
            dict[str, tuple[str, Figure]]: By a name fit for a file, the title and the matplotlib figure of each layer.
        """
        from .figures import plot_guides  # matplotlib takes its time

        return {
            f"guides_block{block}": (f"what the guides of block {block} look for", plot_guides(guides, block, examples))
            for block, guides in zip(self.backbone.layers, self.guides, strict=True)
        }

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
        if masks is None or masks.shape[-2:] != size or len(masks) != len(images):
            found = "none" if masks is None else f"masks of shape {tuple(masks.shape)}"
            msg = (
                f"SPG learns from images with masks of their size: for images {tuple(images.shape)} there are {found}."
            )
            raise ValueError(msg)
        if self.store.path is None:
            self.check_memory(len(self.store) + len(images), size)
        start = time.perf_counter()
        tokens = self.backbone(images)
        if self.examples is not None:
            self.examples.add(images, self.backbone.mean, self.backbone.std, len(self.store), names)
        self.store.add(tokens, masks, (masks.flatten(1).any(dim=1) if labels is None else labels).tolist(), names)
        self.seconds["backbone"] += time.perf_counter() - start
        return tokens.patches[-1]

    def fit(self, log: Callable[[dict[str, float], int], None] = lambda *_: None) -> None:
        """Learn dictionary and guides from the stored tokens, layer by layer, and forget the tokens.

        Files of tokens on disk stay until :meth:`TokenStore.clear`, so that they survive what comes next.

        Args:
            log (Callable): Receives losses by name and the epoch they belong to.

        Raises:
            ValueError: If nothing was stored, or no image, or every image, is anomalous.
        """
        store = self.store
        if not len(store):
            msg = "SPG has no training images to learn from. Is the training set empty?"
            raise ValueError(msg)
        device = self.guides[0].vectors.device
        kinds = torch.tensor([any(store.labels), not all(store.labels)], device=device)
        has_anomalous, has_normal = any_process(kinds).tolist()
        if not (has_anomalous and has_normal):
            missing = "normal" if has_anomalous else "anomalous (with a mask)"
            msg = f"SPG learns from normal and anomalous images; none of the {len(store)} stored ones is {missing}."
            raise ValueError(msg)
        # Validation hooks, where Lightning may call this, run in inference mode; learning needs gradients.
        with torch.inference_mode(mode=False), torch.enable_grad():
            for layer, block in enumerate(self.backbone.layers):
                start = time.perf_counter()
                recorder = _EpochLog(log, f"block{block}")
                atoms = alive = None
                if self.dictionary:
                    sae = TopKSAE(self.backbone.embed_dim, self.num_atoms, self.k).to(device)
                    name = f"dictionary, block {block}"
                    alive = train_sae(sae, store.patches[layer], self.sae_epochs, log=recorder, description=name)
                    atoms = sae.dictionary.detach()
                middle = time.perf_counter()
                train_guides(
                    self.guides[layer],
                    atoms,
                    alive,
                    store.patches[layer],
                    store.pooled[layer],
                    store.masks,
                    store.labels,
                    store.grid,
                    self.backbone.patch_size,
                    temperature=self.temperature,
                    epochs=self.guide_epochs,
                    sparsity=self.sparsity,
                    top_k=self.guide_top_k,
                    ema_decay=self.ema_decay,
                    ema_warmup=self.ema_warmup,
                    log=_EpochLog(log, f"block{block}"),
                    description=f"guides, block {block}",
                )
                if self.examples is not None:
                    self.examples.find(block, self.guides[layer], store.patches[layer])
                store.patches[layer], store.pooled[layer] = [], []
                self.seconds["sae"] += middle - start
                self.seconds["guides"] += time.perf_counter() - middle
        if store.path is None:
            store.clear()

    def save_guides(self, path: str | Path, **trained_on: Any) -> Path:  # noqa: ANN401
        """Write the guides, and what is needed to use them right, to a safetensors file.

        Args:
            path (str | Path): File to write.
            **trained_on (Any): Plain data saying what they were learned from.

        Returns:
            Path: The file.
        """
        return save_guides(path, list(self.guides), {**self.metadata(), "trained_on": trained_on})

    def metadata(self) -> dict[str, Any]:
        """What a guides file records beside the guides.

        Returns:
            dict[str, Any]: Backbone, layers, image size, temperature, image statistics, settings and versions.
        """
        from importlib.metadata import version

        return {
            "backbone": self.backbone.name,
            "layers": self.backbone.layers,
            "image_size": self.backbone.image_size,
            "temperature": self.temperature,
            "mean": self.backbone.mean,
            "std": self.backbone.std,
            "settings": {
                "dictionary": self.dictionary,
                "num_atoms": self.num_atoms,
                "k": self.k,
                "sae_epochs": self.sae_epochs,
                "guide_epochs": self.guide_epochs,
                "guide_top_k": self.guide_top_k,
                "sparsity": self.sparsity,
                "ema_decay": self.ema_decay,
                "ema_warmup": self.ema_warmup,
            },
            "versions": {name: version(name) for name in ("anomalib", "timm", "torch")},
        }


class _EpochLog:
    """Number a stage's epochs and put the block's name before its losses."""

    def __init__(self, log: Callable[[dict[str, float], int], None], prefix: str) -> None:
        self.log = log
        self.prefix = prefix
        self.epoch = 0

    def __call__(self, losses: dict[str, float]) -> None:
        self.log({f"{self.prefix}/{name}": value for name, value in losses.items()}, self.epoch)
        self.epoch += 1
