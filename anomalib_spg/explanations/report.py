# SPDX-License-Identifier: Apache-2.0

"""One HTML page over explained images, from one run or many: ``python -m anomalib_spg.explanations.report results``.

It works offline: styles, scripts and records are embedded, pictures are files beside it.
"""

import argparse
import json
import logging
import os
import re
from collections import Counter
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from anomalib_spg.components.files import atomic_write

from .categories import plot_overlap, plot_usage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

RECORDS = "explanations.json"
UNFINISHED = {"unfinished": True}  # in place of the records while they are made
# What the page needs, and of which types.
NUMBER = (float, int, type(None))  # none where it is not finite
YES_OR_NO = (bool, type(None))
OF_RUN: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "product": (str,),
    "category": (str,),
    "figures": (dict,),
    "learned": (str,),
    "neurons": (dict,),
    "settings": (dict,),
    "images": (list,),
}
OF_IMAGE: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("category", "name", "path", "unit", "words", "picture", "thumbnail"), (str,)),
    **dict.fromkeys(("score", "threshold", "raw_score", "raw_threshold", "base"), NUMBER),
    **dict.fromkeys(("rejected", "defective"), YES_OR_NO),
    "parts": (list,),
    "others": (dict,),
    "other": (dict,),
    "defects": (list,),
}
OF_PART: dict[str, tuple[type, ...]] = {"block": (int,), "unit": (int,), "adds": NUMBER, "share": NUMBER}
OF_OTHERS: dict[str, tuple[type, ...]] = {"count": (int,), "adds": NUMBER}
OF_DEFECT: dict[str, tuple[type, ...]] = {"box": (list,), "area": (int,), "score": NUMBER, "contour": (list,)}


def read_runs(folder: str | Path) -> tuple[list[tuple[Path, dict[str, Any]]], list[str]]:
    """Read the records of all runs below a folder.

    Args:
        folder (str | Path): Folder; links in it, such as anomalib's ``latest``, are not followed.

    Returns:
        tuple[list[tuple[Path, dict[str, Any]]], list[str]]: Folder and records of every run; what could not be read,
            with the reason.

    Raises:
        ValueError: If there are none that can be read.
    """
    runs, unread = [], []
    for path in sorted(Path(folder).rglob(RECORDS)):
        try:
            runs.append((path.parent, _read(path)))
        except ValueError as exception:  # noqa: PERF203  # one damaged file must not hide the others
            unread.append(str(exception))
    if not runs:
        msg = " ".join(unread) or (
            f"There are no explanations below '{folder}'. `anomalib test` and `predict` leave them with "
            "--model.visualizer anomalib_spg.ExplanationVisualizer."
        )
        raise ValueError(msg)
    return runs, unread


def _read(path: Path) -> dict[str, Any]:
    remedy = "Run `anomalib test` or `predict` again to write them anew."
    try:
        # A number that is not finite is no JSON, although Python reads and writes it.
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)
    except (OSError, ValueError, RecursionError) as exception:
        msg = f"Cannot read the explanations in '{path}': {exception}. {remedy}"
        raise ValueError(msg) from exception
    if run == UNFINISHED:
        msg = f"The explanations in '{path.parent}' are being written, or their run was interrupted. {remedy}"
        raise ValueError(msg)
    wrong = _wrong(run)
    if wrong is not None:
        msg = f"The explanations in '{path}' are of another version or damaged: {wrong} is missing or odd. {remedy}"
        raise ValueError(msg)
    return run


def _wrong(run: Any) -> str | None:  # noqa: ANN401  # anything may be in a file
    """Name the first field that is not as the page needs it."""

    def odd(record: Any, fields: dict[str, tuple[type, ...]], where: str) -> str | None:  # noqa: ANN401
        if not isinstance(record, dict):
            return where
        return next(
            (f"'{name}' of {where}" for name, types in fields.items() if type(record.get(name, ...)) not in types), None
        )

    wrong = odd({"neurons": {}, **run} if isinstance(run, dict) else run, OF_RUN, "the run")
    if wrong is not None:
        return wrong
    if not all(isinstance(file, str) for file in run["figures"].values()):
        return "'figures' of the run"
    if not all(isinstance(channels, list) for channels in run.get("neurons", {}).values()):
        return "'neurons' of the run"
    for number, image in enumerate(run["images"]):
        wrong = odd({"defects": [], **image} if isinstance(image, dict) else image, OF_IMAGE, f"image {number}")
        wrong = wrong or next(
            filter(None, (odd(part, OF_PART, f"a part of image {number}") for part in image["parts"])), None
        )
        wrong = wrong or odd(image["others"], OF_OTHERS, f"'others' of image {number}")
        wrong = wrong or next(
            filter(None, (odd(found, OF_DEFECT, f"a defect of image {number}") for found in image.get("defects", []))),
            None,
        )
        if wrong is None and not all(type(value) in NUMBER for value in image["other"].values()):
            wrong = f"'other' of image {number}"
        if wrong is not None:
            return wrong
    return None


def write_report(folder: str | Path, name: str = "index.html") -> Path:
    """Write the page over all runs below a folder.

    Of several versions of a results folder (``v0``, ``v1``, ...) with the same settings only the newest is used. All
    other runs are; those of one model and category are told apart by the settings that differ, else by their folder.
    Where several categories are explained by atoms or by neurons, a figure shows what they have in common. What is left
    out, because it is older or cannot be read, is named in a warning and on the page.

    Args:
        folder (str | Path): Folder with runs, or one run's folder ``explanations``.
        name (str): Name of the page in it. Defaults to ``"index.html"``.

    Returns:
        Path: The page.

    Raises:
        ValueError: If there are no runs.
        OSError: If the page cannot be written.
    """
    folder = Path(folder)
    runs, left_out = read_runs(folder)
    newest: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}
    for path, run in sorted(runs, key=lambda item: _version(item[0])):
        results = path.absolute().parent  # not resolved, since links lead out of the folder
        kept = results.parent if _version(path) else results
        key = (kept, path.name, run["model"], run["category"], json.dumps(run["settings"], sort_keys=True))
        if key in newest:
            left_out.append(f"'{newest[key][0]}' is older than '{path}', which has the same settings.")
        newest[key] = (path, run)
    for reason in left_out:
        logger.warning("Left out of the page: %s", reason)
    chosen = _told_apart(folder, list(newest.values()))
    images, figures = [], []
    for path, run in chosen:
        base = Path(os.path.relpath(path, folder))
        images += [
            image
            | {"model": run["model"], "defects": _without_contours(image)}
            | {key: _link(base / image[key]) for key in ("picture", "thumbnail")}
            for image in run["images"]
        ]
        figures += [
            {"title": f"{', '.join(filter(None, (run['model'], run['product'])))}: {title}", "file": _link(base / file)}
            for title, file in run["figures"].items()
        ]
    page = folder / name
    try:
        figures += _common_figures(folder, chosen)
        template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
        shown = {"images": images, "figures": figures, "left_out": left_out}
        data = json.dumps(shown, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        with atomic_write(page) as temporary:
            temporary.write_text(template.replace("{{data}}", data), encoding="utf-8")
    except OSError as exception:
        msg = f"Cannot write '{page}': {exception}. Free space there, or copy the folder to where you may write."
        raise OSError(msg) from exception
    return page


def _without_contours(image: dict[str, Any]) -> list[dict[str, Any]]:
    """Defects as the page lists them: contours, which would make it large, stay in the records."""
    return [{name: found[name] for name in ("score", "area", "box")} for found in image.get("defects", [])]


def _version(path: Path) -> float:
    """Number of the version that a run's folder lies in, or 0. In copied results ``latest`` may be a folder as well."""
    name = path.absolute().parent.name
    return float("inf") if name == "latest" else int(name[1:]) + 1 if re.fullmatch(r"v\d+", name) else 0


def _link(path: Path) -> str:
    """Address of a file as a page beside it needs it, whatever characters are in its name."""
    return quote(os.fsencode(path.as_posix()))


def _told_apart(folder: Path, runs: list[tuple[Path, dict[str, Any]]]) -> list[tuple[Path, dict[str, Any]]]:
    """Add to the models' names what tells runs of the same model and category apart: settings, else folders."""
    alike: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _, run in runs:
        alike.setdefault((run["model"], run["category"]), []).append(run["settings"])
    named = [
        (path, run | {"model": run["model"] + _differing(run["settings"], alike[run["model"], run["category"]])})
        for path, run in runs
    ]
    counts = Counter((run["model"], run["category"]) for _, run in named)
    apart = []
    for path, run in named:
        if counts[run["model"], run["category"]] > 1:
            where = Path(os.path.relpath(path, folder))
            where = where.parent if where.name == "explanations" and where.parent.name else where
            apart.append((path, run | {"model": f"{run['model']} in {where.as_posix()}"}))
        else:
            apart.append((path, run))
    return apart


def _differing(settings: dict[str, Any], of_all: list[dict[str, Any]]) -> str:
    """Name the settings that are not the same in all runs, as they stand in a config."""
    differing = {name: value for name, value in settings.items() if any(own.get(name) != value for own in of_all)}
    return "".join(
        f", {name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in differing.items()
    )


def _common_figures(folder: Path, runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, str]]:
    """Figures over several categories: atoms of the same guides, and neurons."""
    figures = []

    def save(figure: "Figure", name: str, title: str) -> None:
        with atomic_write(folder / name) as temporary:
            figure.savefig(temporary, dpi=90, format="png")
        figures.append({"title": title, "file": _link(Path(name))})

    by_guides: dict[str, list[dict[str, Any]]] = {}
    for _, run in runs:
        by_atoms = [image for image in run["images"] if image["unit"] == "atom"]
        by_guides.setdefault(run["learned"], []).extend(by_atoms)
    for learned, images in by_guides.items():
        categories = sorted({image["category"] for image in images if image["rejected"]})
        if len(categories) > 1:
            title = f"which atoms explain rejections in {', '.join(categories)}"
            save(plot_usage(images), f"atoms_{re.sub(r'[^0-9A-Za-z]', '_', learned)}.png", title)
    with_neurons = [run for _, run in runs if any(run.get("neurons", {}).values())]
    names = [run["product"] or run["category"] for run in with_neurons]
    alike = len(set(names)) < len(names)
    products = {
        f"{name}, {run['model']}" if alike else name: run["neurons"]
        for name, run in zip(names, with_neurons, strict=True)
    }
    if len(products) > 1:
        save(plot_overlap(products), "neurons.png", "sensitive neurons that products share")
    return figures


def main() -> None:
    """Write the page over all runs below a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m anomalib_spg.explanations.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(), help="folder with results, such as results; default: this one"
    )
    folder = parser.parse_args().folder
    try:
        path = write_report(folder, "explanations.html")
    except (ValueError, OSError) as exception:
        parser.error(str(exception))
    print(f"Open {path.absolute()}")


if __name__ == "__main__":
    main()
