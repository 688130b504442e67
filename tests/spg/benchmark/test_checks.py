# SPDX-License-Identifier: Apache-2.0

"""Names in a benchmark's config."""

import sys
from pathlib import Path
from typing import Any

import anomalib.data
import pytest
import yaml
from anomalib.models.image.padim.lightning_model import Padim

from anomalib_spg import AuxiliaryTarget, FewShot
from anomalib_spg.benchmark.checks import check_names
from anomalib_spg.benchmark.grids import expand_all
from anomalib_spg.benchmark.pipeline import Benchmark, BenchmarkJob, main
from tests.helpers import REPOSITORY


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed."""
    monkeypatch.setattr(anomalib.data, "AuxiliaryTarget", AuxiliaryTarget, raising=False)
    monkeypatch.setattr(anomalib.data, "FewShot", FewShot, raising=False)


def config(model: Any = "LAKE", data: Any = "MVTecAD", **sections: Any) -> dict[str, Any]:
    """A job; classes by name, or with their arguments."""
    parts = {"model": model, "data": data}
    return {"seed": 0, **{k: {"class_path": v} if isinstance(v, str) else v for k, v in parts.items()}, **sections}


def named(name: str, **arguments: Any) -> dict[str, Any]:
    """A section."""
    return {"class_path": name, "init_args": arguments}


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (config("AnomalyDINOO"), "model: anomalib has no model 'AnomalyDINOO'. Did you mean AnomalyDINO"),
        (config("lake"), "model: anomalib has no model 'lake'. Did you mean LAKE"),
        (config("Nothing at all"), "model: anomalib has no model 'Nothing at all'. Choose one of A"),
        (config("mine.Patchcore"), "model: anomalib imports no model from 'mine'. Write class_path: Patchcore."),
        (config(data="MVTechAD"), "data: anomalib has no datamodule 'MVTechAD'. Did you mean MVTecAD"),
        (config(named("LAKE", k_shots=4)), "model: LAKE has no argument 'k_shots'. Did you mean k_shot?"),
        (config(data=named("Visa", categry="x")), "data: Visa has no argument 'categry'. Did you mean category"),
        (config(data=named("FewShot", k_shot=1)), "data: FewShot needs target among its arguments."),
        (
            config(data=named("FewShot", target="MVTecAD3")),
            "data: target: anomalib has no datamodule 'MVTecAD3'. Did you mean MVTecAD",
        ),
        (config(data=named("FewShot", target="Avenue")), "data: target: anomalib has no image datamodule 'Avenue'."),
        (
            config(data=named("FewShot", target=named("Visa", rot="x"))),
            "data: target: Visa has no argument 'rot'. Did you mean root",
        ),
        (
            config(data=named("AuxiliaryTarget", auxiliary="Visa", auxiliary_args={"rot": 1}, target="Folder")),
            "data: auxiliary: Visa has no argument 'rot'. Did you mean root",
        ),
        (
            config({"class_path": "Dinomaly", "trainer": {"max_epoch": 1}}),
            "model: trainer has no argument 'max_epoch'. Did you mean max_epochs",
        ),
        (config({"class_path": "LAKE", "init_arg": {}}), "model has no entry 'init_arg'. Did you mean init_args?"),
    ],
)
def test_unknown_names(job: dict[str, Any], message: str) -> None:
    """With the nearest known ones."""
    with pytest.raises(ValueError, match="has no|needs|imports no") as error:
        check_names([job, job, config()])
    assert str(error.value).startswith(message)
    assert str(error.value).count(message) == 1


def test_all_mistakes_at_once() -> None:
    """Each once, however many jobs have it."""
    with pytest.raises(ValueError, match="'Lak'") as error:
        check_names([config("Lak", "Vis"), config("Lak", "MVTecAD")])
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs/benchmark").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_configs_pass(path: Path) -> None:
    """All classes and arguments in them are known; so is a name with its module."""
    check_names(expand_all(yaml.safe_load(path.read_text(encoding="utf-8"))["benchmark"]))
    check_names([config("anomalib.models.Patchcore", "anomalib.data.Visa")])


def test_before_the_first_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run or written; the message begins with the file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(BenchmarkJob, "run", lambda _: pytest.fail("a job has run"))
    models = {"grid": [{"class_path": "LAKE"}, {"class_path": "Lak"}]}
    text = yaml.safe_dump({"accelerator": "cpu", "benchmark": config(model=models)})
    Path("table.yaml").write_text(text, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", "table.yaml"])
    with pytest.raises(SystemExit, match=r"^error: 'table\.yaml': model: anomalib has no model 'Lak'"):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["table.yaml"]


def test_errors_without_a_word_name_their_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """anomalib turns an AttributeError of a constructor into an empty UnknownModelError."""

    def broken(self: Padim, *_: Any, **__: Any) -> None:
        del self
        msg = "no attribute 'x'"
        raise AttributeError(msg)

    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    monkeypatch.setattr(Padim, "__init__", broken)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": config("Padim")}))
    with pytest.raises(RuntimeError, match="1 of 1 jobs failed"):
        Benchmark().run(Benchmark.get_parser().parse_args(["--config", str(path), "--output", str(tmp_path)]))
    assert "s: AttributeError: no attribute 'x'" in capsys.readouterr().out
