# SPDX-License-Identifier: Apache-2.0

"""From a folder of good parts to accepted and rejected ones, by the real command, as the folder configs say."""

import re
import shutil
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from PIL import Image

from tests.helpers import REPOSITORY, run_command

pytestmark = [pytest.mark.command, pytest.mark.slow]

# Less than the config's settings where SPG learns, so that it takes a minute.
SIZE = {"lake": [], "spg": ["--model.image_size", "280"]}
QUICK = {"lake": [], "spg": ["--model.views", "3", "--model.num_atoms", "256", "--model.sae_epochs", "4"]}


class Factory:
    """A folder as a user has it: good parts, new parts, a folder config and a file of weights."""

    def __init__(self, name: str, folder: Path, quickstart: Path, command: Callable[..., str]) -> None:
        self.name = name
        self.folder = folder
        self.command = command
        textile = quickstart / "textile"
        good = sorted((textile / "train/good").iterdir())[:20]
        new = sorted((textile / "test/good").iterdir())[:8] + sorted((textile / "test/defect").iterdir())[:8]
        for target, paths in (("datasets/my_part/good", good), ("new", new)):
            (folder / target).mkdir(parents=True)
            for path in paths:
                kind = f"{path.parent.name}_" if target == "new" else ""
                shutil.copyfile(path, folder / target / f"{kind}{path.name}")
        shutil.copyfile(REPOSITORY / "configs" / f"{name}_folder.yaml", folder / "config.yaml")
        weights = ["--model.weights", quickstart / "dinov2_vits14.safetensors", "--data.num_workers", "0"]
        self.trained = self.run("train", *weights, *SIZE[name], *QUICK[name])
        self.checkpoint = next(folder.glob(f"results/{name.upper()}/my_part/latest/weights/lightning/model.ckpt"))

    def run(self, *arguments: Any) -> str:
        """Run ``anomalib`` with the config, and return what it printed in one line."""
        command, *options = arguments
        return " ".join(self.command(command, "--config", "config.yaml", *options, folder=self.folder).split())

    def predict(self, data: str = "new", *options: Any) -> tuple[pd.DataFrame, str]:
        """The table of decisions on some images, and what was printed."""
        output = self.run("predict", "--data", data, "--ckpt_path", self.checkpoint, *SIZE[self.name], *options)
        tables = sorted(self.folder.rglob("predictions*.csv"), key=lambda path: path.stat().st_mtime)
        table = pd.read_csv(tables[-1])
        table["defective"] = table.image.str.contains("defect_")
        table["rejected"] = table.decision == "rejected"
        return table, output

    @cached_property
    def decisions(self) -> tuple[pd.DataFrame, str]:
        """Those on the new parts."""
        return self.predict()

    def export(self, kind: str) -> Path:
        """The checkpoint exported by the command, once."""
        out, pattern = self.folder / kind, {"openvino": "*.xml", "onnx": "*.onnx", "torch": "*.pt"}[kind]
        if out.exists():
            return next(out.rglob(pattern))
        options = ["--ckpt_path", self.checkpoint, "--export_type", kind, "--export_root", out]
        printed = self.run("export", *SIZE[self.name], *options)
        assert "Traceback" not in printed
        return next(out.rglob(pattern))

    @cached_property
    def openvino(self) -> OpenVINOInferencer:
        """anomalib's inferencer with the exported model."""
        return OpenVINOInferencer(self.export("openvino"), config={"INFERENCE_PRECISION_HINT": "f32"})


@pytest.fixture(scope="module", params=["lake", "spg"])
def factory(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    quickstart: Path,
    anomalib_command: Callable[..., str],
) -> Factory:
    """Each model, trained on good parts alone."""
    return Factory(request.param, tmp_path_factory.mktemp(request.param), quickstart, anomalib_command)


def test_training_says_what_is_known(factory: Factory) -> None:
    """Number of good parts, threshold, the rate to expect with its interval; no figure that looks like a test."""
    found = re.search(
        r"Threshold [\d.]+ \(shown as 0\.5\) from (\d+) good images \((\d+) of them learned from\)\. "
        r"It will reject about 8\.0% of good parts",
        factory.trained,
    )
    assert found
    assert int(found[1]) == {"lake": 20, "spg": 20}[factory.name]
    assert int(found[2]) == {"lake": 20, "spg": 15}[factory.name]
    assert "with 90 % probability" in factory.trained
    assert "there were no bad images" in factory.trained
    assert "image_AUROC" not in factory.trained


def test_decisions_on_unseen_parts(factory: Factory) -> None:
    """Defects are rejected and good parts accepted; the table says where, and the log how many and where it is."""
    table, output = factory.decisions
    assert len(table) == 16
    assert table[table.defective].rejected.mean() >= {"lake": 0.9, "spg": 0.5}[factory.name]
    assert table[~table.defective].rejected.mean() <= 0.25
    assert ((table.score > table.threshold) == table.rejected).all()
    assert (table[~table.rejected].outlined == 0).all(), "an accepted part has no outline"
    assert table[table.rejected].outlined.between(0, 0.2).all()
    assert f"{table.rejected.sum()} of 16 images rejected" in output
    assert "predictions.csv" in output
    box = next(row.boxes for row in table[table.rejected].itertuples() if isinstance(row.boxes, str))
    left, top, right, bottom = map(int, box.split(";")[0].split())
    assert 0 <= left < right <= 250
    assert 0 <= top < bottom <= 250


def test_predicting_twice(factory: Factory) -> None:
    """The same scores, and the first table is kept."""
    again, _ = factory.predict()
    assert again.score.equals(factory.decisions[0].score)
    assert len(list(factory.folder.rglob("predictions*.csv"))) >= 2


def test_another_rate_needs_no_training(factory: Factory) -> None:
    """A rate named at prediction moves the threshold of the checkpoint: more is rejected, and nothing less."""
    lax, _ = factory.predict("new", "--model.false_alarm_rate", "0.4")
    assert lax.rejected.sum() > factory.decisions[0].rejected.sum()
    assert not (factory.decisions[0].rejected & ~lax.rejected).any()


@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_examples_without_torch(factory: Factory, kind: str, tmp_path: Path) -> None:
    """The examples in docs/ decide as ``predict`` does, and import neither torch nor anomalib."""
    if factory.name == "spg" and kind == "onnx":
        pytest.skip("the format does not depend on the model")
    shutil.copytree(factory.folder / "new", tmp_path / "new")
    paths = sorted((tmp_path / "new").iterdir())
    example = REPOSITORY / "docs" / f"predict_{kind}.py"
    code = f"import sys, runpy; sys.argv = sys.argv[1:]; runpy.run_path({str(example)!r}, run_name='__main__'); "
    code += "print('imported:', sorted({'torch', 'anomalib', 'torchvision'} & set(sys.modules)))"
    output = run_command([sys.executable, "-c", code, example, factory.export(kind), *paths], tmp_path)
    assert "imported: []" in output
    table, _ = factory.decisions
    near = {"onnx": 5e-4, "openvino": 0.1}[kind]  # OpenVINO computes the backbone in bfloat16 here
    for row in table.itertuples():
        found = re.search(rf"{Path(row.image).name}: (\w+), score ([\d.]+)", output)
        assert float(found[2]) == pytest.approx(row.score, abs=near)
        if abs(row.score - row.threshold) > near:
            assert found[1] == row.decision
    assert len(list(tmp_path.glob("heatmaps/*.png"))) == (len(paths) if kind == "onnx" else 0)
    assert sorted((tmp_path / "new").iterdir()) == paths, "nothing that the next run would take for an image"


def test_exported_model_decides_alike(factory: Factory) -> None:
    """OpenVINO at f32 accepts and rejects what `anomalib predict` does, with the same shown scores and outlines."""
    for row in factory.decisions[0].itertuples():
        result = factory.openvino.predict(row.image)
        assert bool(result.pred_label.squeeze()) == row.rejected
        assert float(result.pred_score.squeeze()) == pytest.approx(row.score, abs=1e-3)
        assert result.pred_mask.mean() == pytest.approx(row.outlined, abs=1e-3)


def test_exported_model_sees_camera_images_alike(factory: Factory) -> None:
    """Images far larger than the model's input, square or not: resized with antialiasing in every format."""
    folder = factory.folder / "camera"
    folder.mkdir()
    source = sorted((factory.folder / "new").glob("*"))
    rng = np.random.default_rng(0)
    for path, size in zip(source, [(2048, 1536), (1000, 1000), (300, 250)], strict=False):
        pixels = np.asarray(Image.open(path).convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=float)
        noisy = (pixels + rng.normal(0, 25, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{path.stem}.png")
    table, _ = factory.predict("camera")
    assert len(table) == 3
    for row in table.itertuples():
        assert float(factory.openvino.predict(row.image).pred_score.squeeze()) == pytest.approx(row.score, abs=5e-4)
    if factory.name == "spg":
        return  # the other formats do not depend on the model
    session = onnxruntime.InferenceSession(factory.export("onnx"))
    module = torch.load(factory.export("torch"), weights_only=False)["model"].eval()
    names = [output.name for output in session.get_outputs()]
    for row in table.itertuples():
        pixels = read_image(row.image, as_tensor=True)[None]
        score = session.run(None, {"input": pixels.numpy()})[names.index("pred_score")]
        assert float(score.squeeze()) == pytest.approx(row.score, abs=5e-4)
        with torch.inference_mode():
            assert float(module(pixels).pred_score) == pytest.approx(row.score, abs=5e-4)


def test_bad_images_take_part(factory: Factory, quickstart: Path, tmp_path: Path) -> None:
    """With a folder of bad parts, and without the lines for good parts only, the decision is tested as well."""
    if factory.name == "spg":
        pytest.skip("the same code; LAKE is quicker")
    shutil.copytree(factory.folder / "datasets", tmp_path / "datasets")
    bad = tmp_path / "datasets/my_part/bad"
    bad.mkdir()
    for path in sorted((quickstart / "textile/test/defect").iterdir())[20:30]:
        shutil.copyfile(path, bad / path.name)
    lines = (REPOSITORY / "configs/lake_folder.yaml").read_text().splitlines()
    kept = [line.replace("# abnormal_dir", "abnormal_dir") for line in lines if "good parts only" not in line[40:]]
    kept = [line for line in kept if "# good parts only" not in line and line != "trainer:"]
    (tmp_path / "config.yaml").write_text("\n".join(kept))
    output = factory.command(
        *("train", "--config", "config.yaml", "--data.num_workers", "0"),
        *("--model.weights", quickstart / "dinov2_vits14.safetensors", "--model.num_shifts", "1"),  # for time
        folder=tmp_path,
    )
    assert "image_MissRate" in output
    assert "image_FalseAlarmRate" in output
    assert re.search(r"finds \d of the 5 bad images", " ".join(output.split()))


def test_a_broken_model_accepts_nothing(factory: Factory, tmp_path: Path) -> None:
    """Guides that are no numbers are refused; scores that are none are rejected, named, and empty in the table."""
    checkpoint = torch.load(factory.checkpoint, weights_only=True)
    key = {"lake": "model.banks.0.0.tokens", "spg": "model.guides.0.vectors"}[factory.name]
    checkpoint["state_dict"][key].fill_(float("nan"))
    torch.save(checkpoint, tmp_path / "broken.ckpt")
    kept, factory.checkpoint = factory.checkpoint, tmp_path / "broken.ckpt"
    try:
        if factory.name == "spg":
            with pytest.raises(AssertionError, match="guides in the checkpoint are damaged"):
                factory.predict()
            return
        table, output = factory.predict()
    finally:
        factory.checkpoint = kept
    assert table.rejected.all()
    assert table.score.isna().all()
    assert "score is not a finite number" in output
