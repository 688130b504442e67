# SPDX-License-Identifier: Apache-2.0

"""Jobs of the benchmark on several GPUs and machines, by Ray: ``--engine ray``.

    python -m anomalib_spg.benchmark --config FILE --engine ray              # all GPUs of this machine
    python -m anomalib_spg.benchmark --config FILE --engine ray --workers 4  # four at a time, on GPUs or CPUs
    RAY_ADDRESS=auto python -m anomalib_spg.benchmark --config FILE --engine ray  # a cluster that is there

- Without ``RAY_ADDRESS``, Ray starts on this machine and ends with the benchmark. With it, the benchmark joins that
  cluster, from one of its machines.
- A job on ``cuda`` takes one GPU, a job on ``cpu`` one of Ray's CPUs: ``ray start --num-cpus 2`` has a machine take two
  at a time. Jobs that run at the same time share a machine's cores, unless ``OMP_NUM_THREADS`` is set.
- Jobs that share guides wait for the one that learns them.
- A job whose worker or machine is lost is run again. An exception in a job is the job's own, and is not tried again.
- The driver alone writes results. Stopped and started again, it goes on with the jobs that are left.

All machines need the same Python environment. The folder that the benchmark is started in, the one of the results, the
data and files of weights are to be shared by them, under the same paths; the first two are checked.
"""

import logging
import os
import shutil
import socket
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from ray.exceptions import RayError

    from .pipeline import BenchmarkJob

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # a job that takes its worker down with it, for instance by memory, would do so forever
_OBJECT_STORE = 100 * 2**20  # bytes; Ray's default is 30 % of the memory, and rows of results are small
# Ray reads them when it is imported.
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",  # it reports nothing to its makers
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # `uv run` does not make it copy this folder
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # it does not print the logs of processes that died: hundreds of lines
}
_NOTICE = 60.0  # seconds without news after which it is said why
_GRACE = 10.0  # seconds for stopped jobs to remove their temporary files


class Task(NamedTuple):
    """A job, and what it is called in the progress: its number and what distinguishes it."""

    number: str
    name: str
    job: "BenchmarkJob"


class Outcome(NamedTuple):
    """What came of a job: its row of the results, or how it failed, or neither if another run had done it."""

    row: dict[str, Any] | None = None
    error: str = ""

    def __str__(self) -> str:
        """Say it in the progress."""
        if self.row is None:
            return self.error or "done by another run"
        auroc = f", image AUROC {self.row['image_AUROC']:.3f}" if "image_AUROC" in self.row else ""
        return f"{self.row['job_duration']:.1f} s{auroc}"


class Cluster:
    """Ray on this machine, or the cluster that ``RAY_ADDRESS`` names.

    Args:
        accelerators (list[str]): What jobs run on, ``"cpu"`` or ``"cuda"``.
        workers (int | None): Jobs at the same time on this machine; ``None`` takes one for each GPU. Defaults to
            ``None``.

    Raises:
        ValueError: If Ray is not installed, or it cannot be started so.
    """

    def __init__(self, accelerators: list[str], workers: int | None = None) -> None:
        self.address = os.environ.get("RAY_ADDRESS", "")
        self.accelerators = accelerators
        self.workers = workers
        msg, gpus = "", torch.cuda.device_count()
        if find_spec("ray") is None:
            msg = "--engine ray needs Ray, which is not installed: pip install 'anomalib-spg-lake[cluster]'."
        elif "://" in self.address:
            msg = f"RAY_ADDRESS={self.address} is a Ray client's. Start this on a machine of the cluster, with "
            msg += "RAY_ADDRESS=auto."
        elif self.address and workers is not None:
            msg = f"--workers is for Ray on this machine, but RAY_ADDRESS={self.address} names a cluster. How many jobs"
            msg += " a machine of it takes at a time is said when it joins: ray start --num-cpus or --num-gpus."
        elif workers is not None and workers < 1:
            msg = f"--workers {workers}: it must be at least 1."
        elif not self.address and "cpu" in accelerators and workers is None:
            msg = "accelerator is cpu: say with --workers how many jobs run at the same time."
        elif not self.address and "cuda" in accelerators and (workers or 1) > gpus:
            msg = f"{workers or 1} jobs at the same time on cuda need as many GPUs, but torch finds {gpus} here."
        if msg:
            raise ValueError(msg)

    def run(self, tasks: list[Task], work: Callable[[Task], Outcome], output: Path) -> Iterator[tuple[Task, Outcome]]:
        """Run jobs, and print which have started and which are run again.

        Args:
            tasks (list[Task]): The jobs.
            work (Callable[[Task], Outcome]): Runs one, in a worker.
            output (Path): Folder of the results.

        Yields:
            tuple[Task, Outcome]: Every job with what came of it, in the order in which they finish.

        Raises:
            ConnectionError: If there is no cluster at ``RAY_ADDRESS``.
            RuntimeError: If a machine of the cluster cannot run the jobs.
        """
        if not tasks:
            return
        with self._connected(), _shared(output) as place:
            yield from _follow(tasks, work, place)

    @contextmanager
    def _connected(self) -> Generator[None, None, None]:
        """Start or join Ray, and leave or end it."""
        os.environ.update(_RAY)
        import ray

        logging.getLogger("ray").propagate = True  # into the benchmark's log; else it would print warnings
        quiet: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
        folder = None if self.address else tempfile.mkdtemp(prefix="ray-")
        try:
            if self.address:
                self._check_address()
                ray.init(address=self.address, **quiet)
            else:
                ray.init(
                    address="local",
                    num_cpus=self.workers or 1,
                    num_gpus=(self.workers or torch.cuda.device_count()) if "cuda" in self.accelerators else 0,
                    object_store_memory=_OBJECT_STORE,
                    include_dashboard=False,
                    _temp_dir=folder,
                    **quiet,
                )
            self._check_resources()
            yield
        finally:
            ray.shutdown()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)

    def _check_address(self) -> None:
        """See that somebody answers: Ray itself tries for more than five minutes."""
        host, _, port = self.address.rpartition(":")
        if host and port.isdigit():
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
            except OSError as exception:
                msg = f"No Ray cluster answers at RAY_ADDRESS={self.address} ({exception}). `ray start --head` starts "
                msg += "one, `ray status` shows it; RAY_ADDRESS=auto finds that of this machine."
                raise ConnectionError(msg) from exception

    def _check_resources(self) -> None:
        """Say what Ray has, or that it lacks what the jobs need."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        counts = {name: int(sum(node.get(name, 0) for node in nodes)) for name in ("CPU", "GPU")}
        for accelerator in self.accelerators:
            if not counts[_resource(accelerator)]:
                msg = f"accelerator is {accelerator}, but the Ray cluster at {self.address} has no "
                msg += f"{_resource(accelerator)}. It has {len(nodes)} machines. Set accelerator in the config to what "
                msg += "there is, or add machines with `ray start`."
                raise ValueError(msg)
        has = " and ".join(f"{counts[name]} {name}s" for name in sorted(map(_resource, self.accelerators)))
        machines = f"{len(nodes)} machines of {self.address}" if self.address else "this machine"
        print(f"Ray on {machines}: {has}, a job takes one", flush=True)


class _Place(NamedTuple):
    """What a worker must find, and how many threads it uses if that is set."""

    folder: Path  # the one that the benchmark was started in
    token: Path  # a file among the results
    threads: str | None


@contextmanager
def _shared(output: Path) -> Generator[_Place, None, None]:
    """Leave a file among the results, for workers to see, while the benchmark runs."""
    token = output.absolute() / f".cluster-{uuid.uuid4().hex}"
    token.parent.mkdir(parents=True, exist_ok=True)
    token.touch()
    try:
        yield _Place(Path.cwd(), token, os.environ.get("OMP_NUM_THREADS"))
    finally:
        token.unlink(missing_ok=True)


def _follow(tasks: list[Task], work: Callable[[Task], Outcome], place: _Place) -> Iterator[tuple[Task, Outcome]]:
    """Give Ray the jobs that may start, and tell what it says of them."""
    import ray

    remote: Any = ray.remote(num_returns="streaming", max_retries=0)(_in_worker)  # Ray's own retries are silent
    running: dict[Any, Task] = {}
    waiting, started, lost = list(tasks), set[str](), Counter[str]()
    try:
        while waiting or running:
            for task in list(waiting):
                if _must_wait(task.job, running.values()):
                    continue
                waiting.remove(task)
                needs = {"num_cpus": 0, "num_gpus": 1} if task.job.accelerator == "cuda" else {"num_cpus": 1}
                running[remote.options(**needs).remote(task, work, place)] = task
            ready, _ = ray.wait(list(running), timeout=_NOTICE)
            if not ready and not started:
                print("Waiting for a worker: they start slowly, others use them, or machines were lost", flush=True)
            for stream in ready:
                task, news = running[stream], _news(stream)
                if isinstance(news, str):
                    started.add(task.number)
                    print(f"{task.number} {task.name}: started on {news}", flush=True)
                    continue
                del running[stream]
                started.discard(task.number)
                if isinstance(news, Outcome):
                    yield task, news
                    continue
                lost[task.number] += 1
                logger.warning("%s lost: %s", task.name, news)
                reason = f"{type(news).__name__}: {str(news).strip().splitlines()[0].split('. ')[0].rstrip('.')}"
                if lost[task.number] < ATTEMPTS:
                    waiting.insert(0, task)
                    print(f"{task.number} {task.name}: LOST, will run again ({reason})", flush=True)
                else:
                    yield task, Outcome(error=f"FAILED, lost {ATTEMPTS} times, at last by {reason}")
    finally:
        if running:
            for stream in running:  # as Ctrl+C does, so that they remove their temporary files
                ray.cancel(stream)
            ray.wait([stream.completed() for stream in running], num_returns=len(running), timeout=_GRACE)


def _news(stream: Any) -> "str | Outcome | RayError":  # noqa: ANN401
    """What a running job says next: where it has started, what came of it, or that its worker was lost."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(next(stream))
    except RayTaskError as exception:  # the machine's fault: a job's own exceptions come as outcomes
        msg = f"A machine of the cluster cannot run the jobs: {exception.cause or exception}"
        raise RuntimeError(msg) from exception
    except RayError as exception:
        return exception


def _must_wait(job: "BenchmarkJob", running: Iterable[Task]) -> bool:
    """Whether a running job is the same, or learns the guides that this one needs."""
    return any(
        other.job.key == job.key or (job.guides and other.job.guides == job.guides and not job.guides.exists())
        for other in running
    )


def _in_worker(task: Task, work: Callable[[Task], Outcome], place: _Place) -> Iterator[str | Outcome]:
    """Run a job: first say where, then what came of it."""
    import ray

    host = socket.gethostname()
    if not (place.folder.is_dir() and place.token.exists()):
        missing = place.token.parent if place.folder.is_dir() else place.folder
        msg = f"{host} does not see the folder '{missing}' of the machine that the benchmark was started on. All "
        msg += "machines must share that folder, the results (--output), the data and files of weights, under the same "
        msg += "paths."
        raise FileNotFoundError(msg)
    os.chdir(place.folder)  # Ray's own is where `ray start` ran
    node = next(node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    together = int(node["Resources"].get(_resource(task.job.accelerator), 1))
    torch.set_num_threads(int(place.threads or max(1, (os.cpu_count() or 1) // together)))  # Ray would use one
    yield ", ".join([host, *(f"GPU {number}" for number in ray.get_gpu_ids())])
    yield work(task)


def _resource(accelerator: str) -> str:
    """Ray's name of it."""
    return "GPU" if accelerator == "cuda" else "CPU"
