# SPDX-License-Identifier: Apache-2.0

"""What the files hold that a model's arguments name: another guides file under an old name makes another job."""

import hashlib
import os
from functools import cache
from pathlib import Path
from typing import Any

from anomalib.utils.config import flatten_dict

from anomalib_spg.components.files import digest_of

_FOLDER = "local-dir:"  # timm's word for a folder with a backbone


def contents(section: dict[str, Any]) -> dict[str, str]:
    """Digest the local files that arguments name. A file is read once, however many jobs name it.

    Args:
        section (dict[str, Any]): Section ``model`` of a job.

    Returns:
        dict[str, str]: Digests in columns for the results; none for arguments that name no local file.

    Example:
        >>> contents({"class_path": "SPG", "init_args": {"guides_file": "hf://owner/name/guides.safetensors", "k": 8}})
        {}
    """
    arguments = flatten_dict(section.get("init_args") or {})
    named = {name: _files(value) for name, value in arguments.items() if isinstance(value, str)}
    return {
        f"contents.model.init_args.{name}": hashlib.sha256("".join(map(_digest, files)).encode()).hexdigest()[:16]
        for name, files in named.items()
        if files
    }


def _files(value: str) -> list[Path]:
    if value.startswith(_FOLDER):
        return sorted(path for path in Path(value.removeprefix(_FOLDER)).glob("*") if path.is_file())
    return [Path(value)] if os.path.isfile(value) else []  # noqa: PTH113  # takes any text, however long


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of_state(path.absolute(), state.st_ino, state.st_size, state.st_mtime_ns)


@cache
def _digest_of_state(path: Path, *_state: int) -> str:
    return digest_of(path)
