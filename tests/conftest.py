# SPDX-License-Identifier: Apache-2.0

"""Fixtures shared by the tests. Everything is made here or comes from installed packages; no network."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # threads of several workers would only wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from anomalib_spg.quickstart import prepare
from tests.helpers import make_mvtec, make_visa, run_command

pytest.register_assert_rewrite("tests.odd_runs")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the real DINOv2-S/14 weights and the textile images."""
    return prepare(tmp_path_factory.mktemp("data") / "quickstart")


@pytest.fixture(scope="session")
def anomalib_command() -> Callable[..., str]:
    """The real ``anomalib`` command of this environment."""

    def run(*arguments: str | Path, folder: Path, **keywords: str) -> str:
        return run_command([Path(sys.executable).parent / "anomalib", *arguments], folder, **keywords)

    return run


@pytest.fixture(scope="session")
def mvtec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in MVTec AD's layout with the categories ``brick`` and ``grass``."""
    return make_mvtec(tmp_path_factory.mktemp("mvtec"))


@pytest.fixture(scope="session")
def visa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small dataset in VisA's layout with the category ``gravel``."""
    return make_visa(tmp_path_factory.mktemp("visa"))
