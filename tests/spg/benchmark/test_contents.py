# SPDX-License-Identifier: Apache-2.0

"""Files that arguments name make a job what it is by what they hold."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from anomalib_spg.benchmark.contents import contents
from anomalib_spg.benchmark.pipeline import Benchmark, BenchmarkJob
from anomalib_spg.benchmark.results import read_rows


def job(**arguments: Any) -> BenchmarkJob:
    """A job of SPG with these arguments."""
    model = {"class_path": "SPG", "init_args": arguments}
    return BenchmarkJob("cpu", {"seed": 0, "model": model, "data": {"class_path": "MVTecAD"}}, Path())


@pytest.mark.parametrize("argument", ["guides_file", "weights", "extend"])
def test_another_file_under_an_old_name(argument: str, tmp_path: Path) -> None:
    """Is another job, with guides of its own if it learns any; the same contents written again are the same job."""
    file = tmp_path / "file.safetensors"
    file.write_bytes(b"one")
    before = job(**{argument: str(file)})
    file.write_bytes(b"two")
    after = job(**{argument: str(file)})
    file.write_bytes(b"one")
    again = job(**{argument: str(file)})
    assert before.key == again.key != after.key
    if argument == "weights":
        assert before.guides == again.guides != after.guides


def test_folder_of_a_backbone(tmp_path: Path) -> None:
    """timm's ``local-dir:`` names all files in it."""
    (tmp_path / "config.json").write_text("{}")
    before = contents({"init_args": {"backbone": f"local-dir:{tmp_path}"}})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert contents({"init_args": {"backbone": f"local-dir:{tmp_path}"}}) != before


def test_jobs_without_files_keep_their_keys() -> None:
    """Results of former releases go on."""
    assert job(k=8, weights="gone.safetensors", guides_file="hf://a/b/c.safetensors").key == "a8c81155db64e28d"
    assert not contents({"class_path": "SPG", "init_args": {"class_name": "x" * 5000, "weights": None, "layers": [1]}})


def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many jobs name it."""
    file = tmp_path / "weights.safetensors"
    file.write_bytes(b"x" * 3_000_000)
    opened = []
    read = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *arguments: opened.append(self) or read(self, *arguments))
    assert len({job(weights=str(file), k=k).key for k in range(5)}) == 5
    assert opened == [file]


def test_new_guides_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The same command after the file was overwritten: the job runs again, and the table tells both apart."""
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    file, config = tmp_path / "guides.safetensors", tmp_path / "table.yaml"
    model = {"class_path": "SPG", "init_args": {"guides_file": str(file)}}
    block = {"seed": 0, "model": model, "data": {"class_path": "MVTecAD", "init_args": {"category": "bottle"}}}
    config.write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": block}))
    arguments = Benchmark.get_parser().parse_args(["--config", str(config), "--output", str(tmp_path / "run")])
    for text, auroc in (("old", 0.25), ("new", 0.75)):
        file.write_text(text)
        measured = {"job_duration": 1.0, "image_AUROC": auroc}
        monkeypatch.setattr(
            BenchmarkJob, "run", lambda self, measured=measured: {"job": self.key, **self.flat, **measured}
        )
        Benchmark().run(arguments)
        Benchmark().run(arguments)
    assert [row["image_AUROC"] for row in read_rows(tmp_path / "run")] == ["0.25", "0.75"]
    printed = capsys.readouterr().out
    assert printed.count("1 jobs, 1 of them in") == 2
    new = job(guides_file=str(file)).flat["contents.model.init_args.guides_file"]
    assert f"| SPG, guides_file={new} | 75.0 " in printed
