# SPDX-License-Identifier: Apache-2.0

"""LAKE as a plain PyTorch module.

Reference: Latent Anomaly Knowledge Excavation (arXiv 2604.07802). The paper leaves layers, distance, prompts,
resolution and smoothing open; the choices made here are arguments, marked "ours", and measured in the README beside
this file.
"""

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from einops import rearrange
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from anomalib_spg.components.anomaly_map import AnomalyMapGenerator
from anomalib_spg.components.backbone import Backbone, is_clip, num_blocks
from anomalib_spg.components.module_list import ModuleList
from anomalib_spg.components.own_image import kept_patches
from anomalib_spg.components.precision import full_precision

from .bank import NormalityBank, average_neighbors, reference_images, stride_of
from .copies import FEW, num_copies, views
from .neurons import Normalization, Selection, SensitiveNeurons
from .own_image import OwnImage
from .places import Places
from .text import embed_prompts, prompts, read_checkpoint, text_tower

# Tokens of an image's copies, in one layer and at one scale, and the patches of the image that they show.
Copies = tuple[torch.Tensor, torch.Tensor]
# Copies that the backbone takes at a time.
BATCH = 8
# Normal images whose tokens are kept in full, to choose the neurons by; in the end each is compared with the others.
SAMPLE = 32
DEFAULT_BACKBONE = "vit_large_patch14_clip_quickgelu_336.openai"


def default_layers(depth: int) -> list[int]:
    """Structural layers by default: the blocks after 5/12 and 8/12 of the depth (ours, measured).

    Args:
        depth (int): Number of blocks of the backbone.

    Returns:
        list[int]: 0-based block indices.

    Example:
        >>> default_layers(12), default_layers(24)
        ([4, 7], [9, 15])
    """
    return [round(depth * share / 12) - 1 for share in (5, 8)]


class LAKEModel(nn.Module):
    """Frozen backbone, sensitive neurons, normality bank and, for CLIP, two text embeddings.

    In training mode a forward pass stores the patch tokens of normal images; :meth:`fit` then chooses the neurons and
    fills the bank. In evaluation mode a forward pass returns anomaly maps and scores. Nothing is trained.

    Memory and the time per test image do not grow with the number of normal images. The first 32 are kept with all
    their channels (ours), and decide the neurons. Of the others only those neurons are kept, and of all images only
    what the banks have room for; see :class:`NormalityBank` and :meth:`memory_need`.

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
        image_size (tuple[int, int] | None): Height and width images are expected to have. Others work, slightly slower.
            ``None`` is the size the weights were trained with.
        num_neurons (int): Sensitive neurons per layer, K, at least 2. Defaults to 100 (paper).
        selection (str): Rule that chooses them: ``"variance"`` (paper), or a control: ``"random"``, ``"lowest"``,
            ``"pca"``, ``"all"``. See :class:`SensitiveNeurons`.
        normalization (str): Bring tokens to unit length ``"after"`` the selection (ours), ``"before"``, or ``"none"``.
        bank_size (int | None): Most tokens per layer in the bank of single patches; that of windows has room for
            half as many (of 3x3), a third (of 5x5). ``None`` keeps all. Defaults to 5504 (ours).
        num_neighbors (int): Nearest tokens of the bank whose distances are averaged. Defaults to 1 (ours);
            more help where good parts vary more than the images show, and forget the one that is taken alike.
        num_rotations (int): Directions in which each normal image goes into the bank: 8 takes it as it is and rotated
            by 45, 90, ... degrees, for parts that may lie in any direction. Defaults to 1 (ours), as it is only.
        num_shifts (int): Places on the grid of patches, along height and along width, at which each of 2 to 16 normal
            images goes into the bank: 2 takes it as it is and shifted by half a patch down, right, and both. Not with
            one image or over 16, nor beside rotated copies. Defaults to 2 (ours); 1 takes it as it is (paper).
        place_weight (float | None): Weight of the squared distance between the places of patches, 1 being the image's
            longer side, beside that of their tokens. ``None`` is 10 where the normal images show that parts lie in
            place, else 0 (ours), see :class:`Places`; 0 compares patches wherever they lie (paper). Not with one image.
        own_weight (float): Weight of a patch's distance to the rest of its own image beside that to the bank, in
            [0, 1]. Defaults to 0.3 (ours); 0 compares with the bank alone (paper).
        top_patches (int): Highest patches whose mean is the image's score. Defaults to 3 (ours); 1 takes the maximum
            (paper).
        text_weight (float | None): Weight of the semantic activation, in [0, 1]. ``None`` is 0.3 (paper) for CLIP and 0
            for a backbone without text; 0 turns the text side off.
        normal_prompts (Sequence[str] | None): Descriptions of normal images. ``None`` takes WinCLIP's (ours).
        anomalous_prompts (Sequence[str] | None): Descriptions of anomalous ones. ``None`` takes WinCLIP's (ours).
        temperature (float): Softmax temperature of the semantic activation. Defaults to 0.07 (ours).
        sigma (float): Gaussian smoothing of the map in pixels; 0 for none. Defaults to 4 (ours). The score is taken
            before smoothing.

    Attributes:
        pixel_aspect (float): Width over height of what a pixel of the normal images shows; other than 1 where they were
            squeezed. Rotations take note of it.

    Raises:
        ValueError: If an argument is out of range, or text is asked of a backbone that has none.

    Example:
        >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, num_neurons=20)
        >>> _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> _ = model.fit()
        >>> batch = model.eval()(torch.randn(3, 3, 64, 64))
        >>> batch.anomaly_map.shape, batch.pred_score.shape
        (torch.Size([3, 1, 64, 64]), torch.Size([3]))
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        scales: Sequence[int] = (1, 3),
        semantic_layer: int = -1,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
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
        normal_prompts: Sequence[str] | None = None,
        anomalous_prompts: Sequence[str] | None = None,
        temperature: float = 0.07,
        sigma: float = 4.0,
    ) -> None:
        super().__init__()
        depth = num_blocks(backbone)
        if text_weight is None:
            text_weight = 0.3 if is_clip(backbone) else 0.0
        if not 0 <= text_weight <= 1:
            msg = f"text_weight={text_weight} must lie in [0, 1]; 0 turns the text side off."
            raise ValueError(msg)
        if text_weight > 0 and not is_clip(backbone):
            msg = (
                f"text_weight={text_weight} needs a CLIP backbone, and '{backbone}' has no text tower. Leave "
                "text_weight out (it is 0 then), or choose one of timm.list_models('vit_*_clip_*')."
            )
            raise ValueError(msg)
        if not 0 < temperature < math.inf:
            msg = f"temperature={temperature} must be a positive number."
            raise ValueError(msg)
        if not 0 <= own_weight <= 1:
            msg = f"own_weight={own_weight} must lie in [0, 1]; 0 compares with the bank alone."
            raise ValueError(msg)
        if num_rotations < 1:
            msg = f"num_rotations={num_rotations} must be at least 1, which takes normal images as they are."
            raise ValueError(msg)
        if top_patches < 1:
            msg = f"top_patches={top_patches} must be at least 1, which takes the highest patch."
            raise ValueError(msg)
        layers = list(layers) if layers is not None else default_layers(depth)
        if not layers:
            msg = "layers=[] is empty; give at least one block, or leave it out."
            raise ValueError(msg)
        if not -depth <= semantic_layer < depth:
            msg = f"semantic_layer={semantic_layer} must be one of the blocks 0 to {depth - 1}, or -{depth} to -1."
            raise ValueError(msg)
        if not scales or any(scale < 1 or scale % 2 == 0 for scale in scales):
            msg = f"scales={list(scales)} must be odd positive numbers, at least one; 1 compares single patches."
            raise ValueError(msg)
        self.backbone = Backbone(
            name=backbone,
            layers=[*layers, semantic_layer] if text_weight > 0 else layers,
            pre_trained=pre_trained,
            weights=weights,
            image_size=image_size,
            norm=False,
        )
        if not 1 <= num_shifts <= self.backbone.patch_size:
            msg = (
                f"num_shifts={num_shifts} must lie between 1, which takes normal images as they are, and "
                f"{self.backbone.patch_size}, the pixels of a patch."
            )
            raise ValueError(msg)
        self.layers: list[int] = sorted({layer % depth for layer in layers})
        self.scales: list[int] = sorted(set(scales))
        grid = [-(-side // self.backbone.patch_size) for side in self.backbone.image_size]
        if self.scales[-1] > min(grid):
            msg = (
                f"scales={self.scales} must not exceed the {grid[0]}x{grid[1]} patches of an image. Leave the larger "
                "ones out, or raise image_size."
            )
            raise ValueError(msg)
        self.semantic_layer = semantic_layer % depth
        if num_neurons > self.backbone.embed_dim and selection != "all":
            msg = f"num_neurons={num_neurons} exceeds the {self.backbone.embed_dim} channels of '{backbone}'."
            raise ValueError(msg)
        self.text_weight = text_weight
        self.normal_prompts = normal_prompts
        self.anomalous_prompts = anomalous_prompts
        if text_weight > 0:
            prompts("object", normal_prompts, anomalous_prompts)  # a mistake in them shows now, not after the images
        self.temperature = temperature
        self.neurons: ModuleList[SensitiveNeurons] = ModuleList(
            SensitiveNeurons(num_neurons, selection, normalization) for _ in self.layers
        )
        # One per layer and scale; a larger scale keeps fewer windows of an image.
        sizes = [None if bank_size is None else -(-bank_size // stride_of(scale)) for scale in self.scales]
        self.banks: ModuleList[ModuleList[NormalityBank]] = ModuleList(
            ModuleList(NormalityBank(size, num_neighbors) for size in sizes) for _ in self.layers
        )
        self.num_rotations = num_rotations
        self.num_shifts = num_shifts
        self.places = Places(place_weight, num_rotations)
        self.pixel_aspect = 1.0
        self.own_weight = own_weight
        self.top_patches = top_patches
        self.own_images: ModuleList[ModuleList[OwnImage]] = ModuleList(
            ModuleList(OwnImage() for _ in self.scales if own_weight > 0) for _ in self.layers
        )
        # Row 0 normal, row 1 anomalous.
        self.register_buffer("text_embeddings", torch.zeros(2, self.backbone.vit.num_classes if text_weight > 0 else 0))
        self.text_embeddings: torch.Tensor
        self.anomaly_map_generator = AnomalyMapGenerator(self.backbone.patch_size, sigma, self.backbone.image_size)
        self.forget()
        self._checkpoint: dict[str, torch.Tensor] | None = None

    @property
    def is_fitted(self) -> bool:
        """Whether the banks are filled."""
        return all(len(bank.tokens) > 0 for bank in self._all_banks())

    def _all_banks(self) -> list[NormalityBank]:
        return [bank for banks in self.banks for bank in banks]

    def forget(self) -> None:
        """Forget stored tokens, for instance those of a fit that failed."""
        self.num_stored = 0  # normal images
        self._stored: list[list[torch.Tensor]] = [[] for _ in self.layers]
        self._semantic: list[torch.Tensor] = []
        self._references: list[int] = []  # reference images, whose distances to the others are the scale
        self._projected: list[torch.Tensor] = []  # tokens of the first images in the chosen neurons, by layer
        self._uncopied: dict[int, tuple[torch.Tensor, float]] = {}  # images by number, and their pixels' aspect
        for bank in self._all_banks():
            bank.forget()
        self._grid: tuple[int, int] = (0, 0)
        self._size: tuple[int, int] = (0, 0)

    def num_copies(self, images: int) -> int:
        """Copies of each of so many normal images, see :func:`~anomalib_lake.copies.num_copies`."""
        return num_copies(images, self.num_rotations, self.num_shifts)

    def memory_need(self, images: int) -> int:
        """Memory that learning takes beside the backbone: what is kept, and as much again while it is worked on.

        Args:
            images (int): Normal images.

        Returns:
            int: About so many bytes, at most.

        Example:
            >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], pre_trained=False, num_neurons=20)
            >>> model.memory_need(10_000) == model.memory_need(1000)
            True
        """
        rows, columns = (-(-side // self.backbone.patch_size) for side in self.backbone.image_size)
        width = self.backbone.embed_dim
        kept = width if self.neurons[0].selection == "all" else self.neurons[0].count
        blocks = len(self.layers) + (self.text_weight > 0) + 1  # one more while they are put together
        values = min(images, SAMPLE) * rows * columns * (width * blocks + kept * len(self.layers))
        copies = self.num_copies(images)
        if copies:  # images that wait for the neurons; copies of the reference images, at all scales
            values += min(images, SAMPLE) * 3 * math.prod(self.backbone.image_size)
            references = len(reference_images(images)) * (1 + copies)
            values += len(self.layers) * sum(
                references * rows * columns // stride_of(scale) ** 2 * kept for scale in self.scales
            )
        for scale, bank in zip(self.scales, self.banks[0], strict=True):
            of_image = -(-rows // stride_of(scale)) * -(-columns // stride_of(scale)) * self.num_rotations
            tokens = images * of_image if bank.size is None else min(images * of_image, 2 * bank.size + of_image)
            values += len(self.layers) * tokens * kept
        return 2 * 4 * values

    def compare_with_bank_only(self) -> None:
        """Score as the paper does: the distance to the bank alone, and its maximum over patches."""
        self.own_weight, self.top_patches = 0.0, 1
        self.own_images = ModuleList(ModuleList() for _ in self.layers)

    def forward(self, images: torch.Tensor) -> InferenceBatch | torch.Tensor:
        """Store the tokens of normal images (training mode) or find anomalies (evaluation mode).

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``, or grey ones ``(B, 1, H, W)``.

        Returns:
            InferenceBatch | torch.Tensor: ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, 1, H, W)``, both in [0, 1];
            in training mode the last structural layer's patch tokens ``(B, N, D)``.

        Raises:
            ValueError: If a normal image has another size than those before (training mode).
            RuntimeError: If there is no bank yet (evaluation mode).
        """
        if self.training:
            return self._store(images)
        if not torch.compiler.is_compiling() and not self.is_fitted:
            msg = "LAKE has no normality bank yet. Train it on a few normal images, or give a checkpoint (--ckpt_path)."
            raise RuntimeError(msg)
        tokens, grid = self.tokens(images)
        return self.score(tokens, grid, (images.shape[-2], images.shape[-1]))

    def score(
        self,
        tokens: dict[int, torch.Tensor],
        grid: tuple[int, int],
        image_size: tuple[int, int],
        left_out: int | None = None,
    ) -> InferenceBatch:
        """Find anomalies by tokens that the backbone has computed.

        Args:
            tokens (dict[int, torch.Tensor]): Raw tokens ``(B, N, D)`` by block.
            grid (tuple[int, int]): Rows and columns of patches.
            image_size (tuple[int, int]): Height and width of the images.
            left_out (int | None): The number of the single image, if it is one of the normal ones; it is compared with
                the others then, see :meth:`NormalityBank.leave_out`. ``None`` for new images.

        Returns:
            InferenceBatch: As of a forward pass in evaluation mode.
        """
        semantic = tokens[self.semantic_layer] if self.text_weight > 0 else None
        with full_precision(self.text_embeddings.device):
            return self._predict(self.structural_deviation(tokens, grid, left_out), semantic, grid, image_size)

    def _predict(
        self,
        deviation: torch.Tensor,
        semantic: torch.Tensor | None,
        grid: tuple[int, int],
        image_size: tuple[int, int],
    ) -> InferenceBatch:
        """Scores and maps from deviations ``(B, N)`` and, where text has a weight, semantic tokens ``(B, N, D)``."""
        # Ordinary patches deviate by less than 1. This map keeps the order and stays below 1.
        anomaly = deviation / (1 + deviation)
        if semantic is not None:
            anomaly = torch.lerp(anomaly, self.semantic_activation(semantic), self.text_weight)
        patch_map = rearrange(anomaly, "b (h w) -> b h w", h=grid[0])
        anomaly_map = self.anomaly_map_generator(patch_map, image_size)
        highest = anomaly.topk(min(self.top_patches, anomaly.shape[1]), dim=1).values
        return InferenceBatch(pred_score=highest.mean(dim=1), anomaly_map=anomaly_map)

    def tokens(self, images: torch.Tensor) -> tuple[dict[int, torch.Tensor], tuple[int, int]]:
        """Compute raw patch tokens.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.

        Returns:
            tuple[dict[int, torch.Tensor], tuple[int, int]]: Tokens ``(B, N, D)`` by block, and the patch grid.
        """
        tokens = self.backbone(images)
        return dict(zip(self.backbone.layers, tokens.patches, strict=True)), tokens.grid

    def structural_deviation(
        self, tokens: dict[int, torch.Tensor], grid: tuple[int, int], left_out: int | None = None
    ) -> torch.Tensor:
        """Compute how far patches deviate from the normality bank, and from the rest of their image.

        Args:
            tokens (dict[int, torch.Tensor]): Raw tokens ``(B, N, D)`` by block.
            grid (tuple[int, int]): Rows and columns of patches.
            left_out (int | None): As of :meth:`score`.

        Returns:
            torch.Tensor: Distance over the usual one, averaged over layers, the largest over scales, ``(B, N)``.
        """
        projected = [neurons.project(tokens[layer]) for layer, neurons in zip(self.layers, self.neurons, strict=True)]
        return self._deviation(projected, grid, left_out)

    def _deviation(
        self, projected: Sequence[torch.Tensor], grid: tuple[int, int], left_out: int | None = None
    ) -> torch.Tensor:
        """The same by projected tokens ``(B, N, K)`` of the layers."""
        by_layer = []
        for number, (of_layer, neurons) in enumerate(zip(projected, self.neurons, strict=True)):
            by_scale = []
            for window, scale in enumerate(self.scales):
                averaged = neurons.normalize(average_neighbors(of_layer, grid, scale))
                bank, placed = self.banks[number][window], self.places(averaged, number, grid)
                if left_out is None:
                    deviation = bank(placed)
                else:
                    deviation = bank.leave_out(placed, left_out, grid, stride_of(scale))
                if self.own_weight > 0:
                    own = self.own_images[number][window](averaged, grid, stride_of(scale))
                    deviation = torch.lerp(deviation, own, self.own_weight)
                by_scale.append(deviation)
            by_layer.append(torch.stack(by_scale))
        return torch.stack(by_layer).mean(dim=0).amax(dim=0)

    def semantic_activation(self, patches: torch.Tensor) -> torch.Tensor:
        """Compute how far patches lean to the anomalous text.

        Args:
            patches (torch.Tensor): Raw tokens of the semantic layer ``(B, N, D)``.

        Returns:
            torch.Tensor: Softmax share of the anomalous text in [0, 1], ``(B, N)``.
        """
        similarity = F.normalize(self.backbone.embed(patches), dim=-1) @ self.text_embeddings.T
        return torch.softmax(similarity / self.temperature, dim=-1)[..., 1]

    def _store(self, images: torch.Tensor) -> torch.Tensor:
        if self.text_weight > 0 and not self.backbone.has_weights:
            self._checkpoint = self._load_checkpoint()
        tokens, grid = self.tokens(images)
        start = self.num_stored
        if self.num_rotations > 1 or start < FEW:
            self._uncopied |= {number: (image, self.pixel_aspect) for number, image in enumerate(images, start)}
        self.store(tokens, grid, (images.shape[-2], images.shape[-1]))
        if self.num_stored > 1 and not self.num_copies(self.num_stored):  # nor will there be with more of them
            self._uncopied = {}
        for number in [number for number in self._uncopied if self._references and number not in self._references]:
            self._add_copies(number, self.copies(*self._uncopied.pop(number)))
        return tokens[self.layers[-1]]

    @torch.no_grad()
    def store(self, tokens: dict[int, torch.Tensor], grid: tuple[int, int], image_size: tuple[int, int]) -> None:
        """Store the tokens of normal images for :meth:`fit`.

        Args:
            tokens (dict[int, torch.Tensor]): Raw tokens ``(B, N, D)`` by block.
            grid (tuple[int, int]): Rows and columns of patches.
            image_size (tuple[int, int]): Height and width of the images.

        Raises:
            ValueError: If they have another size than those before, tokens are not finite, or those before do not vary.
        """
        if self.num_stored and grid != self._grid:
            msg = f"Normal images must have one size: after {self._grid} patches came {grid}."
            raise ValueError(msg)
        check_finite(tokens, self.num_stored)
        if not self.num_stored:  # a bank of an earlier fit, in other neurons
            for bank in self._all_banks():
                bank.tokens = bank.tokens[:0]
        self._grid, self._size = grid, image_size
        start, room = self.num_stored, max(SAMPLE - self.num_stored, 0)
        self.num_stored += len(tokens[self.layers[0]])
        if room:
            for layer, stored in zip(self.layers, self._stored, strict=True):
                stored.append(tokens[layer][:room])
            if self.text_weight > 0:
                self._semantic.append(tokens[self.semantic_layer][:room])
        if self.num_stored > SAMPLE:
            if not self._references:
                self._choose_neurons()
            numbers = range(max(start, SAMPLE), self.num_stored)
            with full_precision(self.text_embeddings.device):
                for number, (layer, neurons) in enumerate(zip(self.layers, self.neurons, strict=True)):
                    self._add(number, neurons.project(tokens[layer][room:]), numbers)

    def _choose_neurons(self) -> None:
        """Choose them by what is stored, which then goes into the banks, but for the reference images."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        images = sum(map(len, self._stored[0]))
        self._references = reference_images(images)
        others = [number for number in range(images) if number not in self._references]
        with full_precision(self.text_embeddings.device):
            for number, neurons in enumerate(self.neurons):
                tokens = torch.cat(self._stored[number])
                self._stored[number] = []
                neurons.select(tokens.flatten(0, 1), generator)
                self._projected.append(neurons.project(tokens))
            normalized = [
                neurons.normalize(projected) for neurons, projected in zip(self.neurons, self._projected, strict=True)
            ]
            self.places.fit(normalized, self._grid, self._references)
            for number, projected in enumerate(self._projected):
                self._add(number, projected[others], others)
        if self.text_weight > 0:
            self._semantic = [torch.cat(self._semantic)]

    def _add(self, number: int, projected: torch.Tensor, images: Sequence[int]) -> None:
        """Add the projected tokens ``(B, N, K)`` of images to the banks of a layer."""
        for scale, bank in zip(self.scales, self.banks[number], strict=True):
            averaged = self.neurons[number].normalize(average_neighbors(projected, self._grid, scale))
            bank.add(self.places(averaged, number, self._grid), images, self._grid, stride_of(scale))

    def copies(self, image: torch.Tensor, pixel_aspect: float = 1.0) -> list[list[Copies]]:
        """Compute tokens of the rotated or shifted copies of a normal image, in the neurons that have been chosen.

        Args:
            image (torch.Tensor): Normalised image ``(3, H, W)``.
            pixel_aspect (float): As :attr:`pixel_aspect`.

        Returns:
            list[list[Copies]]: By layer and scale, the tokens of all windows that lie inside the image, ``(M, K)`` or
            where places count ``(M, K + 2)``, and the patches ``(M,)`` of the image that they show.
        """
        found: list[list[list[Copies]]] = [[[] for _ in self.scales] for _ in self.layers]
        size = (image.shape[-2], image.shape[-1])
        ways = views(size, self.backbone.patch_size, self.num_rotations, self.num_shifts, pixel_aspect)
        for start in range(0, len(ways), BATCH):
            batch = ways[start : start + BATCH]
            tokens, grid = self.tokens(torch.stack([show(image) for show, _ in batch]))
            with full_precision(image.device):
                for number, (neurons, by_scale) in enumerate(zip(self.neurons, found, strict=True)):
                    projected = neurons.project(tokens[self.layers[number]])
                    for scale, copies in zip(self.scales, by_scale, strict=True):
                        averaged = neurons.normalize(average_neighbors(projected, grid, scale))
                        kept = kept_patches(grid, stride_of(scale))
                        for (_, patches), copy in zip(batch, averaged, strict=True):
                            shown, inside = patches(grid, scale=scale)
                            windows = kept[inside[kept]]
                            at = shown[windows].to(copy.device)
                            copies.append((self.places(copy[windows.to(copy.device)], number, grid, at), at))
        return [[_of_all_views(copies) for copies in by_scale] for by_scale in found]

    @torch.no_grad()
    def _add_copies(self, number: int, copies: list[list[Copies]]) -> None:
        """Take copies of an image into the banks, which hold the image already."""
        with full_precision(self.text_embeddings.device):
            for banks, by_scale in zip(self.banks, copies, strict=True):
                for bank, (tokens, patches) in zip(banks, by_scale, strict=True):
                    bank.add_image(tokens, patches, number)

    def _load_checkpoint(self) -> dict[str, torch.Tensor]:
        """Read the OpenCLIP checkpoint once: give its vision part to the backbone, and return the rest."""
        state, source = read_checkpoint(self.backbone.name, self.backbone.weights)
        self.backbone.load_state(state, source)
        return _text_side(state)

    def _load_text_side(self) -> dict[str, torch.Tensor]:
        """Read the text side of a backbone that has its weights, which must be of the same checkpoint."""
        state, source = read_checkpoint(self.backbone.name, self.backbone.weights)
        other = copy.deepcopy(self.backbone)
        other.load_state(state, source)
        if other.fingerprint() != self.backbone.fingerprint():
            msg = (
                f"The backbone's weights are not those of '{source}', so its text says nothing of them. Give the file "
                "that the model was first fitted with as weights=<file>."
            )
            raise ValueError(msg)
        return _text_side(state)

    def fit(self, class_name: str = "object") -> InferenceBatch:
        """Choose the sensitive neurons and fill the banks from the stored tokens, embed the prompts, forget the tokens.

        Args:
            class_name (str): What the images show, for WinCLIP's prompts.

        Returns:
            InferenceBatch: What the normal images, at most the first 32 of them, get when each is compared with what
            the bank holds of the others: an estimate of what a new good image gets.

        Raises:
            ValueError: If nothing was stored, or the normal images do not vary. What was stored is forgotten then, too.
        """
        try:
            return self._fit(class_name)
        finally:
            self.forget()

    def _fit(self, class_name: str) -> InferenceBatch:
        if not self.num_stored:
            msg = "LAKE has no normal images to learn from. Is the training set empty?"
            raise ValueError(msg)
        # Validation hooks, where Lightning may call this, run in inference mode; its tensors could not be loaded over.
        device = self.text_embeddings.device
        with torch.inference_mode(mode=False), torch.no_grad():
            if not self._references:
                self._choose_neurons()
            copies: list[list[list[Copies]]] = []
            if self.num_copies(self.num_stored):
                if not self._uncopied.keys() >= set(self._references):
                    name = "num_rotations" if self.num_rotations > 1 else "num_shifts"
                    msg = (
                        f"{name}={getattr(self, name)} needs images: tokens alone have no copies. Pass images "
                        f"in training mode, or give {name}=1."
                    )
                    raise ValueError(msg)
                for number in tqdm(list(self._uncopied), "copies of normal images", unit="image", delay=3):
                    of_image = self.copies(*self._uncopied.pop(number))
                    if number in self._references:
                        copies.append(of_image)
                    else:
                        self._add_copies(number, of_image)
        with torch.inference_mode(mode=False), torch.no_grad(), full_precision(device):
            if self.text_weight > 0:
                ensembles = prompts(class_name, self.normal_prompts, self.anomalous_prompts)
                checkpoint = self._checkpoint or self._load_text_side()
                tower = text_tower(checkpoint, quick_gelu="quickgelu" in self.backbone.name)
                self.text_embeddings = embed_prompts(tower, *ensembles).to(device)
                self._checkpoint = None
            for layer, (neurons, banks) in enumerate(zip(self.neurons, self.banks, strict=True)):
                projected = self._projected[layer][self._references]
                for window, (scale, bank) in enumerate(zip(self.scales, banks, strict=True)):
                    averaged = neurons.normalize(average_neighbors(projected, self._grid, scale))
                    of_window = [of_image[layer][window] for of_image in copies] or None
                    # Shifted copies show nothing that the images do not, so the bank need not grow by them.
                    own = self.num_stored * len(kept_patches(self._grid, stride_of(scale)))
                    most = own if self.num_rotations == 1 else None
                    placed = self.places(averaged, layer, self._grid)
                    bank.fit(placed, self._grid, stride_of(scale), self._references, of_window, most)
                    if self.own_weight > 0:
                        own_image = self.own_images[layer][window]
                        own_image.fit(averaged, self._grid, stride_of(scale), least=bank.distance_scale)
            return self._left_out()

    def _left_out(self) -> InferenceBatch:
        """Predictions of the first normal images, each compared with the others."""
        found = []
        numbers = range(len(self._projected[0]))
        for number in tqdm(numbers, "each normal image against the others", unit="image", delay=3):
            one = slice(number, number + 1)
            deviation = self._deviation([projected[one] for projected in self._projected], self._grid, number)
            semantic = self._semantic[0][one] if self.text_weight > 0 else None
            found.append(self._predict(deviation, semantic, self._grid, self._size))
        return joined(found)


def joined(predictions: Sequence[InferenceBatch]) -> InferenceBatch:
    """Scores and maps of several batches in one."""
    scores, maps = ([getattr(batch, name) for batch in predictions] for name in ("pred_score", "anomaly_map"))
    return InferenceBatch(pred_score=torch.cat(scores), anomaly_map=torch.cat(maps))


def check_finite(tokens: dict[int, torch.Tensor], first: int) -> None:
    """Refuse the tokens of normal images that are not finite.

    Args:
        tokens (dict[int, torch.Tensor]): Raw tokens ``(B, N, D)`` by block.
        first (int): Number of the first image.

    Raises:
        ValueError: If a token is not finite; the message gives the numbers of the images.

    Example:
        >>> check_finite({3: torch.zeros(2, 4, 8)}, first=0)
    """
    finite = torch.stack([of_layer.isfinite().flatten(1).all(dim=1) for of_layer in tokens.values()]).all(dim=0)
    if not finite.all():
        numbers = ", ".join(str(first + index + 1) for index in (~finite).nonzero().flatten().tolist())
        msg = (
            f"The tokens of normal images (number {numbers}) are not finite numbers. Check the images and the "
            "backbone's weights, or fit in single precision (--trainer.precision 32)."
        )
        raise ValueError(msg)


def _text_side(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in state.items() if not key.startswith("visual.")}


def _of_all_views(copies: list[Copies]) -> Copies:
    """Those of all views in one."""
    tokens, patches = zip(*copies, strict=True)
    return torch.cat(tokens), torch.cat(patches)
