# SPDX-License-Identifier: Apache-2.0

"""Tables made of results: values against ones worked out by hand."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from anomalib_spg.benchmark.results import append_row, write_jobs
from anomalib_spg.benchmark.tables import METRICS, Table, make_tables, read_results, results_table, to_latex

HEADER = (
    "seed,model.class_path,model.init_args.k_shot,data.class_path,data.init_args.category,image_AUROC,pixel_AUPRO\n"
)
# Two categories, two seeds, LAKE with two settings, PatchCore with one.
NONE = "\u2013"
ROWS = """
0,LAKE,1,MVTecAD,01,0.90,0.5
0,LAKE,1,MVTecAD,02,0.80,0.5
1,LAKE,1,MVTecAD,01,0.96,0.5
1,LAKE,1,MVTecAD,02,0.84,0.5
0,LAKE,4,MVTecAD,01,1.0,0.7
0,LAKE,4,MVTecAD,02,0.9,0.8
0,anomalib.models.Patchcore,,MVTecAD,01,0.7,
0,anomalib.models.Patchcore,,MVTecAD,02,0.8,
"""


def write(path: Path, rows: str = ROWS, header: str = HEADER) -> Path:
    """A results.csv."""
    path.write_text(header + rows.lstrip(), encoding="utf-8")
    return path


def tables(path: Path) -> dict[str, Table]:
    """Its tables by title."""
    return {table.title: table for table in make_tables(read_results(path))}


def test_means_and_deviations(tmp_path: Path) -> None:
    """Seed 0 has mean 0.85, seed 1 mean 0.90: 87.5, and deviation 0.05 / sqrt(2) = 3.5 %. No metric is a dash."""
    summary = tables(write(tmp_path / "results.csv"))["MVTecAD, mean over 2 categories"]
    assert summary.header == ["method", *METRICS.values()]
    assert summary.rows == [
        ["LAKE, k_shot=1", "87.5 ± 3.5", *[NONE] * 5, "50.0 ± 0.0"],
        ["LAKE, k_shot=4", "95.0", *[NONE] * 5, "75.0"],
        ["Patchcore", "75.0", *[NONE] * 6],
    ]
    assert summary.note == "Percentages, mean ± standard deviation over 1 to 2 seeds."


def test_seeds_are_counted(tmp_path: Path) -> None:
    """Under every table, in LaTeX's caption, too; one seed has no deviation; a seed without a result does not count."""
    made = tables(ask(tmp_path, done=12))
    assert {table.note for table in made.values()} == {"Percentages, mean ± standard deviation over 2 seeds."}
    latex = results_table(read_results(tmp_path / "results.csv"), "latex")
    assert r"\caption{MVTecAD, image AUROC. Percentages, mean $\pm$ standard deviation over 2 seeds}" in latex
    assert "over 2 seeds." in results_table(read_results(tmp_path / "results.csv"))
    (tmp_path / "one").mkdir()
    assert {table.note[:22] for table in tables(ask(tmp_path / "one", done=3)).values()} == {"Percentages of 1 seed."}


def test_few_test_images_are_named(tmp_path: Path) -> None:
    """Under every table, with the fewest; not where there are enough, nor where older results do not say."""
    header = HEADER.strip() + ",test_good,test_bad\n"

    def notes(first: str, second: str) -> set[str]:
        rows = f"0,LAKE,1,MVTecAD,01,0.9,0.5,{first}\n0,LAKE,1,MVTecAD,02,0.8,0.5,{second}\n"
        return {table.note for table in tables(write(tmp_path / "results.csv", rows, header)).values()}

    seeds = "Percentages of 1 seed."
    assert notes("10,11", ",") == {seeds}
    said = f"{seeds} 1 of 2 categories have fewer than 10 good or 10 bad test images, fewest 02: 30 good, 9 bad."
    assert notes("10,11", "30,9") == {said}
    assert notes("1,5", "9,9") == {said.replace("1 of 2", "2 of 2").replace("02: 30 good, 9", "01: 1 good, 5")}


def test_a_table_per_metric(tmp_path: Path) -> None:
    """Category 01 over seeds: mean of 0.90 and 0.96, deviation 0.06 / sqrt(2). Metrics nobody has get no table."""
    made = tables(write(tmp_path / "results.csv"))
    assert list(made) == ["MVTecAD, mean over 2 categories", "MVTecAD, image AUROC", "MVTecAD, pixel AUPRO"]
    assert made["MVTecAD, image AUROC"].header == ["category", "LAKE, k_shot=1", "LAKE, k_shot=4", "Patchcore"]
    assert made["MVTecAD, image AUROC"].rows == [
        ["01", "93.0 ± 4.2", "100.0", "70.0"],
        ["02", "82.0 ± 2.8", "90.0", "80.0"],
        ["mean", "87.5 ± 3.5", "95.0", "75.0"],
    ]


def test_missing_results_are_counted(tmp_path: Path) -> None:
    """A seed that lacks a category does not enter the mean; where all do, the mean is over what there is."""
    rows = ROWS.replace("1,LAKE,1,MVTecAD,02,0.84,0.5\n", "").replace("0,LAKE,4,MVTecAD,01,1.0,0.7\n", "")
    summary, auroc, _ = tables(write(tmp_path / "results.csv", rows)).values()
    assert [row[1] for row in summary.rows] == ["85.0*", "90.0*", "75.0"]
    assert [row[1:3] for row in auroc.rows] == [["93.0 ± 4.2", NONE], ["80.0", "90.0"], ["85.0*", "90.0*"]]
    assert "LAKE, k_shot=1: 1 of 4 results are missing. LAKE, k_shot=4: 1 of 2 results are missing." in summary.note
    assert "Patchcore" not in summary.note


def ask(
    output: Path, done: int, k_shots: tuple[int, ...] = (1, 4), categories: tuple[str, ...] = ("a", "b", "c")
) -> Path:
    """Two seeds of all that in ``jobs.json``, and of the first jobs results."""
    jobs = {
        f"{k_shot} {seed} {category}": {
            "seed": seed,
            "model.class_path": "LAKE",
            "model.init_args.k_shot": k_shot,
            "data.class_path": "MVTecAD",
            "data.init_args.category": category,
        }
        for k_shot in k_shots
        for seed in (0, 1)
        for category in categories
    }
    write_jobs(output, "table.yaml", jobs)
    for job in list(jobs)[:done]:
        append_row(output, {"job": job, **jobs[job], "image_AUROC": 0.9})
    return output / "results.csv"


def test_interrupted_results_are_counted_by_the_jobs_asked_for(tmp_path: Path) -> None:
    """Five of twelve: the second seed lacks one category, the second method everything."""
    summary, auroc = tables(ask(tmp_path, done=5)).values()
    assert [row[:2] for row in summary.rows] == [["LAKE, k_shot=1", "90.0*"], ["LAKE, k_shot=4", NONE]]
    note = "LAKE, k_shot=1: 1 of 6 results are missing. LAKE, k_shot=4: 6 of 6 results are missing."
    assert note in summary.note
    assert note in auroc.note
    assert r"LAKE, k\_shot=4: 6 of 6 results are missing" in results_table(
        read_results(tmp_path / "results.csv"), "latex"
    )


def test_a_category_that_failed_for_all_stays_in_the_count(tmp_path: Path) -> None:
    """Named, and the means over the others marked."""
    path = ask(tmp_path, done=0)
    for k_shot, seed, category in ((k, s, c) for k in (1, 4) for s in (0, 1) for c in "ac"):
        job = f"{k_shot} {seed} {category}"
        settings = {"seed": seed, "model.class_path": "LAKE", "model.init_args.k_shot": k_shot}
        settings |= {"data.class_path": "MVTecAD", "data.init_args.category": category}
        append_row(tmp_path, {"job": job, **settings, "image_AUROC": 0.8})
    summary, auroc = tables(path).values()
    assert summary.title == "MVTecAD, mean over 3 categories"
    assert [row[1] for row in summary.rows] == ["80.0*", "80.0*"]
    assert summary.note.split("seeds. ")[1].startswith("No result of b. LAKE, k_shot=1: 2 of 6 results are missing.")
    assert auroc.rows[2] == ["b", NONE, NONE]


def test_a_corrected_config_asks_for_what_it_says_now(tmp_path: Path) -> None:
    """Its former jobs, say of a misspelt category, are not missing any more; those of other configs stay."""
    ask(tmp_path, done=1, k_shots=(1,), categories=("a", "botle"))
    write_jobs(tmp_path, "other.yaml", {"x": {"seed": None, "model.class_path": "SPG", "data.class_path": "Visa"}})
    made = tables(ask(tmp_path, done=4, k_shots=(1,), categories=("a", "b")))
    assert made["MVTecAD, mean over 2 categories"].note == "Percentages, mean ± standard deviation over 2 seeds."
    assert [row[:2] for row in made["Visa, all"].rows] == [["SPG", NONE]]


def test_metrics_that_older_rows_lack_are_counted(tmp_path: Path) -> None:
    """A mean over the rows that have a metric is marked, and only that one."""
    header = HEADER.rstrip("\n") + ",pixel_F1Max\n"
    rows = "0,LAKE,1,MVTecAD,01,0.9,0.5,\n0,LAKE,1,MVTecAD,02,0.8,0.5,0.3\n"
    summary = tables(write(tmp_path / "results.csv", rows, header))["MVTecAD, mean over 2 categories"]
    assert summary.rows == [["LAKE", "85.0", NONE, NONE, NONE, NONE, "30.0*", "50.0"]]
    assert "LAKE: 1 of 2 results have no pixel F1-max." in summary.note


def test_few_shot_names_the_dataset_it_draws_from(tmp_path: Path) -> None:
    """Beside runs on all images, however the dataset was given; folders by their name."""
    header = (
        "seed,model.class_path,data.class_path,data.init_args.category,data.init_args.k_shot,data.init_args.target,"
    )
    header += "data.init_args.target_args.category,data.init_args.target.class_path,"
    header += "data.init_args.target.init_args.category,data.init_args.target_args.name,image_AUROC\n"
    rows = "0,Patchcore,Visa,candle,,,,,,,0.9\n0,Patchcore,FewShot,,4,Visa,candle,,,,0.7\n"
    rows += "0,Patchcore,FewShot,,1,,,anomalib.data.Visa,candle,,0.6\n0,Patchcore,FewShot,,1,Folder,,,,vad,0.5\n"
    made = tables(write(tmp_path / "results.csv", rows, header))
    assert [row[:2] for row in made["Visa, candle"].rows] == [
        ["Patchcore", "90.0"],
        ["Patchcore, k_shot=4", "70.0"],
        ["Patchcore, k_shot=1", "60.0"],
    ]
    assert made["Folder, vad"].rows[0][:2] == ["Patchcore", "50.0"]


def test_products_in_folders_of_their_own(tmp_path: Path) -> None:
    """Their names do not make one method several; where one product has two values, they are two methods."""
    header = "seed,model.class_path,data.class_path,data.init_args.name,data.init_args.normal_dir,"
    header += "data.init_args.mask_dir,data.init_args.val_split_mode,image_AUROC\n"
    rows = "0,LAKE,Folder,nut,good,,none,0.9\n0,LAKE,Folder,bolt,ok,masks/bolt,from_test,0.7\n"
    (summary, *_) = tables(write(tmp_path / "results.csv", rows, header)).values()
    assert [row[:2] for row in summary.rows] == [["LAKE", "80.0"]]
    assert summary.note == "Percentages of 1 seed."
    rows += "0,LAKE,Folder,nut,good,,from_train,0.5\n0,LAKE,Folder,bolt,ok,masks/bolt,from_train,0.6\n"
    (summary, *_) = tables(write(tmp_path / "results.csv", rows, header)).values()
    assert [row[0] for row in summary.rows] == [
        f"LAKE, val_split_mode={mode}" for mode in ("none", "from_test", "from_train")
    ]


def test_several_files_and_datasets(tmp_path: Path) -> None:
    """Other files add datasets and methods; the later one counts where both have the same result."""
    first = write(tmp_path / "a.csv")
    second = write(tmp_path / "b.csv", "0,LAKE,4,MVTecAD,01,0.5,0.7\n0,LAKE,4,Visa,candle,0.6,0.7\n")
    made = {table.title: table for table in make_tables(read_results(first, second))}
    assert made["Visa, candle"].rows == [["LAKE", "60.0", *[NONE] * 5, "70.0"]]
    assert made["MVTecAD, image AUROC"].rows[0] == ["01", "93.0 ± 4.2", "50.0", "70.0"]


def test_auxiliary_data_tell_methods_apart(tmp_path: Path) -> None:
    """SPG on its own images and SPG from another dataset stand side by side under the dataset that is tested."""
    header = "seed,model.class_path,model.init_args.backbone,data.class_path,data.init_args.category,"
    header += "data.init_args.root,data.init_args.auxiliary,data.init_args.target,data.init_args.target_args.category,"
    header += "data.init_args.eval_batch_size,image_AUROC\n"
    rows = "0,SPG,a,Visa,candle,x,,,,8,0.5\n0,SPG,a,AuxiliaryTarget,,,MVTecAD,Visa,candle,4,0.6\n"
    rows += "0,SPG,b,AuxiliaryTarget,,,MVTecAD,Visa,candle,4,0.7\n"
    made = tables(write(tmp_path / "results.csv", rows, header))
    assert [row[:2] for row in made["Visa, candle"].rows] == [
        ["SPG", "50.0"],
        ["SPG from MVTecAD, backbone=a", "60.0"],
        ["SPG from MVTecAD, backbone=b", "70.0"],
    ]


def test_fifteen_categories_stay_readable(tmp_path: Path) -> None:
    """Five methods on fifteen categories: no line of a table is longer than a wide terminal."""
    rows = "".join(
        f"{seed},LAKE,{shots},MVTecAD,category{category},0.{shots}{seed},0.5\n"
        for category in range(15)
        for seed in range(3)
        for shots in range(1, 6)
    )
    text = results_table(read_results(write(tmp_path / "results.csv", rows)))
    assert max(map(len, text.splitlines())) < 120


def test_latex_is_a_whole_document_part(tmp_path: Path) -> None:
    """Signs that mean something to LaTeX are escaped, rows end, environments close."""
    text = results_table(read_results(write(tmp_path / "results.csv")), "latex")
    assert r"LAKE, k\_shot=1 & 87.5 $\pm$ 3.5 & -- & -- & -- & -- & -- & 50.0 $\pm$ 0.0 \\" in text
    assert text.count(r"\begin{tabular}{lrrrrrrr}") == 1
    assert text.count(r"\end{table}") == 3
    assert r"50\% \& a\{b\}" in to_latex(Table("50% & a{b}", ["x"], []))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("", "No columns to parse"),
        ("a,b\n1,2\n", "is no result of a benchmark"),
        (HEADER.replace("image_AUROC,pixel_AUPRO", "job_duration,fit_duration") + ROWS.lstrip(), "none of the metrics"),
    ],
)
def test_what_is_no_result_is_named(content: str | None, message: str, tmp_path: Path) -> None:
    """The file and what to give instead."""
    path = tmp_path / "results.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_results(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", ["{", "[1]", '{"table.yaml": {"job": 1}}', '{"table.yaml": [1]}'])
def test_jobs_of_something_else(content: str, tmp_path: Path) -> None:
    """A file of that name that is not ours is named."""
    (tmp_path / "jobs.json").write_text(content)
    with pytest.raises(ValueError, match=r"jobs\.json' was not written by anomalib_spg\.benchmark"):
        read_results(write(tmp_path / "results.csv"))


@pytest.mark.command
def test_command(tmp_path: Path) -> None:
    """Prints the tables; an error is one line and a failing exit status."""
    path = write(tmp_path / "results.csv")
    command = [sys.executable, "-m", "anomalib_spg.benchmark.tables"]
    done = subprocess.run([*command, path, "--format", "latex"], capture_output=True, text=True, check=True)
    assert done.stdout == results_table(read_results(path), "latex") + "\n"
    done = subprocess.run([*command, tmp_path / "gone.csv"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Cannot read '{tmp_path / 'gone.csv'}'")


def test_agrees_with_pandas(tmp_path: Path) -> None:
    """The mean over a full grid is the plain mean of all its rows."""
    path = write(tmp_path / "results.csv")
    raw = pd.read_csv(path)
    expected = raw[(raw["model.class_path"] == "LAKE") & (raw["model.init_args.k_shot"] == 1)]["image_AUROC"].mean()
    assert tables(path)["MVTecAD, mean over 2 categories"].rows[0][1].startswith(f"{100 * expected:.1f} ")
