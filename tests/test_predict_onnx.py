# SPDX-License-Identifier: Apache-2.0

"""Where the example in docs/ puts its heatmaps; what it decides is tested by a model's decisions."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tests.helpers import REPOSITORY


@pytest.mark.parametrize(
    ("images", "heatmaps"),
    [
        (["new/a.png", "new/b.png"], ["a.png.png", "b.png.png"]),
        (["line1/part.png", "line2/part.png"], ["line1/part.png.png", "line2/part.png.png"]),
        (["part.png", "part.jpg"], ["part.jpg.png", "part.png.png"]),
        (
            ["line1/part.png", "new/../part.png", "../part.png"],
            ["in/line1/part.png.png", "in/part.png.png", "part.png.png"],
        ),
        ([], []),
    ],
)
def test_each_image_has_a_heatmap_of_its_own(
    images: list[str], heatmaps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where names are alike in two folders or but for their ending."""
    for image in images:
        path = tmp_path / "in" / image
        (tmp_path / "in/new").mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 10)).save(path)
    (tmp_path / "in").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "in")
    outputs = {"pred_score": np.zeros(1), "pred_label": np.zeros(1, bool), "anomaly_map": np.zeros((1, 1, 8, 8))}
    session = SimpleNamespace(
        get_outputs=lambda: [SimpleNamespace(name=name) for name in outputs],
        get_inputs=lambda: [SimpleNamespace(name="input")],
        run=lambda *_: list(outputs.values()),
    )
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _: session)
    runpy.run_path(str(REPOSITORY / "docs/predict_onnx.py"))["main"]("model.onnx", *images)
    found = [path.relative_to("heatmaps").as_posix() for path in Path("heatmaps").rglob("*.png")]
    assert sorted(found) == heatmaps
