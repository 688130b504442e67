# SPDX-License-Identifier: Apache-2.0

"""One HTML page over explained images, from one run or many: ``python -m anomalib_spg.explanations.report results``.

It works offline: styles, scripts and records are embedded, pictures are files beside it.
"""

import argparse
import json
import logging
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

from .categories import plot_overlap, plot_usage

logger = logging.getLogger(__name__)

RECORDS = "explanations.json"
# What the page needs.
OF_RUN = {"model", "category", "figures", "learned", "images"}
OF_IMAGE = {"category", "name", "score", "threshold", "rejected", "unit", "picture", "thumbnail", "parts"}


def read_runs(folder: str | Path) -> list[tuple[Path, dict[str, Any]]]:
    """Read the records of all runs below a folder.

    Args:
        folder (str | Path): Folder; ``latest``, anomalib's link to the newest run, is not followed.

    Returns:
        list[tuple[Path, dict[str, Any]]]: Folder and records of every run.

    Raises:
        ValueError: If there are none, or a file is damaged.
    """
    runs = [(path.parent, _read(path)) for path in sorted(Path(folder).rglob(RECORDS))]
    if not runs:
        msg = (
            f"There are no explanations below '{folder}'. `anomalib test` and `predict` leave them with "
            "--model.visualizer anomalib_spg.ExplanationVisualizer."
        )
        raise ValueError(msg)
    return runs


def _read(path: Path) -> dict[str, Any]:
    remedy = "Run `anomalib test` again to write them anew."
    try:
        run: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        whole = set(run) >= OF_RUN and all(set(image) >= OF_IMAGE for image in run["images"])
    except (OSError, ValueError, TypeError) as exception:
        msg = f"Cannot read the explanations in '{path}': {exception}. {remedy}"
        raise ValueError(msg) from exception
    if not whole:
        msg = f"The explanations in '{path}' are of another version or damaged: records lack fields. {remedy}"
        raise ValueError(msg)
    return run


def write_report(folder: str | Path, name: str = "index.html") -> Path:
    """Write the page over all runs below a folder.

    Of several versions of a results folder only the newest is used. Where several categories are explained by atoms or
    by neurons, a figure shows what they have in common.

    Args:
        folder (str | Path): Folder with runs, or one run's folder ``explanations``.
        name (str): Name of the page in it. Defaults to ``"index.html"``.

    Returns:
        Path: The page.

    Raises:
        ValueError: If there are no runs.
    """
    folder = Path(folder)
    newest: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for path, run in sorted(read_runs(folder), key=lambda item: (item[0] / RECORDS).stat().st_mtime):
        newest[path.parents[1] / path.name] = (path, run)  # without its version
    images, figures = [], []
    for path, run in newest.values():
        base = Path(os.path.relpath(path, folder)).as_posix()
        where = "" if base == "." else f"{base}/"
        images += [
            image | {"model": run["model"]} | {key: where + image[key] for key in ("picture", "thumbnail")}
            for image in run["images"]
        ]
        figures += [
            {"title": f"{run['model']}, {run['category']}: {title}", "file": where + file}
            for title, file in run["figures"].items()
        ]
    figures += _common_figures(folder, list(newest.values()))
    page = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps({"images": images, "figures": figures}).replace("<", "\\u003c")
    path = folder / name
    path.write_text(page.replace("{{data}}", data), encoding="utf-8")
    return path


def _common_figures(folder: Path, runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, str]]:
    """Figures over several categories: atoms of the same guides, and neurons."""
    figures = []
    by_guides: dict[str, list[dict[str, Any]]] = {}
    for _, run in runs:
        by_atoms = [image for image in run["images"] if image["unit"] == "atom"]
        by_guides.setdefault(run["learned"], []).extend(by_atoms)
    for learned, images in by_guides.items():
        categories = sorted({image["category"] for image in images if image["rejected"]})
        if len(categories) > 1:
            plot_usage(images).savefig(folder / f"atoms_{learned}.png", dpi=90)
            title = f"which atoms explain rejections in {', '.join(categories)}"
            figures.append({"title": title, "file": f"atoms_{learned}.png"})
    products = {run["category"]: run["neurons"] for _, run in runs if any(run.get("neurons", {}).values())}
    if len(products) > 1:
        plot_overlap(products).savefig(folder / "neurons.png", dpi=90)
        figures.append({"title": "sensitive neurons that products share", "file": "neurons.png"})
    return figures


def main() -> None:
    """Write the page over all runs below a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with results, such as results or results/SPG")
    folder = parser.parse_args().folder
    try:
        path = write_report(folder, "explanations.html")
    except ValueError as exception:
        parser.error(str(exception))
    print(f"Open {path}")


if __name__ == "__main__":
    main()
