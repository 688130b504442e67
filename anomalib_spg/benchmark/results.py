# SPDX-License-Identifier: Apache-2.0

"""What a benchmark leaves: ``results.csv``, the same rows with typed values in ``results.json``, and ``jobs.json``.

The CSV file is what an interrupted run goes on from. ``results.json`` is made of it after every job: ``rows``, whose
columns ``versions.*`` say what computed them, and ``configs``, by file name, the configs they come from. ``jobs.json``
holds the jobs that each config asked for when it last ran, so that tables can tell what is missing.
"""

import json
import math
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock

from anomalib_spg.components.files import atomic_write

_PACKAGES = ("anomalib", "anomalib-spg-lake", "torch", "timm", "torchmetrics")
_NUMBERS = ("job_duration", "fit_duration", "test_duration", "test_good", "test_bad", "image_", "pixel_")


def versions() -> dict[str, str]:
    """Name the releases that results depend on.

    Returns:
        dict[str, str]: By column of the results, ``versions.torch`` for instance.
    """
    found = {"versions.python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(PackageNotFoundError):  # a source tree on the path is not installed
            found[f"versions.{name}"] = version(name)
    return found


def read_rows(output: Path) -> list[dict[str, str]]:
    """Read the rows of the results as text: pandas would change the numbers of columns with gaps.

    Args:
        output (Path): Folder of the results.

    Returns:
        list[dict[str, str]]: Rows of ``results.csv``, none if there is no such file.

    Raises:
        ValueError: If a benchmark of ours has not written that file.
    """
    path = output / "results.csv"
    if not path.exists():
        return []
    rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    if "job" not in rows:
        msg = f"'{path}' was not written by anomalib_spg.benchmark (it has no column 'job'). Choose another --output."
        raise ValueError(msg)
    return [{str(name): value for name, value in row.items()} for row in rows.to_dict("records")]


def append_row(output: Path, row: dict[str, Any], order: Sequence[str] = ()) -> None:
    """Add a row to ``results.csv``, unless its job has one.

    Args:
        output (Path): Folder of the results.
        row (dict[str, Any]): Values by column, ``job`` among them.
        order (Sequence[str]): Jobs in the order their rows are to have, after those of other jobs. Defaults to none.
    """
    texts = _texts(row)
    with _lock(output):
        rows = read_rows(output)
        if any(known["job"] == row["job"] for known in rows):
            return
        places = {job: place for place, job in enumerate(order, start=1)}
        rows = sorted([*rows, texts], key=lambda row: places.get(row["job"], 0))
        with atomic_write(output / "results.csv") as temporary:
            pd.DataFrame(rows).to_csv(temporary, index=False)


def write_json(output: Path, configs: dict[str, Any], settings: dict[str, dict[str, Any]]) -> None:
    """Make ``results.json`` of ``results.csv``.

    Rows of other runs keep the types they have in an earlier ``results.json``. If there is none, their settings are
    texts, as in the CSV file, and only their metrics and durations numbers.

    Args:
        output (Path): Folder of the results.
        configs (dict[str, Any]): Config of this run by its file's name.
        settings (dict[str, dict[str, Any]]): Settings of the jobs of this run, by job and column.

    Raises:
        ValueError: If there is a ``results.json`` that a benchmark of ours has not written.
    """
    path = output / "results.json"
    with _lock(output):
        earlier = _read_json(path)
        known = {row["job"]: row for row in earlier["rows"]}
        rows = [known.get(row["job"]) or _typed(row, settings.get(row["job"], {})) for row in read_rows(output)]
        if rows:
            whole = {"configs": {**earlier["configs"], **configs}, "rows": rows}
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(whole, indent=1, allow_nan=False, default=str), encoding="utf-8")


def write_jobs(output: Path, config: str, settings: dict[str, dict[str, Any]]) -> None:
    """Note in ``jobs.json`` what a config asks for, in the place of what it asked for before.

    Args:
        output (Path): Folder of the results.
        config (str): Name of its file.
        settings (dict[str, dict[str, Any]]): Settings of its jobs, by job and column.
    """
    texts = {job: _texts(values) for job, values in settings.items()}
    with _lock(output):
        whole = {**_read_jobs(output), config: texts}
        with atomic_write(output / "jobs.json") as temporary:
            temporary.write_text(json.dumps(whole, indent=1), encoding="utf-8")


def read_jobs(output: Path) -> list[dict[str, str]]:
    """Read which jobs were asked for.

    Args:
        output (Path): Folder of the results.

    Returns:
        list[dict[str, str]]: Settings as texts and ``job``, as in ``results.csv``; none if there is no ``jobs.json``.

    Raises:
        ValueError: If a benchmark of ours has not written that file.
    """
    return [{"job": job, **texts} for jobs in _read_jobs(output).values() for job, texts in jobs.items()]


def _read_jobs(output: Path) -> dict[str, dict[str, dict[str, str]]]:
    path = output / "jobs.json"
    try:
        whole = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if all(isinstance(texts, dict) for jobs in whole.values() for texts in jobs.values()):
            return whole
    except (AttributeError, ValueError):  # neither JSON of ours, nor JSON, nor text
        pass
    msg = f"'{path}' was not written by anomalib_spg.benchmark (it has no jobs by config). Move it elsewhere."
    raise ValueError(msg)


def _texts(values: dict[str, Any]) -> dict[str, str]:
    return {name: "" if value is None else str(value) for name, value in values.items()}


def _lock(output: Path) -> FileLock:
    """Another run may have the same output folder."""
    output.mkdir(parents=True, exist_ok=True)
    return FileLock(output / ".results.csv.lock")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {"configs": {}, "rows": []}
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(whole, dict) and {"configs", "rows"} <= set(whole):
            return whole
    except ValueError:  # no JSON, or no text
        pass
    msg = f"'{path}' was not written by anomalib_spg.benchmark (it has no configs and rows). Choose another --output."
    raise ValueError(msg)


def _typed(row: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """Give a row's values their types, and leave out columns that only other rows have.

    Example:
        >>> _typed({"job": "a", "seed": "0", "data.init_args.category": "01", "image_AUROC": "0.5"}, {"seed": 0})
        {'job': 'a', 'seed': 0, 'data.init_args.category': '01', 'image_AUROC': 0.5}
    """
    typed: dict[str, Any] = {}
    for name, text in row.items():
        if name in settings:
            typed[name] = settings[name]
        elif text and name.startswith(_NUMBERS):
            number = float(text)
            typed[name] = number if math.isfinite(number) else None  # JSON knows no NaN
        elif text:
            typed[name] = text
    return typed
