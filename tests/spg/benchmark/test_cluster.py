# SPDX-License-Identifier: Apache-2.0

"""``--engine ray``: jobs on real Ray nodes, of which one is killed; a run that is stopped and started again."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml

from anomalib_spg.benchmark import cluster
from anomalib_spg.benchmark.cluster import Cluster, Outcome, Task
from anomalib_spg.benchmark.pipeline import Benchmark, main
from anomalib_spg.benchmark.results import append_row
from tests.helpers import REPOSITORY, fake_distribution
from tests.spg.benchmark.test_pipeline import PATCHCORE, POINTS, SMALL, SPG, ZERO_SHOT, transfer

# A model whose jobs say that they have begun, and then wait until they may go on.
GATED = """
import os, time
from pathlib import Path

class Gated(Brightness):
    def __init__(self, number):
        super().__init__()
        gate = Path(os.environ["GATE"])
        (gate / f"{number} {os.getpid()}").touch()
        while not (gate / "open").exists():
            time.sleep(0.05)
"""
ONE_NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 100 * 2**20}  # the GPU is only claimed


@pytest.fixture
def ray(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Ray, its files in folders of the test, and a model that waits; no process may be left."""
    for name, value in cluster._RAY.items():
        monkeypatch.setenv(name, value)
    ray = pytest.importorskip("ray", reason="Ray has no wheel for this Python and system, or is not installed")
    if not Path("/proc").is_dir():
        pytest.skip("looks for processes in /proc")
    (tmp_path / "gate").mkdir()
    fake_distribution(tmp_path, "bright", POINTS + "Gated = bright:Gated", ZERO_SHOT + GATED)
    temporary = tempfile.mkdtemp()  # sockets need a short path
    home = tmp_path_factory.getbasetemp() / "home"  # Ray keeps a token there, and reads it once in a process
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("TMPDIR", temporary)
    monkeypatch.setenv("GATE", str(tmp_path / "gate"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(REPOSITORY), str(tmp_path)]))
    monkeypatch.chdir(tmp_path)
    before, handler = ray_processes(), signal.getsignal(signal.SIGTERM)  # Ray sets its own
    yield ray
    signal.signal(signal.SIGTERM, handler)
    wait_until(lambda: ray_processes() <= before)
    shutil.rmtree(temporary)


@pytest.fixture
def nodes(ray: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes, each for one job on its CPU and one on its GPU at a time."""
    from ray.cluster_utils import Cluster as Nodes

    nodes = Nodes()
    try:
        nodes.add_node(**ONE_NODE, include_dashboard=False, temp_dir=f"{os.environ['TMPDIR']}/ray")
        nodes.second = nodes.add_node(**ONE_NODE)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        yield nodes
    finally:
        ray.shutdown()
        nodes.shutdown()


def ray_processes() -> set[str]:
    """Ids of Ray's processes on this machine."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::") or b"/ray/" in command:
            found.add(folder.name)
    return found


def wait_until(condition: Callable[[], Any], timeout: float = 300) -> None:
    """Wait, or fail."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def begun() -> list[str]:
    """Processes of the jobs that have begun and wait."""
    return [path.name.split()[1] for path in Path("gate").iterdir() if path.name != "open"]


def write_config(mvtec: Path, *models: dict[str, Any], more: tuple[dict[str, Any], ...] = ()) -> None:
    """Jobs of models on one small category, and more."""
    data = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec), "category": "brick", **SMALL}}
    block = {"seed": 3, "model": {"grid": list(models)}, "data": data}
    text = yaml.safe_dump({"accelerator": "cpu", "benchmark": [block, *more]})
    Path("table.yaml").write_text(text, encoding="utf-8")


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, which began before :func:`fake_distribution`; others find what it wrote."""
    import anomalib.data
    import anomalib.models

    from anomalib_spg import AuxiliaryTarget

    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.setattr(anomalib.data, "AuxiliaryTarget", AuxiliaryTarget, raising=False)
    bright = importlib.import_module("bright")
    for name in ("Brightness", "Gated"):
        monkeypatch.setattr(anomalib.models, name, getattr(bright, name), raising=False)


def gated(*numbers: int) -> dict[str, Any]:
    """Jobs that wait."""
    return {"class_path": "Gated", "init_args": {"number": {"grid": list(numbers)}}, "image_size": 64}


def tables(text: str) -> str:
    """What is printed from the first table on."""
    return text[text.index("**MVTecAD") :]


@pytest.mark.slow
@pytest.mark.command
def test_a_machine_is_killed(
    nodes: Any, mvtec: Path, visa: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The table of two nodes, one of them killed amid a job, is that of jobs one after another."""
    register(monkeypatch)
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    model = {"class_path": "SPG", "init_args": {**SPG, "image_score": {"grid": ["max", "top"]}}}
    shared = {"seed": 3, "model": model, "data": transfer(visa, mvtec, "grass")}
    wrong = {"class_path": "Patchcore", "init_args": {**PATCHCORE, "backbone": "resnet_nowhere"}}
    write_config(mvtec, gated(1, 2), wrong, more=(shared,))

    def run(output: str, *options: str) -> tuple[pd.DataFrame, str]:
        arguments = ["--config", "table.yaml", "--output", output, *options]
        with pytest.raises(RuntimeError, match=r"1 of 5 jobs failed.*\n  Patchcore; MVTecAD brick"):
            Benchmark().run(Benchmark.get_parser().parse_args(arguments))
        return pd.read_csv(f"{output}/results.csv", dtype=str), capsys.readouterr().out

    def kill() -> None:
        wait_until(lambda: len(begun()) == 2)
        nodes.remove_node(nodes.second, allow_graceful=False)
        wait_until(lambda: not {f"{pid}" for pid in begun()} <= ray_processes())
        Path("gate/open").touch()

    killer = threading.Thread(target=kill)
    killer.start()
    rows, printed = run("cluster", "--engine", "ray")
    killer.join()
    monkeypatch.delenv("RAY_ADDRESS")
    expected, expected_print = run("here")

    assert "2 CPUs, a job takes one" in printed
    assert printed.count("LOST, will run again (NodeDiedError: Task failed") == 1
    assert printed.count(": started on ") == 6
    assert printed.count("FAILED after") == 1
    assert "RuntimeError: Unknown model (resnet_nowhere)" in printed
    columns = [name for name in expected if "duration" not in name]
    assert len(rows) == 4
    pd.testing.assert_frame_equal(rows[columns], expected[columns])
    assert tables(printed) == tables(expected_print)
    log = "".join(path.read_text(encoding="utf-8") for path in Path("cluster").glob("benchmark-*.log"))
    assert log.count("Guides saved to") == log.count("nothing is trained") == 1
    assert not list(Path("cluster").glob(".cluster-*"))


@pytest.mark.slow
@pytest.mark.command
@pytest.mark.usefixtures("ray")
def test_stopped_and_started_again(mvtec: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Ctrl-C in a terminal reaches Ray's processes, too. What was done is kept, nothing else is."""
    write_config(mvtec, {"class_path": "Brightness", "image_size": 64}, gated(1))
    arguments = ["--config", "table.yaml", "--output", "run", "--engine", "ray", "--workers", "1"]
    before = ray_processes()
    process = subprocess.Popen(
        [sys.executable, "-m", "anomalib_spg.benchmark", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    wait_until(lambda: process.poll() is not None or (begun() and Path("run/results.csv").exists()))
    os.killpg(process.pid, signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1, output
    assert "Interrupted. The same command goes on" in output
    wait_until(lambda: ray_processes() <= before)  # a worker that was starting needs a moment to notice
    assert [path.name for path in Path(os.environ["TMPDIR"]).iterdir()] == []
    assert len(pd.read_csv("run/results.csv")) == 1

    Path("gate/open").touch()
    register(monkeypatch)
    monkeypatch.setattr("anomalib_spg.benchmark.pipeline._log_to", lambda _: None)
    Benchmark().run(Benchmark.get_parser().parse_args(arguments))
    output = capsys.readouterr().out
    assert "2 jobs, 1 of them in" in output
    assert "[1/2]" not in output
    assert pd.read_csv("run/results.csv")["model.class_path"].tolist() == ["Brightness", "Gated"]
    assert list(Path(os.environ["TMPDIR"]).glob("ray-*")) == []


@pytest.mark.slow
@pytest.mark.command
def test_what_a_cluster_does(nodes: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """One GPU a job; guides are waited for; a job that takes its worker down is given up; strangers are refused."""
    assert nodes

    def job(number: int, accelerator: str = "cpu", guides: Path | None = None) -> Task:
        return Task(f"[{number}]", "", SimpleNamespace(accelerator=accelerator, key=str(number), guides=guides))

    def work(task: Task) -> Outcome:  # without anomalib, which takes workers long to import
        import torch

        if task.number == "[3]":
            os._exit(1)
        if task.number == "[4]":  # it was to learn the guides
            return Outcome(error="FAILED")
        guides = task.job.guides
        row = {"job_duration": 0, "known": guides is not None and guides.exists()}
        row |= {"gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "threads": torch.get_num_threads()}
        if guides is not None:
            time.sleep(1)
            guides.touch()
        return Outcome(row)

    monkeypatch.delenv("OMP_NUM_THREADS")
    guides = Path("guides")
    jobs = [job(1, "cuda"), job(2, "cuda"), job(3), *(job(number, guides=guides) for number in range(4, 8))]
    outcomes = {task.number: outcome for task, outcome in Cluster(["cpu", "cuda"]).run(jobs, work, Path("run"))}
    printed = capsys.readouterr().out
    assert len(outcomes) == 7
    assert [outcomes[f"[{number}]"].row["gpu"] for number in (1, 2)] == ["0", "0"]
    assert outcomes["[1]"].row["threads"] == os.cpu_count()
    assert "[1] : started on" in printed
    assert ", GPU 0" in printed
    assert printed.count("[3] : LOST, will run again (WorkerCrashedError") == 2
    assert str(outcomes["[3]"]).startswith("FAILED, lost 3 times, at last by WorkerCrashedError")
    assert [outcomes[f"[{number}]"].row and outcomes[f"[{number}]"].row["known"] for number in range(4, 8)] == [
        None,
        False,
        True,
        True,
    ]

    elsewhere = cluster._Place(Path.cwd(), Path("/nowhere/token"), None)
    monkeypatch.setattr(cluster, "_shared", lambda _: nullcontext(elsewhere))
    with pytest.raises(RuntimeError, match="does not see the folder '/nowhere' of the machine that the benchmark was"):
        list(Cluster(["cpu"]).run([job(1)], work, Path("run")))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"No Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:9 "):
        list(Cluster(["cpu"]).run([job(1)], work, Path("run")))


@pytest.mark.parametrize(
    ("options", "address", "message"),
    [
        ("--workers 2", "", "--workers needs --engine ray"),
        ("--engine ray", "", "say with --workers how many jobs run at the same time"),
        ("--engine ray --workers 0", "", "--workers 0: it must be at least 1"),
        ("--engine ray --workers 2", "auto", "--workers is for Ray on this machine, but RAY_ADDRESS=auto names"),
        ("--engine ray", "ray://host:10001", "RAY_ADDRESS=ray://host:10001 is a Ray client's"),
        ("--engine ray --workers 2", "without ray", "pip install 'anomalib-spg-lake"),
    ],
)
def test_what_cannot_run_is_refused(
    options: str, address: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything runs, with what to do."""
    monkeypatch.chdir(tmp_path)
    installed = address != "without ray"
    monkeypatch.setattr(cluster, "find_spec", lambda _: installed or None)
    monkeypatch.setenv("RAY_ADDRESS", address if installed else "")
    job = {"seed": 0, "model": {"class_path": "LAKE"}, "data": {"class_path": "Visa"}}
    Path("table.yaml").write_text(yaml.safe_dump({"accelerator": "cpu", "benchmark": job}), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["benchmark", "--config", "table.yaml", *options.split()])
    with pytest.raises(SystemExit, match=message):
        main()
    assert not Path("runs").exists()


def test_more_jobs_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would believe it."""
    monkeypatch.setattr(cluster, "find_spec", lambda _: True)
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Cluster(["cuda"]).workers is None
    with pytest.raises(ValueError, match="3 jobs at the same time on cuda need as many GPUs, but torch finds 2 here"):
        Cluster(["cuda"], workers=3)


def test_rows_are_in_the_order_of_the_jobs(tmp_path: Path) -> None:
    """Whatever finishes first; rows of other configs stay before them."""
    for job in ("other", "c", "a", "b", "a"):
        append_row(tmp_path, {"job": job}, ["a", "b", "c"])
    assert pd.read_csv(tmp_path / "results.csv").job.tolist() == ["other", "a", "b", "c"]
