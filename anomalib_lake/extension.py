# SPDX-License-Identifier: Apache-2.0

"""Further good images for a bank that is filled, for instance parts that were rejected and are good."""

from pathlib import Path
from typing import Any

import torch
from anomalib.data import InferenceBatch

from anomalib_spg.components.own_image import kept_patches
from anomalib_spg.components.precision import full_precision
from anomalib_spg.explanations.examples import EXAMPLES, Examples, digest

from .bank import NormalityBank, average_neighbors, k_center_greedy, stride_of
from .torch_model import LAKEModel, check_finite, joined

MOST = 24  # new images that are compared with all the others; until then their tokens are kept
# How many times its size a bank may have then (ours): what it knew keeps its tokens, so that no score rises by it.
GROWTH = 2


class Extension:
    """Takes good images into the banks of a fitted model, which stays as it is otherwise.

    The neurons, and the distances that count as 1, stay those of the images the model was fitted on: of these no more
    is known than what the banks hold. A bank may grow to twice its ``bank_size`` by further images; until then it keeps
    all its tokens, a patch deviates at most as much as before, and no image's score rises. Beyond, it is thinned to a
    coreset of that size.

    Args:
        model (LAKEModel): Fitted model.
        first (int): Number of the first new image; smaller ones belong to the images it was fitted on. Defaults to the
            number after the highest in the banks.

    Attributes:
        next (int): Number of the next image.

    Raises:
        RuntimeError: If the model is not fitted.

    Example:
        >>> model = LAKEModel("vit_tiny_patch16_224", layers=[5], scales=[1], pre_trained=False, num_neurons=20)
        >>> _ = model.train()(torch.randn(2, 3, 64, 64))
        >>> _ = model.fit()
        >>> extension = Extension(model)
        >>> extension.add(torch.randn(3, 3, 64, 64))
        >>> extension.left_out().pred_score.shape
        torch.Size([3])
        >>> extension.finish()
        >>> len(model.banks[0][0].tokens)
        80
    """

    def __init__(self, model: LAKEModel, first: int = 0) -> None:
        if not model.is_fitted:
            msg = "LAKE has no normality bank yet that could take in further images. Train it first."
            raise RuntimeError(msg)
        self.model = model
        known = max(int(bank.image_indices.max()) for banks in model.banks for bank in banks) + 1
        self.next = max(first, known)
        self._kept: list[tuple[int, dict[int, torch.Tensor]]] = []  # numbers of images, and their tokens
        self._grid: tuple[int, int] = (0, 0)
        self._size: tuple[int, int] = (0, 0)

    @torch.no_grad()
    def add(self, images: torch.Tensor) -> None:
        """Take images in.

        Args:
            images (torch.Tensor): Normalised good images ``(B, 3, H, W)``, of the size of those before.

        Raises:
            ValueError: If they have another size than those before, or tokens are not finite.
        """
        numbers = torch.arange(self.next, self.next + len(images), device=images.device)
        model = self.model
        # Validation hooks, where Lightning may call this, run in inference mode; its tensors could not be loaded over.
        with torch.inference_mode(mode=False):
            tokens, grid = model.tokens(images)
            if self._kept and grid != self._grid:
                msg = f"Normal images must have one size: after {self._grid} patches came {grid}."
                raise ValueError(msg)
            check_finite(tokens, self.next)
            with full_precision(images.device):
                for number, (neurons, banks) in enumerate(zip(model.neurons, model.banks, strict=True)):
                    projected = neurons.project(tokens[model.layers[number]])
                    for scale, bank in zip(model.scales, banks, strict=True):
                        averaged = neurons.normalize(average_neighbors(projected, grid, scale))
                        kept = kept_patches(grid, stride_of(scale), images.device)
                        placed = model.places(averaged, number, grid)
                        _append(bank, placed[:, kept].flatten(0, 1), kept.repeat(len(images)), numbers)
            if model.num_rotations > 1:
                for one, image in zip(numbers.split(1), images, strict=True):
                    for banks, by_scale in zip(model.banks, model.copies(image, model.pixel_aspect), strict=True):
                        for bank, (copies, patches) in zip(banks, by_scale, strict=True):
                            _append(bank, copies, patches, one)
        self._grid, self._size = grid, (images.shape[-2], images.shape[-1])
        self._kept += [
            (self.next + index, {layer: patches[index : index + 1].clone() for layer, patches in tokens.items()})
            for index in range(min(len(images), MOST - len(self._kept)))
        ]
        self.next += len(images)

    @torch.no_grad()
    def left_out(self) -> InferenceBatch:
        """Compare the first 24 new images with all images but themselves.

        Returns:
            InferenceBatch: An estimate of what further parts like them get, corrected as in :meth:`LAKEModel.fit`.

        Raises:
            ValueError: If there are no new images.
        """
        if not self._kept:
            msg = "There are no further normal images to take in."
            raise ValueError(msg)
        with torch.inference_mode(mode=False):
            return joined([
                self.model.score(tokens, self._grid, self._size, left_out=number) for number, tokens in self._kept
            ])

    @torch.no_grad()
    def finish(self) -> None:
        """Thin banks that have outgrown twice their size, and forget the tokens."""
        self._kept = []
        with torch.inference_mode(mode=False):
            for banks in self.model.banks:
                for bank in banks:
                    _thin(bank)


def read_fitted(path: str | Path) -> dict[str, Any]:
    """Read the checkpoint of a fitted LAKE.

    Args:
        path (str | Path): File.

    Returns:
        dict[str, Any]: Checkpoint, on the CPU.

    Raises:
        ValueError: If it cannot be read, or is of something else.
    """
    remedy = "Training LAKE leaves one as weights/lightning/model.ckpt in its results folder."
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exception:  # the bytes of another file raise anything
        reason = str(exception).splitlines()[0] if str(exception) else type(exception).__name__
        msg = f"Cannot read the checkpoint extend='{path}': {reason}. {remedy}"
        raise ValueError(msg) from exception
    if not isinstance(checkpoint, dict) or "model.neurons.0.indices" not in checkpoint.get("state_dict", {}):
        msg = f"extend='{path}' is no checkpoint of LAKE. {remedy}"
        raise ValueError(msg)
    return checkpoint


def earlier_images(model: LAKEModel, checkpoint: str | Path) -> dict[int, bytes]:
    """Normal images that were kept for explanations beside a checkpoint.

    Args:
        model (LAKEModel): The model of the checkpoint.
        checkpoint (str | Path): Its file.

    Returns:
        dict[int, bytes]: JPEG files by the number of the image; none where there are none of this model.
    """
    for folder in list(Path(checkpoint).absolute().parents)[:2]:  # weights/lightning/model.ckpt, or moved together
        if (folder / EXAMPLES).is_file():
            examples = Examples.load(folder / EXAMPLES)
            return examples.images if examples.learned == digest(model) else {}
    return {}


def _append(bank: NormalityBank, tokens: torch.Tensor, patches: torch.Tensor, numbers: torch.Tensor) -> None:
    """Add tokens ``(M, K)`` of patches ``(M,)``, as many of each image; in between a bank holds twice what it keeps."""
    bank.tokens = torch.cat([bank.tokens, tokens])
    bank.image_indices = torch.cat([bank.image_indices, numbers.repeat_interleave(len(tokens) // len(numbers))])
    bank.patch_indices = torch.cat([bank.patch_indices, patches])
    if bank.size is not None and len(bank.tokens) > 2 * GROWTH * bank.size:
        _thin(bank)


def _thin(bank: NormalityBank) -> None:
    """Reduce a bank to a coreset of the size that it may have."""
    if bank.size is None or len(bank.tokens) <= GROWTH * bank.size:
        return
    coreset, _ = k_center_greedy(bank.tokens, GROWTH * bank.size)
    for name in ("tokens", "image_indices", "patch_indices"):
        setattr(bank, name, getattr(bank, name)[coreset])
