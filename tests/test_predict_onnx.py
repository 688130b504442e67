# SPDX-License-Identifier: Apache-2.0

"""Examples in docs/: where heatmaps go, and files that are no images. What they decide is tested with the models."""

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import openvino
import pytest
from PIL import Image

from tests.helpers import REPOSITORY

OUTPUTS = {"pred_score": np.zeros(1), "pred_label": np.zeros(1, bool), "anomaly_map": np.zeros((1, 1, 8, 8))}
SESSION = SimpleNamespace(
    get_outputs=lambda: [SimpleNamespace(name=name) for name in OUTPUTS],
    get_inputs=lambda: [SimpleNamespace(name="input")],
    run=lambda *_: list(OUTPUTS.values()),
)


class Requests:
    """OpenVINO's queue, which decides at once."""

    def __init__(self, _: object) -> None:
        self.callback: Any = None

    def set_callback(self, callback: Any) -> None:
        """Note what to do with a result."""
        self.callback = callback

    def start_async(self, _: object, path: str) -> None:
        """Give it a result."""
        self.callback(SimpleNamespace(get_tensor=lambda name: SimpleNamespace(data=OUTPUTS[name])), path)

    def wait_all(self) -> None:
        """Nothing waits."""


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
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _: SESSION)
    runpy.run_path(str(REPOSITORY / "docs/predict_onnx.py"))["main"]("model.onnx", *images)
    found = [path.relative_to("heatmaps").as_posix() for path in Path("heatmaps").rglob("*.png")]
    assert sorted(found) == heatmaps


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_what_is_no_image_stops_no_other(
    runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is named on the standard error, and the exit status says that there was one; the others are decided."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda _: SESSION)
    monkeypatch.setattr(openvino, "Core", lambda: SimpleNamespace(compile_model=lambda *_: None))
    monkeypatch.setattr(openvino, "AsyncInferQueue", Requests)
    Path("Thumbs.db").write_bytes(bytes(99))
    Path("folder").mkdir()
    Image.effect_noise((64, 64), 50).save("half.png")
    Path("half.png").write_bytes(Path("half.png").read_bytes()[:900])
    Image.new("I;16", (8, 8)).save("deep.png")
    bad = ["Thumbs.db", "folder", "half.png", "deep.png", "gone.png"]
    for name in ("a.png", "z.png"):
        Image.new("RGB", (20, 10)).save(name)
    main = runpy.run_path(str(REPOSITORY / f"docs/predict_{runtime}.py"))["main"]
    with pytest.raises(SystemExit, match="5 of 7 files are not decided"):
        main("model", "a.png", *bad, "z.png")
    printed = capsys.readouterr()
    assert [line.split(",")[0] for line in printed.out.splitlines()] == ["a.png: accepted", "z.png: accepted"]
    assert [line.split(":")[0] for line in printed.err.splitlines()] == bad
