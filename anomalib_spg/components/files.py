# SPDX-License-Identifier: Apache-2.0

"""Atomic writing of files, digests of what they hold, and safetensors files with a header."""

import hashlib
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def atomic_write(path: str | Path) -> Generator[Path, None, None]:
    """Write to a temporary file that replaces ``path`` once it is complete.

    If anything fails, an existing file is left unchanged and no partial file remains.

    Args:
        path (str | Path): File to write; its folder is created.

    Yields:
        Path: Where to write.

    Raises:
        OSError: If it cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_write(f"{folder}/new/file.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     Path(f"{folder}/new/file.txt").read_text()
        'whole'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the original error says more
            temporary.unlink(missing_ok=True)


def digest_of(path: str | Path) -> str:
    """Digest what a file holds, however large it is.

    Args:
        path (str | Path): File.

    Returns:
        str: SHA-256, 64 hexadecimal digits.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     digest_of(file.name)
        'e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855'
    """
    whole = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(2**20):
            whole.update(block)
    return whole.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    Args:
        path (str | Path): File to write; its folder is created.
        tensors (Mapping[str, torch.Tensor]): Tensors on any device.
        header (dict[str, str]): Texts for the file's header.

    Raises:
        OSError: If it cannot be written.
    """
    with atomic_write(path) as temporary:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, header)
        except SafetensorError as exception:  # a full disk, for instance
            raise OSError(str(exception)) from exception


def load_tensors(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file. The tensors are memory-mapped.

    Args:
        path (str | Path): File.

    Returns:
        tuple[dict[str, torch.Tensor], dict[str, str]]: Tensors, and the texts of the header.

    Raises:
        OSError: If there is no such file or it is damaged.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as exception:
        raise OSError(str(exception)) from exception
