# SPDX-License-Identifier: Apache-2.0

"""The pipeline behind ``python -m anomalib_spg.benchmark``, on tiny data with tiny random backbones."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from anomalib.utils.logging import LoggerRedirectError
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from anomalib_spg.benchmark.cluster import Task
from anomalib_spg.benchmark.grids import expand
from anomalib_spg.benchmark.pipeline import (
    Benchmark,
    BenchmarkJob,
    BenchmarkJobGenerator,
    _attempt,
    main,
)
from anomalib_spg.benchmark.results import append_row
from anomalib_spg.benchmark.tables import METRICS
from tests.helpers import REPOSITORY, fake_distribution, make_mvtec

SPG = {"backbone": "vit_tiny_patch16_224", "pre_trained": False, "layers": [2], "image_size": 64}
SPG |= {"num_atoms": 32, "k": 4, "sae_epochs": 1, "guide_epochs": 1}
PATCHCORE = {"backbone": "resnet18", "pre_trained": False}
SMALL = {"eval_batch_size": 3, "train_batch_size": 2, "num_workers": 0}  # batches of unequal size
ZERO_SHOT = """
import torch
from anomalib import LearningType
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor

class Torch(torch.nn.Module):
    def forward(self, images):
        maps = 50 * images.mean(dim=1, keepdim=True)
        return InferenceBatch(pred_score=maps.amax(dim=(2, 3)), anomaly_map=maps)

class Brightness(AnomalibModule):
    learning_type = LearningType.ZERO_SHOT
    trainer_arguments = {}
    configure_post_processor = staticmethod(PostProcessor)
    def __init__(self):
        super().__init__()
        self.model = Torch()
    def configure_optimizers(self): ...
    def validation_step(self, batch, *args, **kwargs):
        return batch.update(**self.model(batch.image)._asdict())
"""
POINTS = """
[anomalib.data]
AuxiliaryTarget = anomalib_spg:AuxiliaryTarget
[anomalib.models]
Brightness = bright:Brightness
"""


def transfer(visa: Path, mvtec: Path, category: Any) -> dict[str, Any]:
    """SPG's own datamodule, from gravel to a category."""
    arguments = {"auxiliary": "Visa", "auxiliary_args": {"root": str(visa)}, "auxiliary_categories": ["gravel"]}
    arguments |= {"target": "MVTecAD", "target_args": {"root": str(mvtec), "category": category}, **SMALL}
    return {"class_path": "AuxiliaryTarget", "init_args": arguments}


class Command:
    """The real command in a folder, and what it left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "runs/benchmark/table"

    def start(self) -> subprocess.Popen:
        """Start it, with an answer to Ctrl-C whatever the tests themselves run under."""
        return subprocess.Popen(
            [sys.executable, "-m", "anomalib_spg.benchmark", "--config", "table.yaml"],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{self.folder}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )

    def rows(self) -> pd.DataFrame:
        """The results so far."""
        path = self.output / "results.csv"
        return pd.read_csv(path) if path.exists() else pd.DataFrame()


@pytest.fixture(scope="module")
def command(mvtec: Path, visa: Path, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Nine jobs of five kinds, of which one cannot run."""
    folder = tmp_path_factory.mktemp("benchmark")
    fake_distribution(folder, "bright", POINTS, ZERO_SHOT)
    models = [
        {"class_path": "Patchcore", "init_args": {"backbone": "resnet_nowhere"}},
        {"class_path": "Brightness", "image_size": 64},
        {"class_path": "Patchcore", "init_args": PATCHCORE, "image_size": 64},
        {
            "class_path": "LAKE",
            "init_args": {
                "backbone": "vit_tiny_patch16_224",
                "pre_trained": False,
                "image_size": 64,
                "k_shot": {"grid": [1, 2]},
            },
        },
    ]
    labelled = {
        "seed": 3,
        "model": {"class_path": "SPG", "init_args": {**SPG, "image_score": {"grid": ["max", "top"]}}},
        "data": transfer(visa, mvtec, {"grid": ["brick", "grass"]}),
    }
    normal = {
        "seed": 3,
        "model": {"grid": models},
        "data": {"class_path": "MVTecAD", "init_args": {"root": str(mvtec), "category": "brick", **SMALL}},
    }
    config = {"accelerator": ["cpu"], "benchmark": [labelled, normal]}
    (folder / "table.yaml").write_text(yaml.safe_dump(config))
    return Command(folder)


@pytest.fixture(scope="module")
def interrupted(command: Command) -> tuple[str, pd.DataFrame]:
    """What it printed and left when Ctrl-C came after its first result."""
    process = command.start()
    while process.poll() is None and command.rows().empty:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 1, output
    return output, command.rows()


@pytest.fixture(scope="module")
def finished(command: Command, interrupted: tuple[str, pd.DataFrame]) -> tuple[str, pd.DataFrame]:
    """What the same command printed and left when it was run again."""
    assert interrupted
    process = command.start()
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    return output, command.rows()


@pytest.mark.command
@pytest.mark.slow
def test_interruption_keeps_results(interrupted: tuple[str, pd.DataFrame]) -> None:
    """What was done is there, the rest is not, and the message says how to go on."""
    output, rows = interrupted
    assert 1 <= len(rows) < 8
    assert "[1/9] SPG from Visa, image_score=max; MVTecAD brick; seed 3" in output
    assert "Interrupted. The same command goes on" in output


@pytest.mark.command
@pytest.mark.slow
def test_the_same_command_goes_on(interrupted: tuple[str, pd.DataFrame], finished: tuple[str, pd.DataFrame]) -> None:
    """Finished jobs are not run again: their rows, with their durations, are the same."""
    before, (output, after) = interrupted[1], finished
    assert f"9 jobs, {len(before)} of them in" in output
    assert "[1/9]" not in output
    assert "[9/9]" in output
    pd.testing.assert_frame_equal(after[before.columns].iloc[: len(before)], before, check_dtype=False)


@pytest.mark.command
@pytest.mark.slow
def test_failing_job_is_named_and_the_others_run(finished: tuple[str, pd.DataFrame]) -> None:
    """Name and error at the time and the name at the end; eight rows."""
    output, rows = finished
    name = "Patchcore, backbone=resnet_nowhere; MVTecAD brick; seed 3"
    assert output.count(name) == 2
    assert "Unknown model (resnet_nowhere)" in output
    assert "error: 1 of 9 jobs failed" in output
    assert len(rows) == 8
    assert not rows["job"].duplicated().any()
    assert set(rows["test_good"]) == set(rows["test_bad"]) == {4}
    assert "fewer than 10 good or 10 bad test images, fewest brick: 4 good, 4 bad." in output


@pytest.mark.command
@pytest.mark.slow
def test_all_models_have_all_metrics(command: Command, finished: tuple[str, pd.DataFrame]) -> None:
    """Models with other arguments, and a zero-shot one, in one file; without mangled settings."""
    rows = finished[1]
    assert rows["model.class_path"].tolist() == [*["SPG"] * 4, "Brightness", "Patchcore", "LAKE", "LAKE"]
    metrics = [*METRICS, "image_F1Score", "pixel_F1Score"]
    assert rows[metrics].notna().all(axis=None)
    written = pd.read_csv(command.output / "results.csv", dtype=str)
    assert written["model.init_args.k_shot"].tolist()[-2:] == ["1", "2"]


@pytest.mark.command
@pytest.mark.slow
def test_json_has_the_same_rows(command: Command, finished: tuple[str, pd.DataFrame]) -> None:
    """Typed, those of the interrupted run too; and the config they come from."""
    written = json.loads((command.output / "results.json").read_text(encoding="utf-8"))
    rows = pd.DataFrame(written["rows"])
    pd.testing.assert_frame_equal(rows[list(METRICS)], finished[1][list(METRICS)], check_dtype=False)
    assert rows["job"].tolist() == finished[1]["job"].tolist()
    assert [row.get("model.init_args.k_shot") for row in written["rows"]][-3:] == [None, 1, 2]
    assert {row["versions.torch"] for row in written["rows"]} == {version("torch")}
    assert written["configs"] == {"table.yaml": yaml.safe_load((command.folder / "table.yaml").read_text())}


@pytest.mark.command
@pytest.mark.slow
def test_guides_are_learned_once(command: Command, finished: tuple[str, pd.DataFrame]) -> None:
    """Four SPG jobs differ in target and image score only; the interrupted run had learned their guides."""
    log = (command.output / "benchmark.log").read_text(encoding="utf-8")
    assert log.count("Guides saved to") == 1
    assert log.count("nothing is trained") == 3
    assert len(list((command.output / "guides").iterdir())) == 1
    assert len(set(finished[1]["guides"].dropna())) == 1


@pytest.mark.command
@pytest.mark.slow
def test_tables_are_printed(finished: tuple[str, pd.DataFrame]) -> None:
    """At the end, failing or not."""
    assert "| LAKE, k_shot=2 " in finished[0]
    assert "**MVTecAD, pixel AUPRO**" in finished[0]


def test_shared_guides_give_what_learning_gives(mvtec: Path, visa: Path, tmp_path: Path) -> None:
    """A job that learns its guides and one that finds them have the same metrics."""
    config = {"seed": 3, "model": {"class_path": "SPG", "init_args": SPG}, "data": transfer(visa, mvtec, "grass")}
    job = BenchmarkJob("cpu", config, tmp_path)
    import anomalib.data

    from anomalib_spg import AuxiliaryTarget

    anomalib.data.AuxiliaryTarget = AuxiliaryTarget
    learned, shared = job.run(), job.run()
    names = [name for name in learned if name.startswith(("image_", "pixel_"))]
    assert {name: learned[name] for name in names} == {name: shared[name] for name in names}


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"image_score": "top", "cls_weight": 0.5, "top_fraction": 0.1, "sigma": 0}, True),
        ({"k": 5}, False),
        ({"hold_out": 0.0}, False),
        ({"false_alarm_rate": 0.01}, True),
        ({"weights": "other.safetensors"}, False),
    ],
)
def test_which_jobs_share_guides(change: dict[str, Any], same: bool) -> None:
    """Those whose guides cannot differ, and no others."""

    def guides(seed: int = 0, category: str = "brick", **arguments: Any) -> Path | None:
        config = {"seed": seed, "model": {"class_path": "SPG", "init_args": {**SPG, **arguments}}}
        config["data"] = transfer(Path("visa"), Path("mvtec"), category)
        return BenchmarkJob("cpu", config, Path()).guides

    assert (guides(**change) == guides()) == same
    assert guides(category="grass") == guides()
    assert guides(seed=1) != guides()
    assert guides(guides_file="file.safetensors") is None


def test_metrics_are_those_of_raw_scores(mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those scikit-learn computes, for distances far outside [0, 1], where anomalib clamps."""
    raw: list[tuple[np.ndarray, np.ndarray]] = []
    forward = PatchcoreModel.forward

    def recorded(self: PatchcoreModel, images: Any) -> Any:
        output = forward(self, images)
        if not self.training:
            output = output._replace(pred_score=100 * output.pred_score, anomaly_map=100 * output.anomaly_map)
            raw.append((output.pred_score.flatten().numpy(), output.anomaly_map.squeeze(1).numpy()))
        return output

    monkeypatch.setattr(PatchcoreModel, "forward", recorded)
    data = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec), "category": "brick", **SMALL}}
    config = {"seed": 0, "data": data}
    config["model"] = {"class_path": "Patchcore", "init_args": PATCHCORE, "image_size": 64}
    row = BenchmarkJob("cpu", config, tmp_path).run()

    datamodule = MVTecAD(**data["init_args"])
    datamodule.setup()
    items = list(datamodule.test_data)
    labels = np.array([bool(item.gt_label) for item in items])
    scores, maps = (np.concatenate(part)[-len(items) :] for part in zip(*raw, strict=True))
    assert maps.shape == (8, 64, 64)
    assert scores.min() > 1
    assert row["image_AUROC"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert row["image_AveragePrecision"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)
    precision, recall, _ = precision_recall_curve(labels, scores)
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
    assert row["image_F1Score"] == pytest.approx(best, abs=1e-6)  # validation and test images are the same
    masks = np.stack([resized(item.gt_mask) for item in items])
    assert row["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-5)
    assert row["image_F1Max"] == pytest.approx(best, abs=1e-6)
    ap = average_precision_score(masks.ravel(), maps.ravel())
    assert row["pixel_AveragePrecision"] == pytest.approx(ap, abs=1e-5)
    precision, recall, _ = precision_recall_curve(masks.ravel(), maps.ravel())
    best = np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))
    assert row["pixel_F1Max"] == pytest.approx(best, abs=1e-5)
    assert row["pixel_AveragePrecision"] != pytest.approx(row["pixel_F1Max"], abs=0.01)


def resized(mask: Any) -> np.ndarray:
    """A mask at 64x64 as anomalib's datasets resize it."""
    from torchvision.transforms.v2 import Resize
    from torchvision.tv_tensors import Mask

    return Resize((64, 64))(Mask(mask)).numpy().astype(bool)


def block(**sections: Any) -> dict[str, Any]:
    """A block of a config with some of its sections replaced."""
    return {"seed": 0, "model": {"class_path": "SPG"}, "data": {"class_path": "MVTecAD"}, **sections}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": {}}, "needs the sections accelerator and benchmark"),
        ({"accelerator": "tpu", "benchmark": {}}, "accelerator 'tpu' is unknown; choose cpu or cuda"),
        ({"accelerator": "cpu", "benchmark": {"seed": 0, "modle": {}}}, "lacks model and data; it has modle, seed"),
        (
            {"accelerator": "cpu", "benchmark": []},
            r"'table\.yaml' has no jobs: give accelerator, and in benchmark a block",
        ),
        ({"accelerator": [], "benchmark": block()}, r"'table\.yaml' has no jobs: give accelerator"),
        (
            {"accelerator": "cpu", "benchmark": ["SPG"]},
            r"'table\.yaml': A block .* is 'SPG', and must have seed, model",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(model="SPG")},
            r"'table\.yaml': model: 'SPG' names no class\. Give it a",
        ),
        ({"accelerator": "cpu", "benchmark": block(model={"grid": ["SPG"]})}, "model: 'SPG' names no class"),
        ({"accelerator": "cpu", "benchmark": block(model={"init_args": {}})}, "model: None names no class"),
        ({"accelerator": "cpu", "benchmark": block(data={"init_args": {"a": 1}})}, "data: {.*} names no class"),
        (
            {"accelerator": "cpu", "benchmark": block(model={"class_path": "SPG", "init_args": [1]})},
            r"model: init_args is \[1\]\. Give arguments by name",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(model={"grid": []})},
            r"'table\.yaml': model\.grid is an empty list",
        ),
        (
            {"accelerator": "cpu", "benchmark": [block(), block(seed={"grid": []})]},
            r"seed\.grid is an empty list\. Give it values, or leave it out",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(model={"class_path": "LAKE", "init_args": {"k_shot": []}})},
            r"model\.init_args\.k_shot is an empty list",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(model={"grid": [{"init_args": {"k_shot": {"grid": []}}}]})},
            r"model\.grid\.init_args\.k_shot\.grid is an empty list",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(data={"init_args": {"grid": {"k_shot": [1]}}})},
            r"data\.init_args\.grid: {'k_shot': \[1\]} is no list",
        ),
        (
            {"accelerator": "cpu", "benchmark": block(data={"init_args": {"category": {"gird": ["a", "b"]}}})},
            r"data\.init_args\.category\.gird: did you mean grid\?",
        ),
        ("accelerator: [", r"'table\.yaml' is no YAML: while parsing"),
    ],
)
def test_mistakes_in_the_config_are_named(
    config: dict | str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    text = config if isinstance(config, str) else yaml.safe_dump(config)
    Path("table.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", "table.yaml"])
    with pytest.raises(SystemExit, match=message):
        main()


def test_arguments_left_empty() -> None:
    """The same job as without the word."""
    empty = {"init_args": None}
    whole = block(model={"class_path": "SPG", "trainer": None, **empty}, data={"class_path": "MVTecAD", **empty})
    jobs = list(BenchmarkJobGenerator(["cpu"], Path())([whole, block()]))
    assert jobs[0].config == jobs[1].config == block()
    assert jobs[0].key == jobs[1].key


def append(together: Any, rank: int, output: Path, rows: int) -> None:
    """What one of two runs writes: every third job is one of the other run's, too."""
    together.wait()
    for number in range(rows):
        job = f"both {number}" if number % 3 == 0 else f"{rank} {number}"
        append_row(output, {"job": job, f"metric {rank}": number / 7})


@pytest.mark.command
def test_two_runs_with_one_output(tmp_path: Path) -> None:
    """Two processes write results at the same time: no row is lost, none is there twice."""
    output, rows = tmp_path / "run", 60
    context = multiprocessing.get_context("spawn")
    together = context.Barrier(2, timeout=120)
    other = context.Process(target=append, args=(together, 1, output, rows))
    other.start()
    append(together, 0, output, rows)
    other.join()
    assert other.exitcode == 0
    jobs = pd.read_csv(output / "results.csv").job.tolist()
    expected = {f"{rank} {number}" for rank in range(2) for number in range(rows) if number % 3}
    assert sorted(jobs) == sorted(expected | {f"both {number}" for number in range(0, rows, 3)})


def test_results_of_something_else_are_not_touched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A results.csv without keys is not ours to extend."""
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    (tmp_path / "results.csv").write_text("a,b\n1,2\n")
    config = {"seed": 0, "model": {"class_path": "LAKE"}, "data": {"class_path": "Visa"}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": config}))
    arguments = ["--config", str(tmp_path / "table.yaml"), "--output", str(tmp_path)]
    with pytest.raises(ValueError, match="has no column 'job'"):
        Benchmark().run(Benchmark.get_parser().parse_args(arguments))


def test_grids_multiply() -> None:
    """Every combination once, None among the values, nothing shared between them."""
    block = {
        "seed": {"grid": [0, 1]},
        "model": {"class_path": "SPG", "init_args": {"guide_top_k": {"grid": [None, 8]}}},
        "data": {"class_path": "MVTecAD", "init_args": {"category": {"grid": ["grid", "tile", "wood"]}}},
    }
    configs = list(expand(block))
    keys = {BenchmarkJob("cpu", config, Path()).key for config in configs}
    assert len(configs) == len(keys) == 12
    assert len(list(BenchmarkJobGenerator(["cpu", "cuda"], Path())([block, block]))) == 48
    configs[0]["model"]["init_args"]["guide_top_k"] = 99
    assert configs[1]["model"]["init_args"]["guide_top_k"] != 99


def test_image_size_belongs_into_our_models_arguments(tmp_path: Path) -> None:
    """Beside init_args it would be ignored."""
    model = {"class_path": "SPG", "init_args": SPG, "image_size": 64}
    job = BenchmarkJob("cpu", {"seed": 0, "model": model, "data": {"class_path": "MVTecAD"}}, tmp_path)
    with pytest.raises(ValueError, match="image_size=64 stands beside init_args, but SPG takes it in init_args"):
        job._build_model()


def test_missing_masks_are_named(tmp_path: Path) -> None:
    """Of anomalib's own datamodules, too, where its error is pandas'."""
    shutil.rmtree(make_mvtec(tmp_path) / "brick/ground_truth")
    data = {"class_path": "MVTecAD", "init_args": {"root": str(tmp_path), "category": "brick", **SMALL}}
    model = {"class_path": "Patchcore", "init_args": PATCHCORE, "image_size": 64}
    job = BenchmarkJob("cpu", {"seed": 0, "model": model, "data": data}, tmp_path)
    error = _attempt(tmp_path, Task("[1/1]", "job", job)).error
    assert "s: ValueError: MVTecAD brick: no masks in " in error
    assert "000.png'. Add the masks" in error


def test_misspelt_category_is_named(mvtec: Path, tmp_path: Path) -> None:
    """Before anomalib downloads the dataset; also where FewShot draws from it."""
    arguments = {"root": str(mvtec), "category": "botle"}
    few = {"class_path": "FewShot", "init_args": {"target": "MVTecAD", "target_args": arguments}}
    for data in ({"class_path": "MVTecAD", "init_args": arguments}, few):
        model = {"class_path": "Patchcore", "init_args": PATCHCORE, "image_size": 64}
        job = BenchmarkJob("cpu", {"seed": 0, "model": model, "data": data}, tmp_path)
        error = _attempt(tmp_path, Task("[1/1]", "job", job)).error
        assert f"MVTecAD: no folder '{mvtec / 'botle'}' with images; there are brick, grass." in error


def test_trainer_arguments_of_a_model(mvtec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They reach the trainer, tell jobs and guides apart; those that the benchmark sets are refused."""
    seen = {}

    class Seen(Engine):
        def fit(self, **_: Any) -> None:
            seen.update(self._cache.args)
            raise KeyboardInterrupt

    monkeypatch.setattr("anomalib_spg.benchmark.pipeline.Engine", Seen)
    data = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec), "category": "brick", **SMALL}}
    model = {"class_path": "Patchcore", "init_args": PATCHCORE, "trainer": {"max_epochs": 7}}
    with pytest.raises(KeyboardInterrupt):
        BenchmarkJob("cpu", {"seed": 0, "model": model, "data": data}, tmp_path).run()
    assert (seen["max_epochs"], seen["accelerator"]) == (7, "cpu")
    model["trainer"] = {"max_epochs": 7, "devices": 2}
    with pytest.raises(LoggerRedirectError) as error:
        BenchmarkJob("cpu", {"seed": 0, "model": model, "data": data}, tmp_path).run()
    assert "trainer: sets devices of Patchcore, which the benchmark sets itself" in str(error.value.__cause__)
    half = {"class_path": "SPG", "init_args": SPG, "trainer": {"precision": "bf16-mixed"}}
    jobs = [
        BenchmarkJob("cpu", {"seed": 0, "model": one, "data": data}, tmp_path)
        for one in (half, {**half, "trainer": {}})
    ]
    assert jobs[0].guides != jobs[1].guides
