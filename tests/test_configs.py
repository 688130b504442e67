# SPDX-License-Identifier: Apache-2.0

"""Every config can be run as it is, once its dataset roots are set."""

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from jsonargparse import ArgumentParser

from anomalib_lake import LAKE
from anomalib_spg import SPG, AuxiliaryTarget, FewShot
from anomalib_spg.benchmark.pipeline import BenchmarkJob, BenchmarkJobGenerator
from tests.helpers import REPOSITORY, make_mvtec

CONFIGS = REPOSITORY / "configs"
TRAIN = sorted(CONFIGS.glob("*.yaml"))
BENCHMARKS = sorted((CONFIGS / "benchmark").glob("*.yaml"))
CLASSES = {"SPG": SPG, "LAKE": LAKE, "AuxiliaryTarget": AuxiliaryTarget, "FewShot": FewShot}
SEEDS = 3
CATEGORIES = {"MVTecAD2": 8, "RealIAD": 30, "MVTecLOCO": 5, "Kaputt": 10, "MPDD": 6, "AutoVI": 6}
JOBS = {
    "datasets_auxiliary": SEEDS * len(CATEGORIES) * 15,
    "datasets_target": SEEDS * (2 + 1) * (sum(CATEGORIES.values()) + 1),
    "lake_bmad_brain": 4,
    "lake_btad": 4 * 3,
    "lake_mvtecad": 4 * 15,
    "lake_selection": SEEDS * 5 * 15,
    "lake_text_weight": SEEDS * 8 * 15,
    "lake_visa": 4 * 12,
    "peers_mvtecad": SEEDS * (2 * 8 + 8 + 1) * 15,
    "peers_visa": SEEDS * (2 * 8 + 8 + 1) * 12,
    "spg_dictionary": SEEDS * 5 * 3 * 15,
    "spg_guide_top_k": SEEDS * 9 * 15,
    "spg_guides": 15,
    "spg_image_score": SEEDS * 5 * 15,
    "spg_mvtecad": 15,
    "spg_mvtecad_to_visa": SEEDS * 4 * 12,
    "spg_no_dictionary": SEEDS * 2 * 2 * 15,
    "spg_visa_to_mvtecad": SEEDS * 4 * 15,
    "textures_mvtec_to_visa": SEEDS * (1 + 1 + 2 * 5) * 3,
    "textures_visa_to_mvtec": SEEDS * (1 + 1 + 2 * 5) * 3,
}
TRAININGS = {"spg_visa_to_mvtecad": SEEDS * 4, "spg_mvtecad_to_visa": SEEDS * 4, "spg_image_score": SEEDS}
TRAININGS |= {"datasets_target": SEEDS, "datasets_auxiliary": SEEDS * len(CATEGORIES)}
TRAININGS |= {"spg_dictionary": SEEDS * 15, "spg_mvtecad": 15, "textures_visa_to_mvtec": SEEDS * (1 + 3)}


def jobs(path: Path) -> list[BenchmarkJob]:
    """The jobs of a benchmark."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return list(BenchmarkJobGenerator(["cpu"], Path())(config["benchmark"]))


@cache
def parser(cls: type) -> ArgumentParser:
    """Reads arguments of a constructor; refuses unknown names and wrong types."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls)
    return parser


def check(config: dict[str, Any], kind: str) -> None:
    """Class, argument names and types are what a constructor takes; paths are roots or what the quickstart writes."""
    name = config["class_path"].split(".")[-1]
    cls = CLASSES.get(name) or getattr(import_module(f"anomalib.{kind}"), name)
    arguments = config.get("init_args", {})
    parser(cls).parse_object(arguments)
    assert set(config) <= {"class_path", "init_args", "image_size", "trainer"}
    assert arguments.get("root", "./datasets").startswith(("./datasets", "quickstart/"))
    for argument in ("backbone", "encoder_name"):
        backbone = arguments.get(argument)
        local = {None, "local-dir:quickstart/vit_small_patch14_dinov2"}
        assert backbone in {*local, "dinov2_vit_small_14"} or timm.is_model(backbone)  # the last is FoundAD's own name
    assert arguments.get("weights") in {None, "quickstart/dinov2_vits14.safetensors"}
    for part in ("auxiliary", "target"):
        if part in arguments:
            check({"class_path": arguments[part], "init_args": arguments[f"{part}_args"]}, "data")
    if set(config.get("trainer", ())) - {"max_epochs", "max_steps"}:
        pytest.fail(f"{config['trainer']} is more than how long to train")
    if "category" in arguments and "textures" not in arguments["root"]:
        module = cls.__module__.replace(".datamodules.", ".datasets.")
        assert arguments["category"] in import_module(module).CATEGORIES


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.stem)
def test_train(path: Path) -> None:
    """Configs of `anomalib train`."""
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"data", "model"} <= set(config) <= {"data", "model", "trainer"}
    check(config["model"], "models")
    check(config["data"], "data")


@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_benchmark(path: Path) -> None:
    """Configs of tables: all jobs of the grids, each only once, each with arguments there are."""
    made = jobs(path)
    assert len({job.key for job in made}) == len(made) == JOBS[path.stem]
    for job in made:
        assert set(job.config) == {"seed", "model", "data"}
        if job.config["model"]["class_path"] in CLASSES:
            assert "image_size" not in job.config["model"]
    for section, kind in (("model", "models"), ("data", "data")):
        for config in {json.dumps(job.config[section]) for job in made}:
            check(json.loads(config), kind)
    if path.stem in TRAININGS:
        assert len({job.guides for job in made if job.guides}) == TRAININGS[path.stem]


@pytest.mark.parametrize("path", [*TRAIN, *BENCHMARKS], ids=lambda path: path.stem)
def test_command_and_list(path: Path) -> None:
    """A benchmark says how to run it, its seeds fit, and the list of configs links to every file."""
    name = path.relative_to(CONFIGS).as_posix()
    assert f"]({name})" in (CONFIGS / "README.md").read_text(encoding="utf-8")
    if path in BENCHMARKS:
        assert f"#   python -m anomalib_spg.benchmark --config configs/{name}\n" in path.read_text(encoding="utf-8")


def test_backbones_are_the_published_ones() -> None:
    """The four of the paper, in both directions, at its image sizes."""
    from anomalib_spg.components.backbone import default_image_size

    expected = {
        "vit_large_patch16_dinov3.lvd1689m": 448,
        "vit_large_patch14_dinov2.lvd142m": 448,
        "vit_large_patch14_clip_quickgelu_336.openai": 518,
        "vit_large_patch16_siglip_384.webli": 448,
    }
    for name in ("spg_visa_to_mvtecad", "spg_mvtecad_to_visa"):
        arguments = [job.config["model"]["init_args"] for job in jobs(CONFIGS / "benchmark" / f"{name}.yaml")]
        assert all(set(names) == {"backbone"} for names in arguments)
        sizes = {names["backbone"]: default_image_size(names["backbone"])[0] for names in arguments}
        assert sizes == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Rad", "SuperADD"])  # the two that no other test runs
def test_peers_run(name: str, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """anomalib's models with the arguments of the config, real weights and no hub, on three images."""
    import anomalib.data

    monkeypatch.setattr(anomalib.data, "FewShot", FewShot, raising=False)
    monkeypatch.chdir(quickstart.parent)
    made = jobs(CONFIGS / "benchmark" / "textures_visa_to_mvtec.yaml")
    config = next(job.config for job in made if job.config["model"]["class_path"] == name)
    root = make_mvtec(tmp_path, (config["data"]["init_args"]["target_args"]["category"],), count=1)
    config["data"]["init_args"]["target_args"] |= {"root": str(root), "num_workers": 0}
    row = BenchmarkJob("cpu", config, tmp_path).run()
    assert row["data.init_args.k_shot"] == 1
    assert row["pixel_AUROC"] > 0.7
