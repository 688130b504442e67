# SPDX-License-Identifier: Apache-2.0

"""Wheel and editable installs into an environment of their own."""

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.helpers import FIND, REPOSITORY, run_command

pytestmark = [pytest.mark.command, pytest.mark.slow]


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A new virtual environment that sees this one's packages, but not its install of this project."""
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = subprocess.check_output(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
    ).strip()
    # A plain path line makes packages importable without running the .pth files there.
    (Path(purelib) / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def pip(python: Path, *arguments: str | Path) -> None:
    """This environment's pip, working on another interpreter."""
    command = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index"]
    run_command([*command, "--no-build-isolation", *arguments], REPOSITORY)


def test_wheel(environment: Path, tmp_path: Path) -> None:
    """The wheel holds the packages and nothing else, and its entry points work."""
    run_command([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path], REPOSITORY)
    wheel = next(tmp_path.glob("*.whl"))
    pip(environment, wheel)
    output = run_command([environment, "-c", f"{FIND}\nimport anomalib_spg; print(anomalib_spg.__file__)"], tmp_path)
    installed = Path(output.strip().splitlines()[-1])
    assert (tmp_path / "venv") in installed.parents
    assert (installed.parent / "py.typed").exists()
    assert (installed.parent / "explanations" / "report.html").exists()
    assert (installed.parents[1] / "anomalib_lake" / "py.typed").exists()
    listing = run_command([sys.executable, "-m", "zipfile", "-l", wheel], tmp_path)
    tops = {line.split("/")[0] for line in listing.splitlines()[1:] if "/" in line}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"anomalib_spg", "anomalib_lake"}


def test_editable(environment: Path, tmp_path: Path) -> None:
    """The entry points of an editable install work, and it is this very tree that is imported."""
    pip(environment, "-e", REPOSITORY)
    output = run_command([environment, "-c", f"{FIND}\nimport anomalib_spg; print(anomalib_spg.__file__)"], tmp_path)
    assert Path(output.strip().splitlines()[-1]) == REPOSITORY / "anomalib_spg" / "__init__.py"
