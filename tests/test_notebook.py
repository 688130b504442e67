# SPDX-License-Identifier: Apache-2.0

"""The notebook in docs/ runs from its first cell to its last, and shows what comes of that."""

import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from tests.helpers import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "first_steps.ipynb"


def read() -> Any:
    """The notebook as it is committed."""
    return nbformat.read(NOTEBOOK, as_version=4)


def decisions(notebook: Any) -> dict[str, str]:
    """What the last cell with code prints, by image."""
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    printed = "".join(output.text for output in last.outputs if output.get("name") == "stdout")
    return dict(re.findall(r"(\S+): (accepted|rejected), score", printed))


def test_outputs_are_committed_and_small() -> None:
    """People look before they run: every picture is there, no error, no chatter, in a few hundred kilobytes."""
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/jpeg" in output.get("data", {}) for output in outputs) == 3
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    assert not any(output.output_type == "error" for output in outputs)
    assert NOTEBOOK.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.command
def test_it_runs(quickstart: Path, tmp_path: Path) -> None:
    """In an empty folder; the exported model decides as anomalib does, and as the committed outputs say."""
    (tmp_path / "quickstart").mkdir()
    weights = "dinov2_vits14.safetensors"
    (tmp_path / "quickstart" / weights).symlink_to(quickstart / weights)
    notebook = read()
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    table = pd.read_csv(next(tmp_path.rglob("predictions.csv")))
    by_anomalib = {Path(path).name: decision for path, decision in zip(table.image, table.decision, strict=True)}
    assert decisions(notebook) == by_anomalib == decisions(read())
    assert {name.partition("_")[0]: decision for name, decision in by_anomalib.items()} == {
        "defect": "rejected",
        "good": "accepted",
    }
