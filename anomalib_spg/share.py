# SPDX-License-Identifier: Apache-2.0

"""A folder for the Hugging Face hub: guides, and a model card that says what they are and how to use them.

    python -m anomalib_spg.share --guides results/SPG/my_part/latest/weights/guides.safetensors \
        --repository owner/name --license apache-2.0

Nothing is uploaded. The command that does it, the hub's own, is printed.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCardData

from .components.files import atomic_write
from .components.module_list import ModuleList
from .explanations.examples import Examples, digest
from .figures import plot_guides
from .guides import Guides, read_guides

GUIDES, EXAMPLES, CARD = "guides.safetensors", "examples.safetensors", "README.md"
PAPER = "https://arxiv.org/abs/2604.02871"


def share(
    guides_file: str | Path,
    folder: str | Path,
    repository: str,
    licence: str,
    examples_file: str | Path | None = None,
    metrics: dict[str, float] | None = None,
    tested_on: str | None = None,
) -> Path:
    """Write the folder.

    Args:
        guides_file (str | Path): Guides file that training SPG left.
        folder (str | Path): Folder to write to, a new one or one that this function has written.
        repository (str): Name on the hub, ``owner/name``.
        licence (str): The hub's name of the licence that others get the guides under, such as ``apache-2.0``, or
            ``unknown``.
        examples_file (str | Path | None): Examples file of the same training, for explanations. It holds training
            images. Defaults to ``None``.
        metrics (dict[str, float] | None): What the guides reach, by metric. Defaults to ``None``.
        tested_on (str | None): On which images. Needed with metrics.

    Returns:
        Path: The folder.

    Raises:
        ValueError: If an argument cannot work, or a file is not what it should be.
        FileExistsError: If the folder holds something else.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        msg = f"repository='{repository}' must have the form owner/name."
        raise ValueError(msg)
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        msg = (
            f"license='{licence}' is no name that the hub knows: those are short and lower-case, such as apache-2.0, "
            "mit, cc-by-4.0, cc-by-nc-4.0, other, or unknown if nobody has decided."
        )
        raise ValueError(msg)
    if metrics and not tested_on:
        msg = f"Say on which images {', '.join(metrics)} were measured (--tested_on)."
        raise ValueError(msg)
    foreign = {path.name for path in folder.iterdir()} - {GUIDES, EXAMPLES, CARD, ".gitattributes", ".git"} if (
        folder.is_dir()
    ) else set()
    foreign = {name for name in foreign if not re.fullmatch(r"guides_block\d+\.jpg", name)}
    if foreign:
        msg = f"'{folder}' holds {sorted(foreign)[0]}, which would be uploaded, too. Give a new folder."
        raise FileExistsError(msg)
    tensors, metadata = read_guides(guides_file)
    model = torch.nn.Module()
    layers = metadata.get("layers", list(range(len(tensors) // 4)))
    model.guides = ModuleList(Guides(tensors[f"{layer}.vectors"].shape[1]) for layer in range(len(layers)))
    model.guides.load_state_dict(tensors)
    examples = None
    if examples_file is not None:
        examples = Examples.load(examples_file)
        if examples.learned != digest(model):
            msg = f"'{examples_file}' belongs to another training than '{guides_file}'. Leave it out, or give the right one."
            raise ValueError(msg)
    return folder
