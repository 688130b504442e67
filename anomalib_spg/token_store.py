# SPDX-License-Identifier: Apache-2.0

"""Storage of the training images' tokens for the two stages: in memory, or memory-mapped on disk."""

import ctypes
import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .components.backbone import Backbone, Tokens
from .components.files import load_tensors, save_tensors
from .distributed import num_processes

logger = logging.getLogger(__name__)

GIB = 2**30


class TokenStore:
    """Half-precision tokens, masks and labels of training images.

    Kept in memory or, with a folder, on disk: every batch is then written to its own file and memory-mapped, so
    that the system keeps in memory what fits. An interrupted run leaves its files; a store with the same folder and
    identity opens them again, and :attr:`restored` names the images that need no second pass through the backbone.
    Runs at the same time never share files: while another process is at work on the same tokens, a store takes a
    subfolder of its own.

    Args:
        folder (str | Path | None): Folder to write below. ``None`` keeps everything in memory. Defaults to ``None``.
        identity (dict[str, Any] | None): Plain data that determines the tokens: backbone, layers, image size, data.
            Its hash names the subfolder. Defaults to ``None``.
        memory_limit (float): Maximum memory in GiB, where everything is kept in memory. Defaults to 16 (ours).
        processes (int): Processes on this machine that store as much each; the limit is for all of them. Defaults to 1.

    Attributes:
        patches (list[list[torch.Tensor]]): Patch tokens ``(N, D)`` of every image, by layer.
        pooled (list[list[torch.Tensor]]): Pooled token ``(D,)`` of every image, by layer.
        masks (list[torch.Tensor]): Boolean mask ``(H, W)`` of every image.
        labels (list[bool]): Whether each image is anomalous.
        grid (tuple[int, int]): Rows and columns of patches.
        restored (set[str]): Names of the images that an interrupted run has stored.
        path (Path | None): The subfolder with this store's files.

    Example:
        >>> store = TokenStore()
        >>> store.add(Tokens([torch.rand(2, 6, 4)], [torch.rand(2, 4)], (2, 3)), torch.zeros(2, 8, 12), [False, True])
        >>> len(store), store.patches[0][1].shape, store.patches[0][1].dtype
        (2, torch.Size([6, 4]), torch.float16)
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        identity: dict[str, Any] | None = None,
        memory_limit: float = 16.0,
        processes: int = 1,
    ) -> None:
        self._forget()
        self.memory_limit = memory_limit
        self.processes = processes
        self.path: Path | None = None
        self._lock: Any = None
        if folder is None:
            return
        digest = hashlib.sha256(json.dumps(identity or {}, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self.path, self._lock = _own_folder(Path(folder), digest)
        for unfinished in self.path.glob("*.tmp"):
            unfinished.unlink()
        for file in sorted(self.path.glob("*.safetensors")):
            if file.stem.isdigit():  # others are not ours
                self._restore(file)

    @classmethod
    def fitting(
        cls,
        backbone: Backbone,
        num_images: int,
        image_size: tuple[int, int],
        memory_limit: float = 16.0,
        folder: str | Path | None = None,
        identity: dict[str, Any] | None = None,
        processes: int = 1,
    ) -> "TokenStore":
        """Open a store for the tokens of a number of images: in memory if they fit, else on disk.

        Args:
            backbone (Backbone): Backbone whose tokens will be stored.
            num_images (int): Images, or drawn views of images, of this process.
            image_size (tuple[int, int]): Their height and width.
            memory_limit (float): Maximum memory in GiB. Defaults to 16 (ours).
            folder (str | Path | None): Folder for tokens that need more. ``None`` raises instead. Defaults to ``None``.
            identity (dict[str, Any] | None): See the class.
            processes (int): See the class; the disk must have room for all of them, too.

        Returns:
            TokenStore: The store, with what an interrupted run has stored.

        Raises:
            MemoryError: If they need more than the memory limit and there is no folder.
            OSError: If the disk of that folder is too small for them.
        """
        need = memory_need(backbone, num_images * processes, image_size)
        store = cls(memory_limit=memory_limit, processes=processes)
        if folder is None or need <= memory_limit * GIB:
            store.check_memory(backbone, num_images, image_size)
        else:
            store = cls(folder, identity, memory_limit, processes)
        if folder is not None and num_processes() == 1:  # several know of each other's
            _tell_of_others(Path(folder), store.path)
        if store.path is None or folder is None:
            return store
        check_space(folder, need * max(0, num_images - len(store)) // max(1, num_images))
        return store

    def check_memory(self, backbone: Backbone, num_images: int, image_size: tuple[int, int]) -> None:
        """Refuse tokens that exceed ``memory_limit``, which does not apply on disk.

        Args:
            backbone (Backbone): Backbone whose tokens are stored.
            num_images (int): Images, or drawn views of images, of this process.
            image_size (tuple[int, int]): Their height and width.

        Raises:
            MemoryError: If it does not fit; the message says how much is needed.
        """
        num_images *= self.processes
        need = memory_need(backbone, num_images, image_size) / GIB
        if self.path is None and need > self.memory_limit:
            msg = (
                f"The tokens of {num_images} images of {image_size[0]}x{image_size[1]} need {need:.2f} GiB of memory, "
                f"memory_limit is {self.memory_limit} GiB for all processes of this machine. Raise it if there is "
                "more, keep them on disk with tokens_dir, or use fewer images, views or layers, or a smaller "
                "image_size."
            )
            raise MemoryError(msg)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __contains__(self, name: str) -> bool:
        """Whether an interrupted run has stored the image of that name."""
        return name in self.restored

    def add(
        self,
        tokens: Tokens,
        masks: torch.Tensor,
        labels: Sequence[bool],
        names: Sequence[str] | None = None,
    ) -> None:
        """Store a batch.

        Args:
            tokens (Tokens): Tokens of ``B`` images.
            masks (torch.Tensor): Anomaly masks ``(B, H, W)``.
            labels (Sequence[bool]): Whether each image is anomalous, ``B`` of them.
            names (Sequence[str] | None): Names that identify the images after an interruption. Defaults to ``None``.

        Raises:
            OSError: If the disk is full. What was stored before stays.
            ValueError: If a token is not a finite number.
        """
        tensors = {"masks": (masks > 0).cpu(), "labels": torch.tensor([bool(label) for label in labels])}
        for layer, (patches, pooled) in enumerate(zip(tokens.patches, tokens.pooled, strict=True)):
            tensors |= {f"patches.{layer}": patches.half().cpu(), f"pooled.{layer}": pooled.half().cpu()}
        if not _are_finite(tensors):
            msg = (
                f"The backbone gives tokens that are not finite numbers in half precision, for one of {len(labels)} "
                f"images, the first is '{next(iter(names or []), 'unnamed')}'. Check the backbone's weights."
            )
            raise ValueError(msg)
        if self.path is not None:
            file = self.path / f"{self._files:06}.safetensors"
            try:
                save_tensors(file, tensors, {"grid": json.dumps(tokens.grid), "names": json.dumps(list(names or []))})
                tensors, _ = load_tensors(file)
            except OSError as exception:
                msg = (
                    f"Could not store tokens in '{file.parent}': {exception}. Make room and run the same command "
                    "again; it goes on where it stopped. tokens_dir puts them on another disk."
                )
                raise OSError(msg) from exception
            _release_memory()
        self._append(tensors, tokens.grid)

    def clear(self) -> None:
        """Forget everything, and delete the files; what is stored next is kept in memory."""
        self._forget()
        if self.path is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            with suppress(OSError):  # Windows does not delete a file that is open
                Path(self._lock.lock_file).unlink()
            self._lock.release(force=True)
            with suppress(OSError):  # it holds another run's tokens
                self.path.parent.rmdir()
            self.path = self._lock = None

    def _forget(self) -> None:
        self.patches: list[list[torch.Tensor]] = []
        self.pooled: list[list[torch.Tensor]] = []
        self.masks: list[torch.Tensor] = []
        self.labels: list[bool] = []
        self.grid: tuple[int, int] = (0, 0)
        self.restored: set[str] = set()
        self._files = 0

    def _append(self, tensors: dict[str, torch.Tensor], grid: tuple[int, int]) -> None:
        layers = sum(name.startswith("patches.") for name in tensors)
        self.patches = self.patches or [[] for _ in range(layers)]
        self.pooled = self.pooled or [[] for _ in range(layers)]
        for layer in range(layers):
            self.patches[layer].extend(tensors[f"patches.{layer}"])
            self.pooled[layer].extend(tensors[f"pooled.{layer}"])
        self.masks.extend(tensors["masks"])
        self.labels.extend(tensors["labels"].tolist())
        self.grid = (grid[0], grid[1])
        self._files += 1

    def _restore(self, file: Path) -> None:
        try:
            tensors, header = load_tensors(file)
            grid, names = json.loads(header["grid"]), json.loads(header["names"])
            fault = None if _are_finite(tensors) else "numbers that are not finite"
        except (OSError, KeyError, ValueError) as exception:
            fault = str(exception)
        if fault is not None:
            logger.warning(
                "Cannot read the tokens in '%s' (%s); their images go through the backbone again.", file, fault
            )
            file.unlink(missing_ok=True)
            return
        self._append(tensors, grid)
        self._files = int(file.stem) + 1
        self.restored.update(names)


def _are_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all tokens of a batch are finite numbers."""
    return all(bool(tensor.isfinite().all()) for name, tensor in tensors.items() if name not in {"masks", "labels"})


def _own_folder(folder: Path, name: str) -> tuple[Path, Any]:
    """Make or take up a subfolder, and lock it: that of the name, or a numbered one while other processes have it.

    The lock ends with the store or its process. A process may lock anew what it has locked, for a fit that was
    interrupted in a notebook holds its lock as long as the model is there.
    """
    number = 1
    while True:
        path = folder / (name if number == 1 else f"{name}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock", is_singleton=True, thread_local=False)
        try:
            lock.acquire(blocking=False)
        except (Timeout, FileNotFoundError):  # another is at work there, or has just removed the folder
            number += 1
            continue
        path.mkdir(parents=True, exist_ok=True)
        return path, lock


def _tell_of_others(folder: Path, own: Path | None) -> None:
    """Say what else lies in the folder: tokens of interrupted runs would fill the disk unnoticed."""
    files: dict[str, int] = {}
    for file in folder.glob("*/*.safetensors"):
        if file.parent != own:
            with suppress(OSError):  # deleted just now
                files[file.parent.name] = files.get(file.parent.name, 0) + file.stat().st_size
    if files:
        logger.warning(
            "%.2f GiB of tokens of other runs lie in '%s' (%s). A run that was interrupted goes on from them when the "
            "same command is given again; delete what no run needs.",
            sum(files.values()) / GIB,
            folder,
            ", ".join(sorted(files)),
        )


def memory_need(backbone: Backbone, num_images: int, image_size: tuple[int, int]) -> int:
    """Bytes needed to store images: half-precision tokens of every layer, and a byte per mask pixel.

    Args:
        backbone (Backbone): Backbone whose tokens are stored.
        num_images (int): Images, or drawn views of images.
        image_size (tuple[int, int]): Their height and width.

    Returns:
        int: Bytes.

    Example:
        >>> backbone = Backbone("vit_tiny_patch16_224", pre_trained=False)
        >>> memory_need(backbone, 1, (224, 224)) == 197 * 192 * 2 + 224 * 224
        True
    """
    height, width = image_size
    tokens = -(-height // backbone.patch_size) * -(-width // backbone.patch_size) + 1
    return num_images * (len(backbone.layers) * tokens * backbone.embed_dim * 2 + height * width)


def on_device(tensors: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Move stored tensors to a GPU once, instead of in every step, where half of its free memory has room for them.

    Args:
        tensors (list[torch.Tensor]): Tensors of all images.
        device (torch.device): Where they will be needed.

    Returns:
        list[torch.Tensor]: The same on the device, or where they were.
    """
    if device.type != "cuda" or sum(tensor.nbytes for tensor in tensors) > torch.cuda.mem_get_info(device)[0] / 2:
        return tensors
    return [tensor.to(device) for tensor in tensors]


def gather(tensors: Sequence[torch.Tensor], numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Put those of some images together.

    What comes from main memory is copied from pinned memory, so that a GPU goes on with the last step meanwhile.

    Args:
        tensors (Sequence[torch.Tensor]): Tensors of all images, of one shape.
        numbers (torch.Tensor): Which images ``(B,)``.
        device (torch.device): Where they are needed.

    Returns:
        torch.Tensor: Single precision ``(B, ...)``.

    Example:
        >>> gather([torch.zeros(2).half(), torch.ones(2).half()], torch.tensor([1]), torch.device("cpu"))
        tensor([[1., 1.]])
    """
    batch = torch.stack([tensors[number] for number in numbers.tolist()])
    if device.type == "cuda" and not batch.is_cuda:
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True).float()


def _release_memory() -> None:
    """Give freed memory back to the system.

    Writing a batch makes temporary copies, between which small objects stay allocated; glibc would keep the gaps:
    several GiB after a few hundred batches.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def check_space(folder: str | Path, need: int) -> None:
    """Refuse tokens that do not fit on the disk.

    Args:
        folder (str | Path): Where they would go; it need not exist.
        need (int): Bytes.

    Raises:
        OSError: If the disk has less free space.
    """
    existing = next(path for path in [Path(folder).absolute(), *Path(folder).absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free
    if need > free:
        msg = (
            f"The tokens need {need / GIB:.2f} GiB on the disk of '{folder}', which has {free / GIB:.2f} GiB free. "
            "Give another disk's folder as tokens_dir, or use fewer images, views or layers, or a smaller image_size."
        )
        raise OSError(msg)
