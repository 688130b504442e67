# SPDX-License-Identifier: Apache-2.0

"""The tables a paper prints, from results of ``anomalib benchmark`` or of :mod:`anomalib_spg.benchmark`.

    python -m anomalib_spg.benchmark.tables runs/benchmark/*/results.csv --format latex

For every dataset: the means over its categories, a row for every method; then, for every metric, a table with a row for
every category and a column for every method. A method is a model with those of its arguments that differ between rows.
Values are percentages, mean ± standard deviation (n - 1) over the seeds.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from .results import read_jobs

METRICS = {
    "image_AUROC": "image AUROC",
    "image_AveragePrecision": "image AP",
    "image_F1Max": "image F1-max",
    "pixel_AUROC": "pixel AUROC",
    "pixel_AveragePrecision": "pixel AP",
    "pixel_F1Max": "pixel F1-max",
    "pixel_AUPRO": "pixel AUPRO",
}
# Where a dataset and a category stand, the first that is there; names of folders count as categories.
_DATASETS = ("init_args.target", "init_args.target.class_path", "class_path")
_CATEGORIES = tuple(
    f"{part}{name}" for name in ("category", "name") for part in ("target_args.", "target.init_args.", "")
)
_SEEDS = ("seed", "model.init_args.seed", "data.init_args.seed")
# Settings that do not define a method: what is tested on, where it lies, how it is read.
_NO_METHOD = {"class_path", "category", "name", "target", "root", "eval_batch_size", "num_workers", "seed"}
# Settings that may belong to a product, in folders of its own: only two values for one product are two methods.
_OF_PRODUCT = {"normal_dir", "abnormal_dir", "normal_test_dir", "mask_dir", "extensions", "json_path", "samples"}
_OF_PRODUCT |= {f"{name}_split_{kind}" for name in ("normal", "test", "val") for kind in ("mode", "ratio")}
_CONTENTS = "contents."  # before the name of an argument: the digest of the file that it names
_SETTINGS = ("model.", "data.", _CONTENTS)
_NONE = "\u2013"
_TESTED = ["test_good", "test_bad"]  # numbers of test images; older results have none
_FEW = 10  # good or bad test images below which a note says so


class Table(NamedTuple):
    """A table of texts with a title and a note below it, which may be empty."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def read_results(*paths: str | Path) -> pd.DataFrame:
    """Read results, and name the method of every row.

    Args:
        *paths (str | Path): Files ``results.csv``; a ``jobs.json`` beside one says what was asked for.

    Returns:
        pd.DataFrame: Columns ``dataset``, ``category``, ``method``, ``seed``, ``done``, ``test_good`` and ``test_bad``,
            which count test images, and the metrics, as shares of 1. Jobs that were asked for and have no result are
            rows that are not ``done``. Where the same method, category and seed occur more than once, the last row
            counts.

    Raises:
        ValueError: If a file does not exist, is no result of a benchmark, or holds none of the metrics.
    """
    parts: list[pd.DataFrame] = []
    waiting: list[pd.DataFrame] = []
    for path in paths:
        try:
            part = pd.read_csv(path, dtype=str, keep_default_na=False)  # a category may be called 01
        except (OSError, ValueError) as exception:
            msg = f"Cannot read '{path}': {exception}. Give the results.csv that a benchmark leaves."
            raise ValueError(msg) from exception
        if not {"seed", "model.class_path", "data.class_path"} <= set(part):
            msg = (
                f"'{path}' is no result of a benchmark: it has no columns seed, model.class_path and data.class_path. "
                "Give the results.csv that a benchmark leaves."
            )
            raise ValueError(msg)
        if not set(METRICS) & set(part):
            msg = f"'{path}' has none of the metrics {', '.join(METRICS)}. Run a benchmark with one of them."
            raise ValueError(msg)
        done = set(part.get("job", ()))
        asked = pd.DataFrame([job for job in read_jobs(Path(path).parent) if job["job"] not in done])
        parts += [part.assign(done="done")]
        waiting += [asked] if len(asked) else []
    frame = pd.concat([*waiting, *parts], ignore_index=True).fillna("")  # of two with one name the last counts
    result = identify(frame)
    result["done"] = frame["done"] == "done"
    for metric in [*_TESTED, *METRICS]:
        result[metric] = pd.to_numeric(frame.get(metric, ""), errors="coerce")
    result = result.drop_duplicates(["dataset", "category", "method", "seed"], keep="last")
    return result.sort_values("done", ascending=False, kind="stable", ignore_index=True)


def identify(frame: pd.DataFrame) -> pd.DataFrame:
    """Name dataset, category, method and seed of every row of a benchmark.

    Args:
        frame (pd.DataFrame): Settings as texts in columns like ``model.init_args.k_shot``; empty where there is none.

    Returns:
        pd.DataFrame: Columns ``dataset``, ``category``, ``method`` and ``seed``. What says where a category's images
            lie, and how they are split, names a method only where it differs within the category; the digest of a
            file's contents, where one name had several contents.

    Example:
        >>> identify(pd.DataFrame({
        ...     "seed": "0", "model.class_path": "LAKE", "model.init_args.k_shot": ["1", "4"],
        ...     "data.class_path": "Visa", "data.init_args.category": "candle",
        ... }))
          dataset category           method seed
        0    Visa   candle  LAKE, k_shot=1    0
        1    Visa   candle  LAKE, k_shot=4    0
    """

    def first(*names: str, default: str = "") -> pd.Series:
        values = pd.Series("", index=frame.index)
        for name in names:
            values = values.where(values != "", frame.get(name, ""))
        return values.where(values != "", default)

    auxiliary = first("data.init_args.auxiliary")
    result = pd.DataFrame({
        "dataset": first(*(f"data.{name}" for name in _DATASETS)).str.split(".").str[-1],
        "category": first(*(f"data.init_args.{name}" for name in _CATEGORIES), default="all"),
        "method": frame["model.class_path"].str.split(".").str[-1] + (" from " + auxiliary).where(auxiliary != "", ""),
        "seed": frame[[name for name in _SEEDS if name in frame]].agg("/".join, axis=1).str.rstrip("/"),
    })
    settings = [name for name in map(str, frame) if name == "accelerator" or name.startswith(_SETTINGS)]
    settings = [name for name in settings if name.split(".")[-1] not in _NO_METHOD]

    def of_product(name: str, rows: pd.DataFrame) -> bool:
        section, *_, argument = name.split(".")
        values = frame[name].loc[rows.index].groupby(rows["category"]).nunique()
        return section == "data" and argument in _OF_PRODUCT and bool((values == 1).all())

    def told_by_name(name: str, rows: pd.DataFrame) -> bool:
        file, group = name.removeprefix(_CONTENTS), frame.loc[rows.index]
        values = group[name].groupby(group[file]).nunique()
        return name != file and bool((values == 1).all())

    for _, rows in result.groupby(["dataset", "method"]):
        group = frame.loc[rows.index, settings]
        varying = [name for name in settings if len(group[name].unique()) > 1]
        varying = [name for name in varying if not of_product(name, rows) and not told_by_name(name, rows)]
        for index in rows.index:
            shown = [f"{name.split('.')[-1]}={group[name][index]}" for name in varying if group[name][index]]
            result.loc[index, "method"] = ", ".join([result["method"][index], *shown])
    return result


def make_tables(results: pd.DataFrame) -> Iterator[Table]:
    """Make the tables.

    Args:
        results (pd.DataFrame): What :func:`read_results` returns.

    Yields:
        Table: For every dataset the means over its categories; then, if there are several, a table for every metric.
    """
    for dataset, rows in results.groupby("dataset", sort=False):
        categories, methods = rows["category"].unique(), rows["method"].unique()
        # For every method and metric, a row for every category and a column for every seed.
        grids = {
            (method, metric): group.pivot_table(metric, "category", "seed", dropna=False).reindex(categories)
            for method, group in rows.groupby("method")
            for metric in METRICS
        }
        missing: set[tuple[str, str]] = set()
        absent = [str(category) for category in categories if not (rows["done"] & (rows["category"] == category)).any()]
        notes = [f"No result of {', '.join(absent)}."] if absent else []
        for method, group in rows.groupby("method", sort=False):
            expected = len(categories) * len(group["seed"].unique())
            done = group[group["done"]]
            if len(done) < expected:
                missing |= {(str(method), metric) for metric in METRICS}
                notes.append(f"{method}: {expected - len(done)} of {expected} results are missing.")
            for metric, name in METRICS.items():
                without = int(done[metric].isna().sum())  # an older run may have measured less
                if 0 < without < len(done):
                    missing.add((str(method), metric))
                    notes.append(f"{method}: {without} of {len(done)} results have no {name}.")
        if notes:
            notes.append(
                "Means with * are over the seeds that have every category, or else over the categories there are."
            )
        note = " ".join([_seeds(rows[rows["done"]]), *_few_images(rows[rows["done"]]), *notes])
        means = {key: _mean_over_categories(grid) for key, grid in grids.items()}
        means |= {key: f"{means[key]}*" for key in missing if means[key] != _NONE}
        count = f"mean over {len(categories)} categories" if len(categories) > 1 else str(categories[0])
        cells = [[method, *(means[method, metric] for metric in METRICS)] for method in methods]
        yield Table(f"{dataset}, {count}", ["method", *METRICS.values()], cells, note)
        if len(categories) == 1:
            continue
        for metric, name in METRICS.items():
            if rows[metric].isna().all():
                continue
            cells = [
                [category, *(_cell(grids[method, metric].loc[category]) for method in methods)]
                for category in categories
            ]
            cells.append(["mean", *(means[method, metric] for method in methods)])
            yield Table(f"{dataset}, {name}", ["category", *methods], cells, note)


def _seeds(done: pd.DataFrame) -> str:
    """Say of how many seeds the values are; methods may differ."""
    counts = sorted(set(done.groupby("method")["seed"].nunique())) or [0]
    if counts[-1] < 2:  # one has no deviation
        return f"Percentages of {counts[-1] or 'no'} seed."
    several = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Percentages, mean ± standard deviation over {several} seeds."


def _few_images(done: pd.DataFrame) -> list[str]:
    """Say where values rest on few test images.

    Example:
        >>> _few_images(pd.DataFrame({"category": ["a", "b"], "test_good": [9, 1], "test_bad": [20, 5]}))
        ['2 of 2 categories have fewer than 10 good or 10 bad test images, fewest b: 1 good, 5 bad.']
        >>> _few_images(pd.DataFrame({"category": ["a"], "test_good": [10], "test_bad": [10]}))
        []
    """
    fewest = done.reindex(columns=_TESTED).min(axis="columns")
    few = done[fewest < _FEW]
    if few.empty:
        return []
    least = few.loc[fewest[few.index].idxmin()]
    counts = f"{few['category'].nunique()} of {done['category'].nunique()} categories have"
    fewest_of = f"{least['category']}: {least['test_good']:.0f} good, {least['test_bad']:.0f} bad."
    return [f"{counts} fewer than {_FEW} good or {_FEW} bad test images, fewest {fewest_of}"]


def _mean_over_categories(grid: pd.DataFrame) -> str:
    """Mean over categories, and the deviation of that mean over the seeds that have every category."""
    whole = grid.dropna(axis="columns")
    return _cell(whole.mean() if len(whole.columns) else pd.Series([grid.mean(axis="columns").mean()]))


def _cell(values: pd.Series) -> str:
    """Show shares of 1 as a percentage, mean ± standard deviation.

    Example:
        >>> _cell(pd.Series([0.9, 0.95, 1.0])), _cell(pd.Series([0.914]))
        ('95.0 ± 5.0', '91.4')
    """
    values = values.dropna() * 100
    if values.empty:
        return _NONE
    return f"{values.mean():.1f}" + (f" ± {values.std():.1f}" if len(values) > 1 else "")


def to_markdown(table: Table) -> str:
    """Write a table in Markdown.

    Args:
        table (Table): Any table.

    Returns:
        str: Title, table, note.

    Example:
        >>> print(to_markdown(Table("Visa", ["method", "AUROC"], [["LAKE", "89.4"]])))
        **Visa**
        <BLANKLINE>
        | method | AUROC |
        |--------|-------|
        | LAKE   | 89.4  |
    """
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (table.header, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    rows.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join([f"**{table.title}**", "", *rows, *(["", table.note] if table.note else [])])


def to_latex(table: Table) -> str:
    r"""Write a table in LaTeX, for the package booktabs.

    Args:
        table (Table): Any table.

    Returns:
        str: A ``table`` environment.

    Example:
        >>> print(to_latex(Table("Visa", ["method", "AUROC"], [["LAKE, k_shot=1", "89.4 ± 0.1"]])))
        \begin{table}
        \caption{Visa}
        \begin{tabular}{lr}
        \toprule
        method & AUROC \\
        \midrule
        LAKE, k\_shot=1 & 89.4 $\pm$ 0.1 \\
        \bottomrule
        \end{tabular}
        \end{table}
    """
    signs = {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        _NONE: "--",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
    }
    signs |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    escapes = str.maketrans(signs)
    header, *rows = [
        " & ".join(cell.translate(escapes) for cell in line) + r" \\" for line in (table.header, *table.rows)
    ]
    lines = [r"\begin{table}", rf"\caption{{{f'{table.title}. {table.note}'.rstrip('. ').translate(escapes)}}}"]  # noqa: RUF027
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule", header, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"])  # noqa: RUF027


def results_table(results: pd.DataFrame, form: str = "markdown") -> str:
    """Write all tables of results.

    Args:
        results (pd.DataFrame): What :func:`read_results` returns.
        form (str): ``"markdown"`` or ``"latex"``. Defaults to ``"markdown"``.

    Returns:
        str: The tables, a blank line between them.
    """
    write = to_latex if form == "latex" else to_markdown
    return "\n\n".join(write(table) for table in make_tables(results))


def main() -> None:
    """Command line: ``python -m anomalib_spg.benchmark.tables FILE... [--format markdown|latex]``."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_spg.benchmark.tables", description="Tables of results.")
    parser.add_argument("files", nargs="+", help="results.csv of benchmarks")
    parser.add_argument("--format", choices=("markdown", "latex"), default="markdown")
    args = parser.parse_args()
    try:
        print(results_table(read_results(*args.files), args.format))
    except ValueError as exception:
        sys.exit(f"error: {exception}")


if __name__ == "__main__":
    main()
