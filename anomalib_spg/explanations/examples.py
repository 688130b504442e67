# SPDX-License-Identifier: Apache-2.0

"""Training images kept for explanations, and the atoms' max-activating patches in them."""

import hashlib
import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.nn import functional as F  # noqa: N812

from anomalib_spg.components.files import load_tensors, save_tensors

logger = logging.getLogger(__name__)

EXAMPLES = "examples.safetensors"  # name of the file
FILE_FORMAT = "anomalib_spg.explanations.examples"


def to_picture(image: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Denormalise an image.

    Args:
        image (torch.Tensor): Normalised image ``(3, H, W)``, or a grey one ``(1, H, W)``.
        mean (Sequence[float]): Mean of each channel.
        std (Sequence[float]): Standard deviation of each channel.

    Returns:
        np.ndarray: Image ``(H, W, 3)``, 8 bits.

    Example:
        >>> to_picture(torch.zeros(3, 1, 1), mean=[0.5, 0.5, 0.5], std=[0.2, 0.2, 0.2]).tolist()
        [[[128, 128, 128]]]
    """
    image = image.detach().float().cpu()
    pixels = image * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def digest(model: torch.nn.Module) -> str:
    """Hash what a torch model has learned, to tell it apart: numbers of atoms mean nothing in other dictionaries.

    Args:
        model (torch.nn.Module): SPG's or LAKE's torch model. Backbone and smoothing do not count.

    Returns:
        str: 16 hexadecimal digits, the same in every precision from bfloat16 on.

    Example:
        >>> digest(torch.nn.Linear(2, 1)) == digest(torch.nn.Linear(2, 1))
        False
    """
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not name.startswith(("backbone.", "anomaly_map_generator.")):
            rounded = tensor.bfloat16() if tensor.is_floating_point() else tensor
            hashed.update(name.encode() + rounded.float().cpu().numpy().tobytes())
    return hashed.hexdigest()[:16]


def in_proportion(picture: np.ndarray, pixel_aspect: float) -> np.ndarray:
    """Widen or narrow a picture of an image that was squeezed, so that it has the image's proportions.

    Args:
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        pixel_aspect (float): Width over height of what a pixel shows.

    Returns:
        np.ndarray: Picture of the same height.

    Example:
        >>> in_proportion(np.zeros((8, 8, 3), np.uint8), pixel_aspect=1.5).shape
        (8, 12, 3)
    """
    height, width = picture.shape[:2]
    wanted = max(1, round(width * pixel_aspect))
    return picture if wanted == width else np.asarray(Image.fromarray(picture).resize((wanted, height)))


class Examples:
    """A bounded random sample of the training images, as JPEG, and each atom's max-activating patches in them.

    Every image has the same chance to be kept; a resumed run keeps none from before the interruption. The sample has
    its own random generator, so that keeping images does not change what is learned.

    Args:
        limit (int): Maximum number of images. Defaults to 256 (ours), about 15 MB.
        patch_size (int): Side of a patch in pixels.

    Attributes:
        images (dict[int, bytes]): JPEG files by the number of the image, in the order of training.
        grid (tuple[int, int]): Rows and columns of patches.
        patches (dict[tuple[int, int], list[tuple[int, int]]]): For a block and an atom, images and the
            max-activating patches in them, the highest first.
        learned (str): :func:`digest` of the model they belong to; empty before it has learned.
        drawn (bool): Whether synthetic anomalies are drawn on the images.

    Example:
        >>> examples = Examples(patch_size=8)
        >>> examples.add(torch.zeros(2, 3, 32, 48), mean=[0.5] * 3, std=[0.5] * 3)
        >>> examples.crop(number=1, patch=0, window=3).shape
        (24, 24, 3)
    """

    def __init__(self, limit: int = 256, patch_size: int = 16) -> None:
        self.limit = limit
        self.patch_size = patch_size
        self.images: dict[int, bytes] = {}
        self.grid: tuple[int, int] = (0, 0)
        self.patches: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.learned = ""
        self.drawn = False
        self._seen = 0
        self._sources: dict[int, str] = {}
        self._random = np.random.default_rng(0)

    def add(
        self,
        images: torch.Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        start: int | None = None,
        names: Sequence[str] | None = None,
        aspects: Sequence[float] | None = None,
    ) -> None:
        """Sample from a batch.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``.
            mean (Sequence[float]): Mean of each channel.
            std (Sequence[float]): Standard deviation of each channel.
            start (int | None): Number of the first image. ``None`` continues the count.
            names (Sequence[str] | None): Names of the images; what follows the last ``#`` numbers views of one image.
            aspects (Sequence[float] | None): Width over height of what a pixel of each image shows, other than 1 where
                it was squeezed; kept as the pixel density of the JPEG file. ``None`` is 1.
        """
        start = self._seen if start is None else start
        self.grid = (-(-images.shape[-2] // self.patch_size), -(-images.shape[-1] // self.patch_size))
        for number, image in enumerate(images, start):
            self._seen += 1
            if len(self.images) >= self.limit:  # reservoir sampling
                place = int(self._random.integers(self._seen))
                if place >= self.limit:
                    continue
                del self.images[sorted(self.images)[place]]
            aspect = aspects[number - start] if aspects else 1.0
            density = (1000, min(max(round(1000 * aspect), 1), 65535))  # across and down; JPEG's has 16 bits
            file = io.BytesIO()
            Image.fromarray(to_picture(image, mean, std)).save(file, "JPEG", quality=90, dpi=density)
            self.images[number] = file.getvalue()
            if names:
                self._sources[number] = names[number - start].rpartition("#")[0] or names[number - start]

    @torch.no_grad()
    def find(
        self,
        block: int,
        atoms: torch.Tensor,
        atom_indices: torch.Tensor,
        patches: Sequence[torch.Tensor],
        count: int = 4,
    ) -> None:
        """Find each atom's max-activating patches: one product per kept image, no pass through the backbone.

        Args:
            block (int): Block the atoms belong to.
            atoms (torch.Tensor): Unit-norm atoms ``(n, D)``.
            atom_indices (torch.Tensor): Their rows in the dictionary ``(n,)``.
            patches (Sequence[torch.Tensor]): Patch tokens ``(N, D)`` of every training image.
            count (int): Examples per atom, each from another image, not just another view. Defaults to 4.
        """
        numbers = sorted(self.images)
        if not numbers or not len(atoms):
            return
        device = atoms.device
        best = []
        for number in numbers:
            tokens = F.normalize(patches[number].to(device, torch.float32), dim=1)
            best.append((tokens @ atoms.T).max(dim=0))
        values, positions = (torch.stack(parts) for parts in zip(*best, strict=True))
        order, positions = values.argsort(dim=0, descending=True).cpu(), positions.cpu()
        for column, atom in enumerate(atom_indices.tolist()):
            of_sources: dict[int | str, tuple[int, int]] = {}
            for row in order[:, column].tolist():
                number = numbers[row]
                of_sources.setdefault(self._sources.get(number, number), (number, int(positions[row, column])))
                if len(of_sources) == count:
                    break
            self.patches[block, atom] = list(of_sources.values())

    def crop(self, number: int, patch: int, window: int = 5, outline: int = 1) -> np.ndarray | None:
        """Cut out a patch and its surroundings.

        Args:
            number (int): Number of the image.
            patch (int): Number of the patch in it.
            window (int): Side of the cut in patches, odd; shifted to stay inside the image. Defaults to 5.
            outline (int): Side of the outlined square around the patch, in patches, odd. Defaults to 1, the patch.

        Returns:
            np.ndarray | None: Picture with the patch outlined, ``window * patch_size`` high, less if the image has
                fewer patches, and as wide as the proportions of the image ask for; ``None`` if it was not kept.
        """
        if number not in self.images:
            return None
        image = Image.open(io.BytesIO(self.images[number]))
        across, down = image.info.get("jfif_density", (1, 1))
        place = divmod(patch, self.grid[1])
        return in_proportion(
            crop(np.asarray(image), place, self.grid, self.patch_size, window, outline), down / max(across, 1)
        )

    def of(self, block: int, atom: int, window: int = 5) -> list[np.ndarray]:
        """Cut out the example patches of an atom; none if there are none.

        Args:
            block (int): Block.
            atom (int): Row of its dictionary.
            window (int): Side of the cuts in patches. Defaults to 5.

        Returns:
            list[np.ndarray]: Pictures, the highest activation first.
        """
        cuts = (self.crop(number, patch, window) for number, patch in self.patches.get((block, atom), ()))
        return [cut for cut in cuts if cut is not None]

    def save(self, path: str | Path) -> Path | None:
        """Write a safetensors file of what explanations can use: with atoms, only the images of their patches.

        Args:
            path (str | Path): File; folders are created.

        Returns:
            Path | None: The file; ``None``, with a warning, if it cannot be written: that must not fail the run.
        """
        path = Path(path)
        used = {number for places in self.patches.values() for number, _ in places} if self.patches else self.images
        tensors = {f"image.{n}": torch.from_numpy(np.frombuffer(self.images[n], np.uint8).copy()) for n in used}
        tensors["grid"] = torch.tensor([*self.grid, self.patch_size])
        for (block, atom), places in self.patches.items():
            tensors[f"atom.{block}.{atom}"] = torch.tensor(places)
        try:
            save_tensors(path, tensors, {"format": FILE_FORMAT, "learned": self.learned, "drawn": str(self.drawn)})
        except OSError as exception:
            logger.warning("Explanations will lack examples: could not write '%s' (%s).", path, exception)
            return None
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Examples":
        """Read a file written by :meth:`save`.

        Args:
            path (str | Path): File.

        Returns:
            Examples: What was saved.

        Raises:
            ValueError: If the file cannot be read or holds something else.
        """
        try:
            tensors, header = load_tensors(path)
        except OSError as exception:
            msg = f"Cannot read the examples file '{path}': {exception}. Train again with ExplanationVisualizer."
            raise ValueError(msg) from exception
        if header.get("format") != FILE_FORMAT:
            msg = (
                f"'{path}' holds no example images. ExplanationVisualizer leaves them as weights/examples.safetensors."
            )
            raise ValueError(msg)
        fault = _fault(tensors)
        if fault:
            msg = (
                f"The examples file '{path}' is damaged: {fault}. Copy it again, or train again with "
                "ExplanationVisualizer."
            )
            raise ValueError(msg)
        *grid, patch_size = tensors.pop("grid").tolist()
        examples = cls(patch_size=patch_size)
        examples.grid = tuple(grid)
        examples.learned = header.get("learned", "")
        examples.drawn = header.get("drawn") == "True"
        for name, tensor in tensors.items():
            kind, *numbers = name.split(".")
            if kind == "image":
                examples.images[int(numbers[0])] = tensor.numpy().tobytes()
            else:
                examples.patches[int(numbers[0]), int(numbers[1])] = [tuple(place) for place in tensor.tolist()]
        return examples


def _fault(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """What is wrong with the first tensor that no :meth:`Examples.save` writes."""
    grid = tensors.get("grid", torch.empty(0))
    if grid.dtype != torch.int64 or grid.shape != (3,) or (grid < 0).any() or grid[2] == 0:
        return "it has no grid of patches"
    for name, tensor in tensors.items():
        if re.fullmatch(r"image\.\d+", name):
            try:
                fits = tensor.dtype == torch.uint8 and tensor.ndim == 1
                fits = fits and Image.open(io.BytesIO(tensor.numpy().tobytes())).format == "JPEG"
            except OSError:  # PIL's, for what is no image
                fits = False
        elif re.fullmatch(r"atom\.\d+\.\d+", name):
            fits = tensor.dtype == torch.int64 and tensor.ndim == 2 and tensor.shape[1] == 2
            fits = fits and not (tensor < 0).any() and not (tensor[:, 1] >= grid[0] * grid[1]).any()
        else:
            fits = name == "grid"
        if not fits:
            return f"'{name}' is not what it should be"
    return None


def patch_box(place: tuple[int, int], grid: tuple[int, int], patch_size: int, window: int) -> tuple[int, int, int]:
    """Square around a patch, shifted to stay inside the grid.

    Args:
        place (tuple[int, int]): Row and column of the patch.
        grid (tuple[int, int]): Rows and columns of patches.
        patch_size (int): Side of a patch in pixels.
        window (int): Side of the square in patches, odd.

    Returns:
        tuple[int, int, int]: Top, left and side in pixels.

    Example:
        >>> patch_box((0, 4), grid=(8, 8), patch_size=14, window=3)
        (0, 42, 42)
    """
    window = min(window, *grid)
    top, left = (min(max(at - window // 2, 0), size - window) for at, size in zip(place, grid, strict=True))
    return top * patch_size, left * patch_size, window * patch_size


def crop(
    picture: np.ndarray,
    place: tuple[int, int],
    grid: tuple[int, int],
    patch_size: int,
    window: int,
    outline: int = 1,
) -> np.ndarray:
    """Cut out a patch and its surroundings, and outline the patch.

    Args:
        picture (np.ndarray): Picture ``(H, W, 3)``, 8 bits.
        place (tuple[int, int]): Row and column of the patch.
        grid (tuple[int, int]): Rows and columns of patches.
        patch_size (int): Side of a patch in pixels.
        window (int): Side of the cut in patches, odd; shifted to stay inside the picture.
        outline (int): Side of the outlined square around the patch, in patches, odd. Defaults to 1, the patch.

    Returns:
        np.ndarray: Picture of at most ``window * patch_size`` a side.

    Example:
        >>> crop(np.zeros((64, 64, 3), np.uint8), (1, 2), (8, 8), patch_size=8, window=3).shape
        (24, 24, 3)
    """
    top, left, side = patch_box(place, grid, patch_size, window)
    short = [size * patch_size - length for size, length in zip(grid, picture.shape, strict=False)]
    outlined = Image.fromarray(np.pad(picture, ((0, short[0]), (0, short[1]), (0, 0)), mode="edge"))  # whole patches
    y, x, length = patch_box(place, grid, patch_size, outline)
    ImageDraw.Draw(outlined).rectangle((x, y, x + length - 1, y + length - 1), outline=(255, 210, 0))
    return np.asarray(outlined)[top : top + side, left : left + side]
