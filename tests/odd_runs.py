# SPDX-License-Identifier: Apache-2.0

"""What is done with the inputs of the catalogue, and what must hold then."""

import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import traceback
import zlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.models import Patchcore
from jsonargparse import ArgumentParser
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from anomalib_lake import LAKE
from anomalib_spg import SPG, ExplanationVisualizer
from anomalib_spg.components.files import load_tensors
from anomalib_spg.explanations.report import write_report
from tests.odd_inputs import SIZE, Case, build, good_parts, quiet_engine


class Right(NamedTuple):
    """It works, and this holds of the result."""

    holds: Callable[[Case, Any], None]


class Error(NamedTuple):
    """It is refused with this type of error, and the message says this."""

    type: Any
    says: str


class Row(NamedTuple):
    """A kind of input."""

    words: str
    prepare: Callable[[Case], Any]
    act: Callable[[Case, Any], Any]
    outcome: Right | Error | tuple[Right | Error, ...]  # either of several


def section(title: str, act: Callable[[Case, Any], Any], *rows: tuple) -> list[Row]:
    """Rows of one subject, with which the same is done."""
    return [Row(f"{title}: {words}", prepare, act, outcome) for words, prepare, outcome in rows]


def several(title: str, *rows: tuple) -> list[Row]:
    """Rows of one subject, each with what is done with it."""
    return [Row(f"{title}: {words}", prepare, act, outcome) for words, prepare, act, outcome in rows]


# What is done with an input


def predict(case: Case, path: Any, model: Any = None, trainer: dict | None = None, **arguments: Any) -> list[Any]:
    """`anomalib predict` with the fitted LAKE, or another model."""
    run = quiet_engine(case.folder / "results", **trainer or {})
    return run.predict(model=model or case.made.lake, data_path=path, **arguments)


def predict_with(kind: type, trainer: dict | None = None, **arguments: Any) -> Callable[[Case, Any], Any]:
    """`anomalib predict` with the fitted model of that kind and other arguments."""

    def act(case: Case, path: Any) -> Any:
        checkpoint = case.made.lake_checkpoint if kind is LAKE else case.made.spg_checkpoint
        return predict(case, path, build(kind, **arguments), trainer, ckpt_path=checkpoint)

    return act


def predict_from(kind: type, **arguments: Any) -> Callable[[Case, Any], Any]:
    """`anomalib predict` on good parts, from that checkpoint."""
    return lambda case, path: predict(case, case.good(2), build(kind, **arguments), ckpt_path=path)


def fit(kind: type, data: Callable = good_parts, trainer: dict | None = None, **arguments: Any) -> Callable:
    """`anomalib train` on a folder."""

    def act(case: Case, path: Any) -> Any:
        model = build(kind, **arguments)
        quiet_engine(case.folder / "results", **trainer or {}).fit(model=model, datamodule=data(path))
        return model

    return act


def fit_with(kind: type, name: str, **arguments: Any) -> Callable[[Case, Any], Any]:
    """`anomalib train` on good parts, with that path as an argument."""
    return lambda case, path: fit(kind, **{**arguments, name: path})(case, case.good())


def zero_shot(case: Case, path: Any, **arguments: Any) -> Any:
    """Guides learned elsewhere: backbone, layers and size are the file's."""
    given = {"backbone": None, "layers": None, "image_size": None, "pre_trained": True, "weights": case.made.weights}
    return fit_with(SPG, "guides_file", **{**given, **arguments})(case, path)


def command(case: Case, arguments: list[Any]) -> Any:
    """The `anomalib` command, in this process."""
    del case
    return AnomalibCLI(args=[str(argument) for argument in arguments])


# What must hold where it works


def decided(case: Case, result: list[Any], count: int | None = None) -> None:
    """Every image has a finite score, a decision, a map, and a row of its own in the table."""
    for batch in result:
        assert torch.isfinite(batch.pred_score).all()
        assert ((batch.pred_score >= 0) & (batch.pred_score <= 1)).all()
        assert batch.pred_label.dtype == torch.bool
        assert batch.anomaly_map.shape[-2:] == (SIZE, SIZE)
        assert torch.isfinite(batch.anomaly_map).all()
    paths = [path for batch in result for path in batch.image_path]
    assert len(set(paths)) == len(paths) > 0
    assert count is None or len(paths) == count
    table = pd.read_csv(next((case.folder / "results").rglob("predictions.csv")), keep_default_na=False)
    assert table.image.tolist() == [path.encode(errors="backslashreplace").decode() for path in paths]
    assert set(table.decision) <= {"accepted", "rejected"}


def like_its_twin(case: Case, result: list[Any]) -> None:
    """The odd file gets the score of the same picture as an 8-bit PNG."""
    decided(case, result, 2)
    scores = [float(batch.pred_score) for batch in result]
    assert scores[0] == pytest.approx(scores[1], abs=0.03)


def pictured(case: Case, result: list[Any]) -> None:
    """Every image has pictures of its own as well."""
    decided(case, result)
    found = (case.folder / "results").rglob("images/**/*")
    # Python 3.13 also looks below the link `latest`; the pictures themselves may be of linked images.
    pictures = {path.parent.resolve() / path.name for path in found if path.is_file()}
    assert len(pictures) == sum(len(batch.image_path) for batch in result)


def explained(case: Case, result: list[Any]) -> None:
    """Every image has an explanation of its own, and there is a page."""
    pictured(case, result)
    found = next((case.folder / "results").rglob("explanations_of_predictions"))
    assert (found / "index.html").is_file()
    records = json.loads((found / "explanations.json").read_text(encoding="utf-8"))["images"]
    pictures = {(found / record["picture"]).resolve() for record in records}
    assert len(pictures) == len(records) == sum(len(batch.image_path) for batch in result)
    assert all(path.is_file() for path in pictures)


def fitted(case: Case, model: Any) -> None:
    """It has learned and decides: its thresholds and scores are finite."""
    del case
    assert model.model.is_fitted
    assert torch.isfinite(model.post_processor.image_threshold)
    assert torch.isfinite(model.post_processor.pixel_threshold)
    result = model.cpu().float().eval()(torch.rand(2, 3, 50, 60))
    assert torch.isfinite(result.pred_score).all()
    assert torch.isfinite(result.anomaly_map).all()


def learned(case: Case, model: Any) -> None:
    """There are guides; a threshold would come from the target's good images."""
    vectors = [guides.vectors for guides in model.model.guides]
    assert all(torch.isfinite(vector).all() and vector.any(dim=1).all() for vector in vectors)
    assert len(list((case.folder / "results").rglob("guides.safetensors"))) == 1


def fitted_on_the_pictures(case: Case, model: Any) -> None:
    """It has seen what 8-bit files show: their parts are good, and a bad one is worse."""
    fitted(case, model)
    good, bad = (
        [float(batch.pred_score) for batch in predict(case, path, model)]
        for path in (case.made.parts, case.made.defects)
    )
    assert np.median(good) < 0.5
    assert min(bad) > np.median(good)


def rejected(case: Case, result: list[Any]) -> None:
    """Every image is rejected, and its score is empty in the table."""
    assert all(batch.pred_label.all() for batch in result)
    table = pd.read_csv(next((case.folder / "results").rglob("predictions.csv")))
    assert (table.decision == "rejected").all()
    assert table.score.isna().all()


def not_fitted(case: Case, model: Any) -> None:
    """It has learned nothing, and does not pretend to."""
    assert not model.model.is_fitted
    with pytest.raises(RuntimeError, match="yet"):
        predict(case, case.made.parts, model)


def tokens_gone(case: Case, model: Any) -> None:
    """The run went on from what was left, and cleared it away."""
    fitted(case, model)
    assert not list((case.folder / "tokens").rglob("*.safetensors"))


def without_error(case: Case, result: Any) -> None:
    """There is nothing more to say."""


# What must hold after a run, whatever came of it


def hashes(*folders: Path) -> dict[Path, int]:
    """Checksum of every file below some folders, links followed no further than files."""
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path: zlib.crc32(path.read_bytes()) for path in files}


def check_whole(paths: list[Path]) -> None:
    """What was written is complete: no temporary files, and each opens as what it is called."""
    for path in paths:
        assert not path.name.endswith((".tmp", ".part")), f"a temporary file is left: {path}"
        assert path.stat().st_size > 0 or path.suffix in {".log", ".lock"}, f"an empty file is left: {path}"
        if path.suffix == ".ckpt":
            assert "state_dict" in torch.load(path, weights_only=True, map_location="cpu")
        elif path.suffix == ".safetensors":
            load_tensors(path)
        elif path.suffix in {".png", ".jpg"}:
            with Image.open(path) as image:
                image.load()
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))


# Processes


class Killed(Exception):  # noqa: N818  # a fact, not a mistake
    """A process was ended by a signal."""


def in_a_process(act: Callable[[], Any], *, largest_file: int | None = None, timeout: float = 60) -> None:
    """Run something in a process of its own, and raise here what it raises there.

    Args:
        act (Callable): What to run; the process is forked, so anything will do.
        largest_file (int | None): No file can grow beyond this many bytes, as on a full disk.
        timeout (float): Seconds after which it is given up.
    """
    start(act, largest_file).wait(timeout)


class Process:
    """A forked process that tells what it raised."""

    def __init__(self, act: Callable[[], Any], largest_file: int | None) -> None:
        context = multiprocessing.get_context("fork")
        self.ours, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(act, theirs, largest_file), daemon=True)
        self.process.start()
        theirs.close()

    def wait(self, timeout: float = 60) -> None:
        """Wait for the end; raise what it raised, or :class:`Killed`."""
        said = None
        if self.ours.poll(timeout):
            try:
                said = self.ours.recv()
            except EOFError:
                said = None
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            msg = f"the process did not end in {timeout} seconds"
            raise TimeoutError(msg)
        if self.process.exitcode is not None and self.process.exitcode < 0:
            raise Killed(signal.Signals(-self.process.exitcode).name)
        if said is not None:
            raise said


def start(act: Callable[[], Any], largest_file: int | None = None) -> Process:
    """Start a process; see :func:`in_a_process`."""
    return Process(act, largest_file)


def _run(act: Callable[[], Any], pipe: Any, largest_file: int | None) -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    said: BaseException | None = None
    try:
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        act()
    except BaseException as exception:  # noqa: BLE001  # told to the other side, whatever it is
        said = exception
        try:
            pickle.loads(pickle.dumps(exception))
        except Exception:  # noqa: BLE001
            said = RuntimeError("".join(traceback.format_exception(exception)))
    pipe.send(said)
    pipe.close()
    os._exit(0)


@contextmanager
def signal_at(place: str, number: int) -> Generator[None, None, None]:
    """Send this process a signal where a function is called: power off, or Ctrl+C."""
    with patch(place, side_effect=lambda *_, **__: os.kill(os.getpid(), number)):
        yield


def again(**arguments: Any) -> Callable[[Case, Any], Any]:
    """The same command again, with tokens on disk."""

    def act(case: Case, path: Any) -> Any:
        given = {"memory_limit": 0, "weights": case.made.weights, "pre_trained": True, **arguments}
        return fit(SPG, partial(good_parts, train_batch_size=2), **given)(case, path)

    return act


def others_stay(case: Case, model: Any) -> None:
    """The other run's tokens are still there."""
    fitted(case, model)
    assert len(list((case.folder / "tokens").rglob("*.safetensors"))) > 2


def by_the_script(case: Case, arguments: list[Any]) -> None:
    """The `anomalib` command, in a process of its own."""
    script = [str(Path(sys.executable).parent / "anomalib"), *map(str, arguments)]
    done = subprocess.run(script, cwd=case.folder, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)


def killed_by_the_script(case: Case, arguments: list[Any]) -> None:
    """The `anomalib` command, killed in the middle of its training, and then again."""
    script = [str(Path(sys.executable).parent / "anomalib"), *map(str, arguments)]
    long = [*script, "--model.sae_epochs", "1000000"]
    running = subprocess.Popen(long, cwd=case.folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    for line in running.stderr or ():
        if "dictionary" in line:
            break
    running.kill()
    running.communicate()
    assert list((case.folder / "tokens").rglob("*.safetensors"))
    by_the_script(case, [*arguments, "--model.sae_epochs", "1"])
    assert not list((case.folder / "tokens").rglob("*.safetensors"))


def killed(place: str, kind: type = SPG, number: int = signal.SIGKILL, **arguments: Any) -> Callable[[Case, Any], Any]:
    """A fit whose process gets a signal where a function is called, and then the same again."""

    def act(case: Case, path: Any) -> Any:
        run = fit(kind, partial(good_parts, train_batch_size=2), **arguments)

        def until_then() -> None:
            if number == signal.SIGINT:  # which a shell has what it starts in the background ignore
                signal.signal(number, signal.default_int_handler)
            with signal_at(place, number):
                run(case, path)

        with pytest.raises((Killed, SystemExit, KeyboardInterrupt)):
            in_a_process(until_then)
        return run(case, path)

    return act


def half_a_file(*arguments: Any) -> None:
    """Killed while the second file of tokens is written."""
    Path(arguments[1]).write_bytes(b"half")
    if "000001" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    save_file(*arguments)


def killed_while_writing(case: Case, path: Any) -> Any:
    """Killed in the middle of a file of tokens, and then again."""

    def until_then() -> None:
        with patch("anomalib_spg.components.files.save_file", side_effect=half_a_file):
            again()(case, path)

    with pytest.raises(Killed):
        in_a_process(until_then)
    return again()(case, path)


def on_a_full_disk(kind: type, largest_file: int, **arguments: Any) -> Callable[[Case, Any], Any]:
    """A fit where no file can grow beyond so many bytes."""
    return lambda case, path: in_a_process(lambda: fit(kind, **arguments)(case, path), largest_file=largest_file)


def predict_on_a_full_disk(case: Case, path: Any) -> None:
    """A prediction whose table does not fit."""
    in_a_process(lambda: predict(case, path), largest_file=10)


def at_once(act: Callable[[Case, Any], Any], count: int = 2) -> Callable[[Case, Any], Any]:
    """The same in several processes at the same time."""

    def together(case: Case, path: Any) -> None:
        processes = [start(lambda: act(case, path)) for _ in range(count)]
        for process in processes:
            process.wait()

    return together


def each_left(pattern: str, count: int = 2) -> Right:
    """Each process has left its own file."""

    def holds(case: Case, result: Any) -> None:
        del result
        assert len(list((case.folder / "results").rglob(pattern))) == count

    return Right(holds)


def twice(kind: type, **arguments: Any) -> Callable[[Case, Any], Any]:
    """The same object fitted on one folder, and then on another."""

    def act(case: Case, path: Any) -> Any:
        model = build(kind, **arguments)
        for source in (case.good(5, "first"), path):
            quiet_engine(case.folder / "results").fit(model=model, datamodule=good_parts(source))
        return model

    return act


def again_after_an_error(kind: type) -> Callable[[Case, Any], Any]:
    """The same object fitted on a damaged folder, and then on a good one."""

    def act(case: Case, path: Any) -> Any:
        model = build(kind)
        shutil.copytree(path, case.folder / "broken")
        for image in (case.folder / "broken").iterdir():
            image.write_bytes(b"")
        with pytest.raises(ValueError, match="broken"):
            quiet_engine(case.folder / "results").fit(model=model, datamodule=good_parts(case.folder / "broken"))
        shutil.rmtree(case.folder / "broken")
        quiet_engine(case.folder / "results").fit(model=model, datamodule=good_parts(path))
        return model

    return act


def export(case: Case, arguments: tuple[Any, str]) -> Any:
    """`anomalib export`."""
    model, kind = arguments
    return quiet_engine(case.folder / "results").export(model, kind, export_root=case.folder / "exported")


def predict_explained(case: Case, path: Any) -> list[Any]:
    """`anomalib predict` with the fitted LAKE and explanations of all images."""
    return predict_with(LAKE, visualizer=ExplanationVisualizer("all"))(case, path)


def explain_patchcore(case: Case, path: Any) -> Any:
    """`anomalib predict` with a model of anomalib, which gives no explanations."""
    return predict(case, path, Patchcore("resnet18", pre_trained=False, visualizer=ExplanationVisualizer()))


def build_with(kind: type, **arguments: Any) -> Callable[[Case, Any], Any]:
    """Build a model."""
    return lambda case, value: build(kind, **arguments)  # noqa: ARG005


def report(case: Case, path: Path) -> Path:
    """`python -m anomalib_spg.explanations.report`."""
    del case
    return write_report(path)


def loader_only(case: Case, path: Any) -> Any:
    """A fit by a dataloader, without a datamodule."""
    data = good_parts(path)
    data.setup()
    loader = DataLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn)
    model = build(LAKE)
    quiet_engine(case.folder / "results").fit(model=model, train_dataloaders=loader)
    return model


NAMELESS = {"backbone": ""}  # what messages call them


def says(name: str, value: Any) -> str:
    """A pattern: the argument's name, and its value after that."""
    return rf"{NAMELESS.get(name, name)}.*{re.escape(str(value))}"


def refused(kind: type, **faults: list) -> list[Row]:
    """Values that an argument cannot have, each a row; where others must stand beside it, a dictionary of all."""
    rows = []
    for name, values in faults.items():
        for value in values:
            arguments = value if isinstance(value, dict) else {name: value}
            outcome = Error((ValueError, RuntimeError), says(name, arguments[name]))
            words = ", ".join(f"{key}={content!r}" for key, content in arguments.items())
            rows.append((words, lambda _, given=arguments: given, outcome))
    return section(kind.__name__, lambda _, arguments: build(kind, **arguments), *rows)


@cache
def parser(kind: type) -> ArgumentParser:
    """Reads arguments as `anomalib` does."""
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(kind)
    return made


def mistyped(kind: type, **faults: list) -> list[Row]:
    """Values of a type that an argument of a config cannot have, each a row."""
    rows = [
        (f"{name}={value!r}", lambda _, given={name: value}: given, Error(Exception, says(name, "")))
        for name, values in faults.items()
        for value in values
    ]
    return section(f"{kind.__name__}, type", lambda _, arguments: parser(kind).parse_object(arguments), *rows)


def check(row: Row, case: Case, printed: Callable[[], str]) -> None:
    """Prepare an input, act on it, and check what must come of it and what must stay.

    Args:
        row (Row): Kind of input.
        case (Case): Where it goes.
        printed (Callable[[], str]): Gives what was printed to the standard error since the last call.
    """
    value = row.prepare(case)
    before = hashes(case.folder, case.made.folder)
    printed()
    outcomes = row.outcome if isinstance(row.outcome[0], Right | Error) else (row.outcome,)
    raised, result = None, None
    try:
        result = row.act(case, value)
    except BaseException as exception:
        if not any(isinstance(outcome, Error) and isinstance(exception, outcome.type) for outcome in outcomes):
            raise
        raised = exception
    if raised is None:
        rights = [right for right in outcomes if isinstance(right, Right)]
        assert rights, f"There is no error; one should say '{outcomes[0].says}'."
        rights[0].holds(case, result)
    else:
        message = f"{raised}\n{printed()}"
        patterns = [error.says for error in outcomes if isinstance(error, Error) and isinstance(raised, error.type)]
        found = any(re.search(pattern, message, re.DOTALL | re.IGNORECASE) for pattern in patterns)
        assert found, f"{type(raised).__name__} without '{patterns[0]}': {message}"
    after = hashes(case.folder, case.made.folder)
    for path, checksum in before.items():
        used_up = raised is None and (path.parent.parent.name == "tokens" or path.suffix == ".lock")  # it ended well
        assert used_up or after.get(path) == checksum, f"{path} was changed"
    check_whole([path for path in after if path not in before])
    assert not (case.folder / "code_was_run").exists(), "code in a file was run"
