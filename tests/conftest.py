# SPDX-License-Identifier: Apache-2.0

"""Data and commands shared by the tests. Everything is made here or comes from installed packages; no network."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from anomalib_spg.quickstart import prepare
from tests import textures

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real DINOv2-S/14 weights and the textile images."""
    return prepare(tmp_path_factory.mktemp("data") / "quickstart")


def run_command(arguments: list[str | Path], folder: Path, timeout: int = 600, **environment: str) -> str:
    """Run a command in a folder and return what it printed; fail with its output if it fails."""
    done = subprocess.run(
        [str(argument) for argument in arguments],
        cwd=folder,
        env={**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{arguments} failed:\n{done.stdout[-4000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def anomalib_command() -> Callable[..., str]:
    """The real ``anomalib`` command of this environment."""

    def run(*arguments: str | Path, folder: Path, **keywords: str) -> str:
        return run_command([Path(sys.executable).parent / "anomalib", *arguments], folder, **keywords)

    return run


def make_mvtec(root: Path, categories: tuple[str, ...] = ("brick", "grass"), count: int = 4) -> Path:
    """A small dataset in MVTec AD's layout: real textures, drawn defects, masks."""
    return textures.make_mvtec(root, categories, train=count, test=count, size=96, defects=("hole",))


def make_visa(root: Path, categories: tuple[str, ...] = ("gravel",), count: int = 4) -> Path:
    """A small dataset in VisA's layout."""
    return textures.make_visa(root, categories, train=count, test=count, size=96, defects=("hole",))


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in MVTec AD's layout with the categories ``brick`` and ``grass``."""
    return make_mvtec(tmp_path_factory.mktemp("mvtec"))


@pytest.fixture(scope="session")
def visa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in VisA's layout with the category ``gravel``."""
    return make_visa(tmp_path_factory.mktemp("visa"))
