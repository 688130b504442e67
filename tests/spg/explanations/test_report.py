# SPDX-License-Identifier: Apache-2.0

"""The page over many runs: which runs are on it, what is left out, and that a browser shows it whatever they hold."""

import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from PIL import Image

from anomalib_spg.explanations.report import UNFINISHED, main, write_report
from tests.helpers import BROWSER, dump, shown_names

ODD = 'a#1 %20 ?x&y "z" <i> ä.png'


def record(name: str = "bad/x.png", **changes: Any) -> dict[str, Any]:
    """A record of an image."""
    part = {"block": 6, "unit": 17, "adds": 0.2, "share": 0.5, "opposed": False}
    image = {"category": "nut", "name": name, "path": f"/in/{name}", "unit": "atom", "score": 0.9, "threshold": 0.5}
    files = {"picture": "pictures/0.jpg", "thumbnail": "thumbnails/0.jpg"}
    defect = {"box": [1, 2, 30, 40], "area": 777, "score": 0.75, "contour": [[1.5, 2.0], [30.0, 40.0], [1.5, 40.0]]}
    image |= {"words": "Rejected, because.", "raw_score": 0.7, "raw_threshold": 0.6, "base": 0.5}
    lists = {"parts": [part], "others": {"count": 9, "adds": -0.1}, "other": {"text": 0.1}, "defects": [defect]}
    return {**image, "rejected": True, "defective": None, **files, **lists, **changes}


def run_in(folder: Path, *images: dict[str, Any], kind: str = "explanations", **changes: Any) -> Path:
    """A run's folder with its records and pictures."""
    folder = folder / kind
    run = {"model": "SPG", "category": "nut", "figures": {"guides": "guides.jpg"}, "learned": "a", "neurons": {}}
    run |= {
        "product": "",
        "settings": {"own_weight": 0, "layers": [3]},
        "images": list(images) or [record()],
        **changes,
    }
    for path in {"guides.jpg", *(image[key] for image in run["images"] for key in ("picture", "thumbnail"))}:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / path)
    (folder / "explanations.json").write_text(json.dumps(run))
    return folder


def shown(page: Path) -> dict[str, Any]:
    """The data of a page, as a browser reads it; every file it links to is there."""
    found = re.search(
        r'<script id="data" type="application/json">(.*?)</script>', page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    data = json.loads(found.group(1), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    links = [image[key] for image in data["images"] for key in ("picture", "thumbnail")]
    links += [figure["file"] for figure in data["figures"]]
    assert all((page.parent / unquote(link)).is_file() for link in links)
    return data


@pytest.mark.parametrize("inside", ["results/SPG/nut/v3", "results/SPG/nut/latest", "results/SPG/nut/v3/explanations"])
@pytest.mark.parametrize("arguments", [[], ["."]])
def test_from_inside_a_run(
    inside: str, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The folder may be named, left out, or be anomalib's link to the newest run."""
    run_in(tmp_path / "results/SPG/nut/v3")
    (tmp_path / "results/SPG/nut/latest").symlink_to(tmp_path / "results/SPG/nut/v3")
    monkeypatch.chdir(tmp_path / inside)
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    main()
    assert f"{inside.replace('latest', 'v3')}/explanations.html" in capsys.readouterr().out
    assert len(shown(Path("explanations.html"))["images"]) == 1


@pytest.mark.parametrize("place", ["{}/", "{}/v3", "{}/SPG/nut/v3", "from_{}"])
def test_collected_from_several_machines(place: str, tmp_path: Path) -> None:
    """Runs whose last folders have the same names are all there, and can be told apart."""
    for machine in "ABC":
        run_in(tmp_path / place.format(machine), record(f"bad/{machine}.png"))
    data = shown(write_report(tmp_path))
    assert sorted(image["name"] for image in data["images"]) == ["bad/A.png", "bad/B.png", "bad/C.png"]
    where = place.strip("/")
    assert {image["model"] for image in data["images"]} == {f"SPG in {where.format(machine)}" for machine in "ABC"}
    assert len({figure["title"] for figure in data["figures"]}) == 3
    assert data["left_out"] == []


def test_newest_version(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By its number, since copying changes times; what is older is named. Other categories and predictions stay."""
    for version in (10, 9):
        run_in(tmp_path / f"v{version}", record(f"bad/{version}.png"))
    run_in(tmp_path / "v9", record("bolt.png"), category="bolt", kind="explanations_of_predictions")
    with caplog.at_level(logging.WARNING):
        data = shown(write_report(tmp_path))
    assert sorted(image["name"] for image in data["images"]) == ["bad/10.png", "bolt.png"]
    assert len(data["left_out"]) == 1
    assert f"Left out of the page: {data['left_out'][0]}" in caplog.text
    assert "v9/explanations' is older than" in data["left_out"][0]
    assert {image["model"] for image in data["images"]} == {"SPG"}


def test_runs_with_other_settings(tmp_path: Path) -> None:
    """All are on the page, told apart by what differs; of those with the same settings the newest one is."""
    for version, weight in enumerate((8, 0, 0)):
        settings = {"own_weight": weight, "layers": [3], "selection": "variance"}
        run_in(tmp_path / f"v{version}", record(f"bad/{version}.png"), settings=settings)
    data = shown(write_report(tmp_path))
    models = {image["name"]: image["model"] for image in data["images"]}
    assert models == {"bad/0.png": "SPG, own_weight 8", "bad/2.png": "SPG, own_weight 0"}
    assert len(data["left_out"]) == 1
    assert "v1/explanations' is older" in data["left_out"][0]


def test_figures_are_of_the_product_that_was_learned(tmp_path: Path) -> None:
    """Not of the folders that predicted images lie in; where it is not known, none is named."""
    run_in(tmp_path / "a", product="bolt", category="new, old")
    run_in(tmp_path / "b", category="new")
    titles = {figure["title"] for figure in shown(write_report(tmp_path))["figures"]}
    assert titles == {"SPG, bolt: guides", "SPG: guides"}


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_title_in_a_browser(tmp_path: Path) -> None:
    """The category stands before the name, unless the name begins with it."""
    for category, title in (("nut", "nut: new/100% bad.png"), ("new", "new/100% bad.png")):
        run_in(tmp_path, record("new/100% bad.png", category=category))
        assert f"<strong>{title}</strong>" in dump(write_report(tmp_path), "image=0")


def test_neurons_of_one_product_on_two_machines(tmp_path: Path) -> None:
    """Neither hides the other in the figure of shared neurons."""
    for machine in "AB":
        run_in(tmp_path / machine, record(unit="neuron"), neurons={"4": [1, 2]})
    assert "sensitive neurons that products share" in [
        figure["title"] for figure in shown(write_report(tmp_path))["figures"]
    ]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The command as it is called."""
    monkeypatch.setattr(sys, "argv", ["report.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    assert capsys.readouterr().out.startswith("usage: python -m anomalib_spg.explanations.report [-h] [folder]")


BROKEN = {
    "half": '{"model": "SPG", "ima',
    "list": "[1, 2]",
    "text": '"explanations"',
    "bytes": b"\xff\xfe\x00",
    "deep": "[" * 100_000,
    "other_keys": {"samples": [{"image": "a.png", "anomaly": 0.3}]},
    "images_by_name": {"images": {"a.png": 0.3}},
    "image_is_text": {"images": ["a.png"]},
    "score_is_text": {"images": [record(score="0.9")]},
    "score_is_list": {"images": [record(score=[0.9, 0.1])]},
    "no_threshold": {"images": [{key: value for key, value in record().items() if key != "threshold"}]},
    "parts_by_name": {"images": [record(parts={"17": 0.2})]},
    "parts_without_block": {"images": [record(parts=[{"unit": 3, "adds": 0.1, "share": 0.1}])]},
    "others_have_no_number": {"images": [record(others={"adds": 0.1})]},
    "other_is_nested": {"images": [record(other={"text": {"a": 1}})]},
    "defects_by_name": {"images": [record(defects={"1": 0.2})]},
    "defect_is_a_box": {"images": [record(defects=[[1, 2, 3, 4]])]},
    "figures_are_a_list": {"figures": ["guides.jpg"]},
    "figure_is_a_number": {"figures": {"guides": 1}},
    "neurons_are_a_number": {"neurons": {"4": 5}},
    "unfinished": UNFINISHED,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_records_of_another_shape(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Left out by name, with the reason; the other runs are shown. Where there are no others, that is said."""
    broken = BROKEN[kind]
    path = run_in(tmp_path / "odd") / "explanations.json"
    if isinstance(broken, dict) and broken != UNFINISHED and kind != "other_keys":
        broken = {**json.loads(path.read_text()), **broken}
    path.write_bytes(
        broken
        if isinstance(broken, bytes)
        else broken.encode()
        if isinstance(broken, str)
        else json.dumps(broken).encode()
    )
    with pytest.raises(ValueError, match=r"(Cannot read the|The) explanations.*odd/explanations.*anomalib test"):
        write_report(tmp_path)
    run_in(tmp_path / "good")
    with caplog.at_level(logging.WARNING):
        data = shown(write_report(tmp_path))
    assert len(data["images"]) == 1
    assert len(data["left_out"]) == 1
    assert str(path.parent) in data["left_out"][0]
    assert str(path.parent) in caplog.text


def test_defects(tmp_path: Path) -> None:
    """The page has them without their contours, which stay in the records; records of before defects are shown."""
    earlier = record("earlier.png")
    del earlier["defects"]
    run_in(tmp_path, record("new.png"), earlier)
    images = shown(write_report(tmp_path))["images"]
    assert [image["defects"] for image in images] == [[{"score": 0.75, "area": 777, "box": [1, 2, 30, 40]}], []]


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_words_are_explained_where_they_occur(tmp_path: Path) -> None:
    """What places add is named in LAKE's parts where they count, and explained there only."""
    run_in(tmp_path / "in_place", record(unit="neuron", other={"place": 0.1}))
    run_in(tmp_path / "anywhere", record(unit="neuron", other={}))
    in_place, anywhere = (dump(write_report(tmp_path / name), "image=0") for name in ("in_place", "anywhere"))
    assert "<dt>Place</dt>" in in_place
    assert "<dt>Place</dt>" not in anywhere
    assert "<dt>Neuron</dt>" in anywhere


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_scores_in_a_browser(tmp_path: Path) -> None:
    """The shown score decides, on card and in dialog, and in words; the column of parts adds up to the raw one."""
    run_in(tmp_path, record())
    opened = dump(write_report(tmp_path), "image=0")
    assert '<div class="small">score 0.900, threshold 0.500</div>' in opened
    assert '<p class="decision">Rejected: score 0.900, threshold 0.500</p>' in opened
    assert '<p class="words">Rejected, because.</p>' in opened
    assert "<dt>Atom</dt>" in opened
    assert "<dt>Neuron</dt>" not in opened
    table = re.search(r'<table class="parts">(.*?)</table>', opened, flags=re.DOTALL).group(1)
    assert "add up to the raw score 0.700 (raw threshold 0.600)" in table
    rows = re.findall(r"<tr><td>(?:<button.*?>)?([^<]*)<.*?(-?\d\.\d{4})</td>", table)
    expected = {"17": 0.2, "no preference": 0.5, "9 other atoms": -0.1, "text": 0.1, "raw score": 0.7}
    assert {name: float(adds) for name, adds in rows} == expected


def test_an_unfinished_newest_version(tmp_path: Path) -> None:
    """Then the one before it is shown."""
    run_in(tmp_path / "v0", record("bad/0.png"))
    (run_in(tmp_path / "v1") / "explanations.json").write_text(json.dumps(UNFINISHED))
    data = shown(write_report(tmp_path))
    assert [image["name"] for image in data["images"]] == ["bad/0.png"]
    assert "v1/explanations' are being written" in data["left_out"][0]


@pytest.mark.parametrize("blocked", ["explanations.html", "atoms_a.png"])
def test_page_that_cannot_be_written(
    blocked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A line that names the page and what to do, no half page, and the earlier one is kept."""
    for category in ("nut", "bolt"):
        run_in(tmp_path / category, record(category=category), category=category)
    (tmp_path / "explanations.html").write_text("earlier")
    replace = Path.replace

    def full(self: Path, target: Path) -> Path:
        if target.name == blocked:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(sys, "argv", ["report", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert re.search(
        r"Cannot write '.*explanations\.html'.*No space left.*Free space", " ".join(capsys.readouterr().err.split())
    )
    assert (tmp_path / "explanations.html").read_text() == "earlier"
    assert not list(tmp_path.glob(".*"))


def test_ten_thousand_images(tmp_path: Path) -> None:
    """Written in seconds (about one here), less than a kilobyte each."""
    folder = run_in(tmp_path)
    run = json.loads((folder / "explanations.json").read_text())
    parts = run["images"][0]["parts"] * 5
    run["images"] = [record(f"bad/{number:05}.png", score=number / 10_000, parts=parts) for number in range(10_000)]
    (folder / "explanations.json").write_text(json.dumps(run))
    start = time.perf_counter()
    page = write_report(tmp_path)
    assert time.perf_counter() - start < 20
    assert page.stat().st_size < 10e6


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_many_images_in_a_browser(tmp_path: Path) -> None:
    """Only the first are drawn, the worst, until more are asked for; the count says how many there are."""
    folder = run_in(tmp_path)
    run = json.loads((folder / "explanations.json").read_text())
    run["images"] = [record(f"{number}.png", score=0.5 + number / 1000) for number in range(300)]
    (folder / "explanations.json").write_text(json.dumps(run))
    page = write_report(tmp_path)
    once = dump(page)
    assert shown_names(once) == [f"{number}.png" for number in range(299, 179, -1)]
    assert "300 of 300 rejected images" in once
    assert "Show more (180 left)" in once
    seen = "document.title = getComputedStyle(document.getElementById('more')).display;"
    for script, display in (("", "block"), ("document.getElementById('more').click(); more();", "none")):
        page.write_text(page.read_text(encoding="utf-8") + f"<script>{script}{seen}</script>")
        found = dump(page)
        assert f"<title>{display}</title>" in found
    assert len(shown_names(found)) == 300


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_odd_names_and_scores_in_a_browser(tmp_path: Path) -> None:
    """Pictures load from folders with any name; scores that are no numbers are the worst, and said to be none."""
    images = [
        record("b.png", score=0.8),
        record(ODD, score=float("nan"), threshold=float("inf"), other={"text": float("nan")}),
    ]
    images[0]["parts"][0]["adds"] = float("-inf")
    run_in(tmp_path / ODD / "v0", *images)
    run_in(tmp_path / "b", record("c.png", score=0.9))
    (run_in(tmp_path / "broken") / "explanations.json").write_text("{")
    page = write_report(tmp_path)
    assert len(shown(page)["images"]) == 3
    loaded = "[...document.querySelectorAll('#cards img, dialog img')].filter(i => i.naturalWidth === 8).length"
    check = f"""<script>addEventListener("load", () => setTimeout(() => {{
      document.title = {loaded} + " loaded";
    }}, 500));</script>"""
    page.write_text(page.read_text(encoding="utf-8") + check)
    opened = dump(page, "image=0")
    assert "<title>4 loaded</title>" in opened
    assert shown_names(opened) == [ODD, "c.png", "b.png"]
    assert "score not a finite number" in opened
    cells = "".join(f'<td class="number">{value}</td>' for value in (1, "0.750", 777, 1, 2, 30, 40))
    assert f"<tr>{cells}</tr>" in opened
    assert '<td class="number">not a finite number</td>' in dump(page, "image=1")
    assert "Left out of this page (1)" in opened
    model = re.search(r'<option value="(SPG in [^b][^"]*)"', opened)
    assert model is not None
    assert shown_names(dump(page, "model=SPG+in+b")) == ["c.png"]


@pytest.mark.command
@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_questions_without_an_answer_in_a_browser(tmp_path: Path) -> None:
    """Where accepted images are not explained, an empty list must not look as if no defect had been missed."""
    run_in(tmp_path, record(defective=True))
    rejected = dump(write_report(tmp_path))
    assert "accepted, labelled defective" not in rejected
    about = r'<p id="about"[^>]*>[^<]*Accepted images are not on this page'
    assert re.search(about, rejected)
    run_in(tmp_path, record(defective=True), record("y.png", rejected=False, defective=True))
    everything = dump(write_report(tmp_path))
    assert "accepted, labelled defective" in everything
    assert not re.search(about, everything)
    folder = run_in(tmp_path, record(threshold=None, rejected=None))
    undecided = dump(write_report(tmp_path))
    assert shown_names(undecided) == ["bad/x.png"]
    assert '<option value="rejected">' not in undecided
    assert not re.search(about, undecided)
    run = json.loads((folder / "explanations.json").read_text())
    (folder / "explanations.json").write_text(json.dumps({**run, "images": []}))
    assert "No image was explained, because none was rejected." in dump(write_report(tmp_path))
