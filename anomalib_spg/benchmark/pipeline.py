# SPDX-License-Identifier: Apache-2.0

"""A paper's table in one command, from the YAML that ``anomalib benchmark`` reads.

    python -m anomalib_spg.benchmark --config configs/benchmark/spg_visa_to_mvtecad.yaml

What it does beyond ``anomalib benchmark``:

- Models of all learning types run, and one file may combine models with different arguments and metrics.
- Every model is evaluated with the same metrics (:func:`anomalib_spg.components.evaluator.benchmark_evaluator`) on the
  ranking of its raw scores (:class:`anomalib_spg.components.raw_scores.RawScorePostProcessor`).
- Every finished job is written to ``<output>/results.csv`` at once, and the same command resumes an interrupted run. A
  failing job is reported, and the others still run. Several runs may write to one folder at the same time.
  ``<output>/results.json`` holds the same with typed values, the configs and the versions of packages.
- SPG jobs with the same guides learn them once, into ``<output>/guides``: those that differ only in the target of
  :class:`anomalib_spg.AuxiliaryTarget`, or in arguments that act at inference only.

The config has two extensions: ``benchmark:`` may be a list of blocks, and a ``grid:`` may be nested in an entry of
another. For models without an argument for the image size, such as anomalib's own, ``image_size:`` goes beside
``init_args:``; so does ``trainer:``, a section of arguments of Lightning's trainer such as ``max_epochs``, for models
that do not set them. Jobs run one after another on one device, or, with ``--engine ray``, on all GPUs of this machine
or of a cluster (:mod:`.cluster`).
"""

import dataclasses
import hashlib
import inspect
import json
import logging
import shutil
import socket
import sys
import time
from collections.abc import Generator
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pandas as pd
import torch
import yaml  # type: ignore[import-untyped]  # its stubs are a package of their own
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import get_datamodule
from anomalib.engine import Engine
from anomalib.models import AnomalibModule, get_model
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.base import Pipeline, Runner
from anomalib.utils.config import flatten_dict
from anomalib.utils.logging import LoggerRedirectError, hide_output
from jsonargparse import ArgumentParser, Namespace
from lightning import seed_everything
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_spg.components.backbone import Backbone
from anomalib_spg.components.evaluator import benchmark_evaluator
from anomalib_spg.components.files import atomic_write
from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from anomalib_spg.components.raw_scores import RawScorePostProcessor
from anomalib_spg.components.unreadable import datasets_of
from anomalib_spg.datamodule import set_up
from anomalib_spg.dataset_folders import check_category
from anomalib_spg.settings import GuideSettings

from .checks import check_names
from .cluster import Cluster, Outcome, Task
from .contents import contents
from .grids import expand_all
from .results import append_row, read_rows, versions, write_jobs, write_json
from .tables import identify, read_results, results_table

logger = logging.getLogger(__name__)

# SPG's arguments that determine the guides: those of the tokens, and of learning from them.
_GUIDE_ARGUMENTS = {
    "backbone",
    *inspect.signature(Backbone).parameters,
    *(field.name for field in dataclasses.fields(GuideSettings)),
    *("views", "hold_out", "seed", "temperature", "pre_processor"),
}


class BenchmarkJob(Job):
    """One model on one dataset, with one seed.

    Args:
        accelerator (str): Where it runs, ``"cpu"`` or ``"cuda"``.
        config (dict[str, Any]): ``seed``, ``model`` and ``data``, without grids.
        output (Path): Folder of the results.

    Attributes:
        key (str): Hash of all that, and of the contents of files that the model's arguments name; if the results have
            a row with this key, the job is done.
        guides (Path | None): Where SPG's guides are shared with other jobs; ``None`` for other models.
    """

    name = "benchmark"

    def __init__(self, accelerator: str, config: dict[str, Any], output: Path) -> None:
        super().__init__()
        self.accelerator = accelerator
        self.config = config
        held = contents(config["model"])
        self.flat = {"accelerator": accelerator, **flatten_dict(config), **held}
        self.key = _digest(self.flat)
        training = training_config(config)
        learned_by = [accelerator, training, *filter(None, [held])]
        self.guides = training and output / "guides" / f"{_digest(learned_by)}.safetensors"

    @hide_output
    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Fit and test.

        Args:
            task_id (int | None): Unused; a job uses the first device that it sees.

        Returns:
            dict[str, Any]: The row of the results: key, durations in seconds, numbers of good and bad test images,
                configuration, metrics.
        """
        del task_id
        start = time.time()
        seed_everything(self.config["seed"], workers=True)
        model, datamodule = self._build_model(), get_datamodule(self.config["data"])
        check_category(datamodule)  # FewShot and AuxiliaryTarget do so themselves
        datamodule.prepare_data()
        set_up(datamodule, TrainerFn.FITTING, self.config["seed"])  # so that all models have the same splits
        trainer = self.config["model"].get("trainer", {})
        taken = sorted({"accelerator", "devices", "default_root_dir", "callbacks"} & set(trainer))
        if taken:
            msg = f"trainer: sets {', '.join(taken)} of {model.name}, which the benchmark sets itself. Leave them out."
            raise ValueError(msg)
        with TemporaryDirectory() as folder:
            engine = Engine(
                accelerator=self.accelerator,
                devices=1,
                default_root_dir=folder,
                callbacks=[ModelCheckpoint(save_top_k=0)],  # nobody needs a checkpoint per job
                **trainer,
            )
            fit_start = time.time()
            engine.fit(model=model, datamodule=datamodule)
            if self.guides and not self.guides.exists():
                learned = Path(engine.trainer.default_root_dir) / "weights" / "guides.safetensors"
                with atomic_write(self.guides) as temporary:
                    shutil.copyfile(learned, temporary)
            test_start = time.time()
            metrics = engine.test(model=model, datamodule=datamodule)[0]
        end = time.time()
        durations = {"job_duration": end - start, "fit_duration": test_start - fit_start}
        durations |= {"test_duration": end - test_start}
        shared = {"guides": self.guides.name} if self.guides else {}
        samples = [getattr(images, "samples", {}) for images in datasets_of(datamodule.test_dataloader())]
        labels = [label for known in samples for label in known.get("label_index", ())]
        tested = {"test_good": labels.count(0), "test_bad": labels.count(1)} if labels else {}
        return {"job": self.key, **shared, **durations, **tested, **self.flat, **metrics, **versions()}

    def _build_model(self) -> AnomalibModule:
        config = self.config["model"]
        if self.guides and self.guides.exists():
            config = {**config, "init_args": {**config.get("init_args", {}), "guides_file": str(self.guides)}}
        model = get_model(config)
        size = config.get("image_size")
        if not isinstance(model.post_processor, GoodPartsPostProcessor):
            model.post_processor = RawScorePostProcessor()
            if size is not None:
                model.pre_processor = model.configure_pre_processor(image_size=(size, size))
        elif size is not None:
            msg = f"image_size={size} stands beside init_args, but {model.name} takes it in init_args. Move it there."
            raise ValueError(msg)
        model.evaluator = benchmark_evaluator()
        model.visualizer = None  # drawing every test image takes longer than some models do
        return model

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> pd.DataFrame:
        """Make a table of rows that need not have the same columns."""
        return pd.DataFrame(results)

    @staticmethod
    def save(results: pd.DataFrame) -> None:
        """Nothing to save: every row has been written when its job was done."""


class BenchmarkJobGenerator(JobGenerator):
    """Makes jobs of the section ``benchmark`` of a config.

    Args:
        accelerators (list[str]): Accelerators to run every job on.
        output (Path): Folder of the results.
    """

    def __init__(self, accelerators: list[str], output: Path) -> None:
        self.accelerators = accelerators
        self.output = output

    @property
    def job_class(self) -> type[Job]:
        """The class of the jobs."""
        return BenchmarkJob

    def generate_jobs(
        self,
        args: dict | list | None = None,
        prev_stage_result: Any = None,  # noqa: ANN401
    ) -> Generator[BenchmarkJob, None, None]:
        """Make a job of every combination. Nothing is loaded before a job runs.

        Args:
            args (dict | list | None): A block of ``seed``, ``model`` and ``data`` with grids, or a list of them.
            prev_stage_result (Any): Unused.

        Yields:
            BenchmarkJob: The jobs.
        """
        del prev_stage_result
        for accelerator in self.accelerators:
            for config in expand_all(args):
                yield BenchmarkJob(accelerator, config, self.output)


class ResumingRunner(Runner):
    """Runs the jobs that have no results yet, and writes each result at once.

    Args:
        generator (BenchmarkJobGenerator): Makes the jobs.
        configs (dict[str, Any] | None): Where they come from, by the name of the file; goes into ``results.json``.
        cluster (Cluster | None): Where they run; ``None`` runs them here, one after another. Defaults to ``None``.
    """

    generator: BenchmarkJobGenerator

    def __init__(
        self,
        generator: BenchmarkJobGenerator,
        configs: dict[str, Any] | None = None,
        cluster: Cluster | None = None,
    ) -> None:
        super().__init__(generator)
        self.configs = configs or {}
        self.cluster = cluster

    def run(self, args: dict | list, prev_stage_results: Any = None) -> pd.DataFrame:  # noqa: ANN401
        """Run the jobs.

        Args:
            args (dict | list): Section ``benchmark`` of the config.
            prev_stage_results (Any): Unused.

        Returns:
            pd.DataFrame: Results of this run.

        Raises:
            RuntimeError: If jobs failed, after the others have run; names them.
        """
        jobs = list(self.generator.generate_jobs(args, prev_stage_results))
        output = self.generator.output
        settings = {job.key: job.flat for job in jobs}
        write_json(output, self.configs, settings)  # an older run may have left none
        write_jobs(output, ", ".join(self.configs), settings)
        done = {row["job"] for row in read_rows(output)}
        todo = [(job, name) for job, name in zip(jobs, names(jobs), strict=True) if job.key not in done]
        print(f"{len(jobs)} jobs, {len(jobs) - len(todo)} of them in {output / 'results.csv'} already", flush=True)
        numbers = range(len(jobs) - len(todo) + 1, len(jobs) + 1)
        tasks = [Task(f"[{number}/{len(jobs)}]", name, job) for number, (job, name) in zip(numbers, todo, strict=True)]
        results, failures = [], []
        with closing(self._outcomes(tasks)) as outcomes:
            for task, outcome in outcomes:
                if outcome.row is not None:
                    results.append(outcome.row)
                    append_row(output, outcome.row, list(settings))
                    write_json(output, self.configs, settings)
                elif outcome.error:
                    failures.append(task.name)
                print(f"{task.number} {task.name}: {outcome}" if self.cluster else f"    {outcome}", flush=True)
        if failures:
            msg = "\n  ".join([f"{len(failures)} of {len(jobs)} jobs failed, see above:", *failures])
            raise RuntimeError(msg)
        return self.generator.job_class.collect(results)

    def _outcomes(self, tasks: list[Task]) -> Generator[tuple[Task, Outcome], None, None]:
        output = self.generator.output
        if self.cluster:
            yield from self.cluster.run(tasks, partial(_attempt_in_worker, output), output)
            return
        for task in tasks:
            print(f"{task.number} {task.name}", flush=True)
            yield task, _attempt(output, task)


class Benchmark(Pipeline):
    """The pipeline behind ``python -m anomalib_spg.benchmark``.

    Example:
        >>> Benchmark.get_parser().parse_args(["--config", "configs/benchmark/lake_visa.yaml"]).output is None
        True
    """

    @staticmethod
    def _setup_runners(args: dict) -> list[Runner]:
        accelerators = args["accelerator"] if isinstance(args["accelerator"], list) else [args["accelerator"]]
        cluster = None
        if args["engine"] == "ray":
            cluster = Cluster(accelerators, args["workers"])
        elif args["workers"] is not None:
            msg = "--workers needs --engine ray."
            raise ValueError(msg)
        for accelerator in accelerators:
            if accelerator not in {"cpu", "cuda"}:
                msg = f"accelerator '{accelerator}' is unknown; choose cpu or cuda."
                raise ValueError(msg)
            if accelerator == "cuda" and not (torch.cuda.is_available() or (cluster and cluster.address)):
                msg = "accelerator is cuda, but torch finds no CUDA device here. Set accelerator to cpu in the config."
                raise ValueError(msg)
        generator = BenchmarkJobGenerator(accelerators, Path(args["output"]))
        return [ResumingRunner(generator, args["configs"], cluster)]

    def run(self, args: Namespace | None = None) -> None:
        """Run what the config says, and print the tables of all results in the output folder.

        Args:
            args (Namespace | None): ``config``, ``output``, ``engine`` and ``workers``; ``None`` takes them from the
                command line.

        Raises:
            RuntimeError: If jobs failed.
            ValueError: If the config is invalid, or what it says cannot be run.
        """
        args = args or self.get_parser().parse_args()
        try:
            config = self._get_args(args)
        except yaml.YAMLError as exception:
            msg = f"'{args.config}' is no YAML: {exception}"
            raise ValueError(msg) from exception
        if not isinstance(config, dict) or not {"accelerator", "benchmark"} <= set(config):
            msg = f"'{args.config}' needs the sections accelerator and benchmark, as configs of `anomalib benchmark`."
            raise ValueError(msg)
        output = Path(args.output or Path("runs/benchmark") / Path(args.config).stem)
        settings = {"output": output, "configs": {Path(args.config).name: config}}
        runners = self._setup_runners({**config, **settings, "engine": args.engine, "workers": args.workers})
        try:
            configs = list(expand_all(config["benchmark"]))
            check_names(configs)
        except ValueError as exception:
            msg = f"'{args.config}': {exception}"
            raise ValueError(msg) from exception
        if not configs or not config["accelerator"]:
            msg = f"'{args.config}' has no jobs: give accelerator, and in benchmark a block of seed, model and data."
            raise ValueError(msg)
        _log_to(output / "benchmark.log")
        try:
            for runner in runners:
                runner.run(config["benchmark"])
        finally:
            if read_rows(output):
                print(f"\n{results_table(read_results(output / 'results.csv'))}", flush=True)

    @staticmethod
    def get_parser(parser: ArgumentParser | None = None) -> ArgumentParser:
        """Command line: ``--config``, ``--output``, ``--engine`` and ``--workers``."""
        parser = parser or ArgumentParser(
            prog="python -m anomalib_spg.benchmark", description="A table in one command."
        )
        parser.add_argument("--config", type=str, required=True, help="YAML file in the form of `anomalib benchmark`.")
        parser.add_argument("--output", type=str | None, help="Folder; default: runs/benchmark/<name of the config>.")
        parser.add_argument(
            "--engine",
            type=Literal["sequential", "ray"],
            default="sequential",
            help="Jobs one after another, or by Ray: on this machine or, if RAY_ADDRESS names one, in a cluster.",
        )
        parser.add_argument(
            "--workers", type=int | None, help="With Ray on this machine: jobs at the same time; default: one per GPU."
        )
        return parser


def training_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The part of a config that SPG's guides depend on.

    Args:
        config (dict[str, Any]): A job's ``seed``, ``model`` and ``data``.

    Returns:
        dict[str, Any] | None: The same without the target dataset and without arguments that act at inference only;
            ``None`` if the job learns no guides.

    Example:
        >>> job = {"seed": 0, "model": {"class_path": "SPG", "init_args": {"k": 8, "sigma": 2}},
        ...        "data": {"class_path": "AuxiliaryTarget", "init_args": {"auxiliary": "Visa", "target": "MVTecAD"}}}
        >>> training_config(job)
        {'seed': 0, 'model': {'k': 8}, 'data': {'class_path': 'AuxiliaryTarget', 'auxiliary': 'Visa'}}
    """
    arguments = config["model"].get("init_args", {})
    if config["model"]["class_path"].split(".")[-1] != "SPG" or arguments.get("guides_file"):
        return None
    data = {"class_path": config["data"]["class_path"], **config["data"].get("init_args", {})}
    is_transfer = data["class_path"].split(".")[-1] == "AuxiliaryTarget"
    unused = {"eval_batch_size", "num_workers"} | ({"target", "target_args"} if is_transfer else set())
    trainer = {name: value for name, value in config["model"].items() if name == "trainer"}
    return {
        "seed": config["seed"],
        "model": {name: value for name, value in arguments.items() if name in _GUIDE_ARGUMENTS} | trainer,
        "data": {name: value for name, value in data.items() if name not in unused},
    }


def names(jobs: list[BenchmarkJob]) -> list[str]:
    """Name jobs by what distinguishes them: method, dataset, category, seed."""
    settings = pd.DataFrame([{key: str(value) for key, value in job.flat.items()} for job in jobs]).fillna("")
    return [f"{row.method}; {row.dataset} {row.category}; seed {row.seed}" for row in identify(settings).itertuples()]


def _attempt(output: Path, task: Task) -> Outcome:
    """Run a job, unless another run has done it meanwhile."""
    if any(row["job"] == task.job.key for row in read_rows(output)):
        return Outcome()
    start = time.time()
    try:
        return Outcome(task.job.run())
    except LoggerRedirectError as wrapped:
        error = wrapped.__cause__ or wrapped
        while not str(error) and error.__cause__:  # anomalib raises some without a word
            error = error.__cause__
        logger.exception("%s failed", task.name)
        return Outcome(error=f"FAILED after {time.time() - start:.1f} s: {type(error).__name__}: {error}")


def _attempt_in_worker(output: Path, task: Task) -> Outcome:
    """The same in another process: each machine has a log, since appending to one from several may lose lines."""
    _log_to(output / f"benchmark-{socket.gethostname()}.log")
    return _attempt(output, task)


def _log_to(path: Path) -> None:
    """Log to a file; anomalib's own redirect_logs writes every line several times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        filename=path, level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s", force=True
    )
    for name in logging.root.manager.loggerDict:
        logging.getLogger(name).handlers.clear()
    logging.captureWarnings(capture=True)


def _digest(value: Any) -> str:  # noqa: ANN401
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def main() -> None:
    """Command line: ``python -m anomalib_spg.benchmark --config FILE [--output FOLDER]``."""
    args = Benchmark.get_parser().parse_args()
    try:
        Benchmark().run(args)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the former into the latter
        sys.exit("\nInterrupted. The same command goes on with the jobs that are left.")
    except (OSError, RuntimeError, ValueError) as exception:
        sys.exit(f"error: {exception}")
