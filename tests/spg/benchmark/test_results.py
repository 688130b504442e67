# SPDX-License-Identifier: Apache-2.0

"""results.csv and results.json."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from anomalib_spg.benchmark.grids import expand
from anomalib_spg.benchmark.pipeline import Benchmark, BenchmarkJob
from anomalib_spg.benchmark.results import append_row, read_jobs, read_rows, write_json

BLOCK = {
    "seed": 0,
    "model": {"class_path": "LAKE", "init_args": {"k_shot": {"grid": [None, 4]}, "layers": [6], "own_weight": 0.5}},
    "data": {"class_path": "BTech", "init_args": {"category": "01"}},
}


def write(output: Path) -> list[BenchmarkJob]:
    """Two rows as jobs leave them."""
    jobs = [BenchmarkJob("cpu", config, output) for config in expand(BLOCK)]
    for job, auroc in zip(jobs, (0.5, float("nan")), strict=True):
        append_row(output, {"job": job.key, "job_duration": 1.5, **job.flat, "image_AUROC": auroc, "pixel_AUPRO": None})
    return jobs


def read(output: Path) -> dict[str, Any]:
    """results.json, which must be JSON in the strict sense."""
    return json.loads((output / "results.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))


def test_values_have_their_types(tmp_path: Path) -> None:
    """Those of the config; numbers as numbers; a category called 01 stays a text; what is no number is null."""
    jobs = write(tmp_path)
    write_json(tmp_path, {"table.yaml": {"benchmark": BLOCK}}, {job.key: job.flat for job in jobs})
    first, second = read(tmp_path)["rows"]
    assert first["model.init_args.k_shot"] is None
    assert second["model.init_args.k_shot"] == 4
    assert (first["seed"], first["model.init_args.layers"], first["model.init_args.own_weight"]) == (0, [6], 0.5)
    assert (first["data.init_args.category"], first["job_duration"], first["image_AUROC"]) == ("01", 1.5, 0.5)
    assert second["image_AUROC"] is None
    assert "pixel_AUPRO" not in first
    assert read(tmp_path)["configs"] == {"table.yaml": {"benchmark": BLOCK}}


def test_rows_of_another_config_keep_their_types(tmp_path: Path) -> None:
    """Two configs may share a folder; without an earlier file their settings are texts, as in the CSV file."""
    jobs = write(tmp_path)
    write_json(tmp_path, {}, {})
    assert read(tmp_path)["rows"][1]["model.init_args.k_shot"] == "4"
    (tmp_path / "results.json").unlink()
    write_json(tmp_path, {"a.yaml": 1}, {job.key: job.flat for job in jobs})
    append_row(tmp_path, {"job": "other", "seed": 3, "image_AUROC": 1.0})
    write_json(tmp_path, {"b.yaml": 2}, {"other": {"seed": 3}})
    assert [row["seed"] for row in read(tmp_path)["rows"]] == [0, 0, 3]
    assert read(tmp_path)["rows"][1]["model.init_args.k_shot"] == 4
    assert read(tmp_path)["configs"] == {"a.yaml": 1, "b.yaml": 2}


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure leaves the earlier file."""
    jobs = write(tmp_path)
    settings = {job.key: job.flat for job in jobs}
    write_json(tmp_path, {}, settings)
    before = (tmp_path / "results.json").read_text()

    def half(self: Path, text: str, **_: Any) -> None:
        self.write_bytes(text[:20].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path, {"new.yaml": 1}, settings)
    assert (tmp_path / "results.json").read_text() == before
    assert {path.name for path in tmp_path.iterdir()} <= {"results.csv", "results.json", ".results.csv.lock"}


@pytest.mark.parametrize("content", ["{}", "[1]", '{"rows": [', "a,b"])
def test_json_of_something_else_is_not_touched(tmp_path: Path, content: str) -> None:
    """Whatever has that name."""
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json' was not written by anomalib_spg\.benchmark"):
        write_json(tmp_path, {}, {})
    assert (tmp_path / "results.json").read_text() == content


def test_older_results_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CSV file of a former release: its jobs are done, its rows stay as they are, and new ones have more columns."""
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    done, new = (BenchmarkJob("cpu", config, tmp_path) for config in expand(BLOCK))
    append_row(tmp_path, {"job": done.key, "job_duration": 2.0, **done.flat, "image_AUROC": 0.25})
    before = read_rows(tmp_path)[0]
    ran = []

    def run(self: BenchmarkJob) -> dict[str, Any]:
        ran.append(self.key)
        row = {"job": self.key, "job_duration": 1.0, **self.flat, "image_AUROC": 0.75, "pixel_F1Max": 0.5}
        return {**row, "versions.torch": "9"}

    monkeypatch.setattr(BenchmarkJob, "run", run)
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": BLOCK}))
    Benchmark().run(Benchmark.get_parser().parse_args(["--config", str(path), "--output", str(tmp_path)]))
    assert ran == [new.key]
    assert [job["job"] for job in read_jobs(tmp_path)] == [done.key, new.key]
    first, second = read_rows(tmp_path)
    assert {name: first[name] for name in before} == before
    assert (first["pixel_F1Max"], second["pixel_F1Max"]) == ("", "0.5")
    rows = pd.DataFrame(read(tmp_path)["rows"])
    assert rows["image_AUROC"].tolist() == [0.25, 0.75]
    assert rows["versions.torch"].fillna("").tolist() == ["", "9"]
