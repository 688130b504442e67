# SPDX-License-Identifier: Apache-2.0

"""A catalogue of bad and odd inputs, and what comes of each.

Read the tables: a row names an input in words, says how it is made, and what comes of it. Either it works, with what
must hold then (``Right``), or it is refused with a message that names the file or the value (``Error``). Whatever comes,
no file that was there is changed, nothing half-written and nothing temporary stays: that is checked for every row.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.models import Patchcore
from jsonargparse import ArgumentParser
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_lake import LAKE
from anomalib_spg import SPG, ExplanationVisualizer
from anomalib_spg.explanations.report import write_report
from tests.helpers import TINY_CLIP
from tests.odd_inputs import (
    SIZE,
    VIT,
    Case,
    Killed,
    Made,
    all_good,
    among_good,
    below_a_file,
    bomb,
    build,
    check_whole,
    checkpoint_with,
    colour,
    damaged,
    deep,
    encoded,
    file,
    folder,
    good_parts,
    guides_with,
    half,
    hashes,
    in_a_process,
    interrupted,
    labelled,
    make,
    missing,
    mode,
    named,
    odd,
    parts_and_masks,
    plain,
    quiet_engine,
    scrambled,
    signal_at,
    start,
    tested,
    trap,
    turned,
    weights_with,
    write_image,
)


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
    outcome: Right | Error


def section(title: str, act: Callable[[Case, Any], Any], *rows: tuple) -> list[Row]:
    """Rows of one subject, with which the same is done."""
    return [Row(f"{title}: {words}", prepare, act, outcome) for words, prepare, outcome in rows]


# What is done with an input


def predict(case: Case, path: Any, model: Any = None, trainer: dict | None = None, **arguments: Any) -> list[Any]:
    """`anomalib predict` with the fitted LAKE, or another model."""
    run = quiet_engine(case.folder / "results", **trainer or {})
    return run.predict(model=model or case.made.lake, data_path=path, **arguments)


def predict_with(kind: type, **arguments: Any) -> Callable[[Case, Any], Any]:
    """`anomalib predict` with the fitted model of that kind and other arguments."""

    def act(case: Case, path: Any) -> Any:
        checkpoint = case.made.lake_checkpoint if kind is LAKE else case.made.spg_checkpoint
        return predict(case, path, build(kind, **arguments), ckpt_path=checkpoint)

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
    assert table.image.tolist() == paths
    assert set(table.decision) <= {"accepted", "rejected"}


def like_its_twin(case: Case, result: list[Any]) -> None:
    """The odd file gets the score of the same picture as an 8-bit PNG."""
    decided(case, result, 2)
    scores = [float(batch.pred_score) for batch in result]
    assert scores[0] == pytest.approx(scores[1], abs=0.03)


def pictured(case: Case, result: list[Any]) -> None:
    """Every image has pictures of its own as well."""
    decided(case, result)
    pictures = [path for path in (case.folder / "results").rglob("images/**/*") if path.is_file()]
    assert len(pictures) == sum(len(batch.image_path) for batch in result)


def fitted(case: Case, model: Any) -> None:
    """It has learned and decides: its thresholds and scores are finite."""
    del case
    assert model.model.is_fitted
    assert torch.isfinite(model.post_processor.image_threshold)
    assert torch.isfinite(model.post_processor.pixel_threshold)
    result = model.cpu().float().eval()(torch.rand(2, 3, 50, 60))
    assert torch.isfinite(result.pred_score).all()
    assert torch.isfinite(result.anomaly_map).all()


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


def no_code_was_run(case: Case, message: str) -> None:
    """The trap was not sprung."""
    del message
    assert not (case.folder / "code_was_run").exists()


def tokens_gone(case: Case, model: Any) -> None:
    """The run went on from what was left, and cleared it away."""
    fitted(case, model)
    assert not list((case.folder / "tokens").rglob("*.safetensors"))


def without_error(case: Case, result: Any) -> None:
    """There is nothing more to say."""


DECIDED, SAME, PICTURED, REJECTED = Right(decided), Right(like_its_twin), Right(pictured), Right(rejected)
FITTED, AS_PICTURES, WENT_ON = Right(fitted), Right(fitted_on_the_pictures), Right(tokens_gone)
WORKS = Right(without_error)
NAMED = Error((ValueError, OSError), r"(?i)odd\.\w+")  # the message names the file
ANY = (ValueError, OSError, RuntimeError, TypeError)
nan, inf = float("nan"), float("inf")
black = plain()
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (48, 48))]}

IMAGES = [
    *section(
        "image to predict",
        predict,
        ("8-bit grey", odd(mode("L"), twin=mode("L")), SAME),
        ("black and white, 1 bit", odd(mode("1"), twin=mode("1")), SAME),
        ("palette", odd(lambda: colour().quantize(256)), SAME),
        ("palette with a transparent colour", odd(lambda: colour().quantize(256), transparency=0), SAME),
        ("RGBA", odd(mode("RGBA")), SAME),
        ("RGBA, all transparent", odd(plain(tone=(200, 100, 50, 0), kind="RGBA")), DECIDED),
        ("grey with alpha", odd(mode("LA"), twin=mode("L")), SAME),
        ("CMYK JPEG", odd(mode("CMYK"), "odd.jpg", quality=95), SAME),
        ("YCbCr TIFF", odd(mode("YCbCr"), "odd.tiff"), SAME),
        ("LAB TIFF", odd(plain(kind="LAB"), "odd.tiff"), NAMED),
        ("JPEG", odd(colour, "odd.jpg", quality=95), SAME),
        ("progressive JPEG", odd(colour, "odd.jpeg", quality=95, progressive=True), SAME),
        ("JPEG of the lowest quality", odd(colour, "odd.jpg", quality=1), DECIDED),
        ("BMP", odd(colour, "odd.bmp"), SAME),
        ("PPM", odd(colour, "odd.ppm"), SAME),
        ("PGM", odd(mode("L"), "odd.pgm", twin=mode("L")), SAME),
        ("WebP", odd(colour, "odd.webp", lossless=True), SAME),
        ("TIFF, LZW", odd(colour, "odd.tiff", compression="tiff_lzw"), SAME),
        ("TIFF of several pages: the first", odd(colour, "odd.tiff", **FRAMES), SAME),
        ("animated PNG: the first picture", odd(colour, **FRAMES), SAME),
        ("animated WebP: the first picture", odd(colour, "odd.webp", lossless=True, **FRAMES), SAME),
        ("turned by its EXIF: as stored", odd(colour, "odd.jpg", quality=95, exif=turned()), SAME),
        ("a PNG called .jpg", odd(encoded, "odd.jpg"), SAME),
        ("a WebP called .png", odd(lambda: encoded("WEBP", lossless=True)), SAME),
        ("bytes after its end", odd(lambda: encoded() + b"\0" * 999), SAME),
        ("suffix in upper case", odd(encoded, "ODD.PNG"), SAME),
        ("16-bit grey PNG", odd(deep(), twin=mode("L")), SAME),
        ("16-bit grey TIFF", odd(deep(), "odd.tif", twin=mode("L")), SAME),
        ("16-bit grey TIFF, big-endian", odd(deep(), "odd.tif", twin=mode("L"), byteorder=">"), SAME),
        ("16-bit colour PNG", odd(deep("RGB")), SAME),
        ("16-bit colour TIFF", odd(deep("RGB"), "odd.tif", photometric="rgb"), (SAME, NAMED)),
        ("32-bit whole numbers", odd(deep(dtype=np.int32), "odd.tif", twin=mode("L")), (SAME, NAMED)),
        ("floating point in [0, 1]", odd(deep("L", np.float32, 1 / 255), "odd.tif", twin=mode("L")), (SAME, NAMED)),
        ("floating point, not a number", odd(deep("L", np.float32, nan), "odd.tif"), NAMED),
        ("1x1 pixel", odd(plain((1, 1))), DECIDED),
        ("1 pixel high, 500 wide", odd(plain((500, 1))), DECIDED),
        ("1 pixel wide, 500 high", odd(plain((1, 500))), DECIDED),
        ("smaller than a patch", odd(lambda: colour().crop((0, 0, 5, 3))), DECIDED),
        ("12 megapixels", odd(plain((4000, 3000), 90), "odd.jpg"), DECIDED),
        ("20,000 pixels long", odd(lambda: colour().resize((20_000, 8))), DECIDED),
        ("all black", odd(black), DECIDED),
        ("all white", odd(plain(tone="white")), DECIDED),
        ("zero bytes", odd(lambda: b""), NAMED),
        ("truncated PNG", odd(lambda: half(encoded())), NAMED),
        ("truncated JPEG", odd(lambda: half(encoded("JPEG")), "odd.jpg"), NAMED),
        ("truncated TIFF", odd(lambda: half(encoded("TIFF")), "odd.tif"), NAMED),
        ("truncated WebP", odd(lambda: half(encoded("WEBP")), "odd.webp"), NAMED),
        ("damaged in the middle", odd(scrambled), NAMED),
        ("text called .png", odd(lambda: b"This is no image."), NAMED),
        ("a web page called .jpg", odd(lambda: b"<!doctype html><title>404</title>", "odd.jpg"), NAMED),
        ("a header that asks for 10 gigabytes", odd(bomb), NAMED),
    ),
    *section(
        "one file to predict",
        predict,
        ("an image by its path", file("odd.png", encoded), Right(partial(decided, count=1))),
        ("GIF", file("odd.gif", lambda: encoded("GIF")), NAMED),
        ("JPEG 2000", file("odd.jp2", lambda: encoded("JPEG2000")), NAMED),
        ("text", file("odd.txt", b"This is no image."), NAMED),
        ("no such file", missing("odd.png"), NAMED),
        ("below a file", below_a_file("odd.png"), NAMED),
    ),
    *section(
        "a good part, LAKE",
        fit(LAKE, k_shot=None),
        ("truncated", among_good(lambda: half(encoded())), NAMED),
        ("zero bytes", among_good(lambda: b""), NAMED),
        ("text", among_good(lambda: b"This is no image."), NAMED),
        ("a header that asks for 10 gigabytes", among_good(bomb), NAMED),
        ("a single colour", among_good(black), NAMED),
        ("1x1 pixel", among_good(plain((1, 1))), NAMED),
        ("grey among colour", among_good(mode("L")), FITTED),
        ("of another size and shape", among_good(lambda: colour().resize((300, 20))), FITTED),
        ("the same twice", among_good(colour), FITTED),
        ("all the same", all_good(lambda _: colour()), Error(ValueError, "copies of each other.*images that differ")),
        ("all of a single colour", all_good(lambda _: black()), Error(ValueError, r"\d\.png")),
        ("all 16-bit grey", all_good(lambda image: np.asarray(image.convert("L")).astype(np.uint16) * 257), FITTED),
        ("all RGBA", all_good(lambda image: image.convert("RGBA")), AS_PICTURES),
        ("all with a palette", all_good(lambda image: image.quantize(256)), AS_PICTURES),
        ("all CMYK", all_good(lambda image: image.convert("CMYK"), suffix="jpg"), AS_PICTURES),
    ),
    *section(
        "a good part, SPG",
        fit(SPG),
        ("truncated", among_good(lambda: half(encoded())), NAMED),
        ("text", among_good(lambda: b"This is no image."), NAMED),
        ("a header that asks for 10 gigabytes", among_good(bomb), NAMED),
        ("a single colour", among_good(black), (FITTED, NAMED)),
        ("1x1 pixel", among_good(plain((1, 1))), (FITTED, NAMED)),
        ("grey among colour", among_good(mode("L")), FITTED),
        ("of another size and shape", among_good(lambda: colour().resize((300, 20))), FITTED),
        ("all the same", all_good(lambda _: colour()), FITTED),
        ("all of a single colour", all_good(lambda _: black()), (FITTED, Error(ValueError, "single colour|blank"))),
        ("all 16-bit grey", all_good(lambda image: np.asarray(image.convert("L")).astype(np.uint16) * 257), FITTED),
    ),
    *section(
        "a good part that only sets the threshold",
        fit(LAKE, k_shot=2),
        ("truncated", among_good(lambda: half(encoded())), NAMED),
        ("a single colour", among_good(black), FITTED),
    ),
]


def linked(case: Case) -> Path:
    """Images by symbolic links."""
    (case.folder / "images").mkdir()
    for path in case.good(2).iterdir():
        (case.folder / "images" / f"link_{path.name}").symlink_to(path)
    return case.folder / "images"


def dangling(case: Case) -> Path:
    """A link to nothing beside an image."""
    (case.good(1, "images") / "odd.png").symlink_to(case.folder / "gone.png")
    return case.folder / "images"


def looped(case: Case) -> Path:
    """A link to the folder that it is in."""
    (case.good(2, "images") / "again").symlink_to(case.folder / "images")
    return case.folder / "images"


def folder_called_png(case: Case) -> Path:
    """A folder with the name of an image, beside images."""
    (case.good(2, "images") / "odd.png").mkdir()
    return case.folder / "images"


NAMES = [
    *section(
        "name of an image to predict",
        predict_with(LAKE, visualizer=True),
        ("not ASCII", named("größe_检测_деталь.png"), PICTURED),
        ("emoji", named("🔩.png"), PICTURED),
        ("spaces, also at its ends", named(" a part .png"), PICTURED),
        ("signs of web addresses", named("50%_a#1?b=c&d;e.png"), PICTURED),
        ("quotes, comma and semicolon", named("\"a\", 'b'; c.png"), PICTURED),
        ("signs of patterns", named("part[1]*{a}.png"), PICTURED),
        ("backslash", named("a\\b.png"), PICTURED),
        ("colon and bar, which Windows forbids", named("12:30|a.png"), PICTURED),
        ("several dots", named("a.b.png.png"), PICTURED),
        ("255 bytes", named("a" * 251 + ".png"), PICTURED),
        ("leading dash", named("--model.png"), PICTURED),
        ("leading dot", named(".part.png"), PICTURED),
        ("newline", named("a\nb.png"), PICTURED),
        ("not UTF-8", named(b"a\xff.png"), PICTURED),
        ("differing in case only", named("a.png", "A.png"), PICTURED),
        ("the same in several folders", named("a/1.png", "b/1.png", "a/b/1.png"), PICTURED),
        ("the same but for the suffix", named("1.png", "1.bmp", "1.jpg"), PICTURED),
        ("symbolic links", linked, PICTURED),
        ("a link to nothing", dangling, NAMED),
        ("a link that leads back", looped, PICTURED),
        ("a folder called .png", folder_called_png, (PICTURED, NAMED)),
        ("what macOS leaves beside images", odd(lambda: b"\0\5\x16\7", "._odd.png"), NAMED),
    ),
    *section(
        "name of an image to explain",
        predict_with(LAKE, visualizer=ExplanationVisualizer("all")),
        ("not ASCII, signs of web addresses", named("größe 50%#1?.png"), PICTURED),
        ("markup", named("<b onclick='x'>&amp;.png"), PICTURED),
        ("255 bytes", named("a" * 251 + ".png"), PICTURED),
        ("newline", named("a\nb.png"), PICTURED),
        ("not UTF-8", named(b"a\xff.png"), PICTURED),
        ("the same in several folders", named("a/1.png", "b/1.png"), PICTURED),
    ),
    *section(
        "name of the folder of good parts",
        fit(LAKE),
        ("not ASCII, spaces, signs", lambda case: case.good(to="gute Teile #1 检测 50%"), FITTED),
        ("leading dot", lambda case: case.good(to=".good"), FITTED),
        ("leading dash", lambda case: case.good(to="--good"), FITTED),
        ("a link", lambda case: linked_folder(case), FITTED),
    ),
]


def linked_folder(case: Case) -> Path:
    """A link to the folder of good parts."""
    (case.folder / "link").symlink_to(case.good(), target_is_directory=True)
    return case.folder / "link"


def few(count: int) -> Callable[[Case], Path]:
    """So many good parts."""
    return lambda case: case.good(count)


FOLDERS = [
    *section(
        "folder to predict",
        predict,
        ("empty", folder("odd.d"), NAMED),
        ("missing", missing("odd.d"), NAMED),
        ("only text in it", lambda case: file("odd.d/a.txt", b"text")(case).parent, NAMED),
        ("images only in folders of folders", named("a/b/c/d/1.png"), DECIDED),
    ),
    *section(
        "folder of good parts, LAKE",
        fit(LAKE),
        ("empty", folder("odd.d"), Error(ANY, r"odd\.d")),
        ("missing", missing("odd.d"), NAMED),
        ("a file", file("odd.d", b"text"), Error(ANY, r"odd\.d")),
        ("below a file", below_a_file("odd.d"), NAMED),
        ("only text in it", lambda case: file("odd.d/a.txt", b"text")(case).parent, Error(ANY, r"odd\.d")),
        ("one image, and two are wanted", few(1), Error(ValueError, r"k_shot=2 .* 1 .*k_shot=1")),
        ("two images", few(2), FITTED),
    ),
    *section("folder of good parts, LAKE of one image", fit(LAKE, k_shot=1), ("one image", few(1), FITTED)),
    *section(
        "folder of good parts, SPG",
        fit(SPG, views=8),
        ("empty", folder("odd.d"), Error(ANY, r"odd\.d")),
        ("missing", missing("odd.d"), NAMED),
        ("one image", few(1), FITTED),
        ("two images", few(2), FITTED),
    ),
    *section("folder of good parts, SPG that draws once", fit(SPG, views=1), ("one image", few(1), FITTED)),
    *section(
        "folder of bad parts",
        fit(LAKE, partial(tested, abnormal_dir="bad"), {"limit_val_batches": 1.0}),
        ("empty", parts_and_masks(lambda at: shutil.rmtree(at / "bad") or (at / "bad").mkdir()), Error(ANY, "bad")),
        ("missing", parts_and_masks(lambda at: shutil.rmtree(at / "bad")), Error(ANY, "bad")),
        ("a bad part is no image", parts_and_masks(lambda at: (at / "bad/1.png").write_bytes(b"")), Error(ANY, r"bad/1\.png")),
        ("one bad part", parts_and_masks(lambda at: (at / "bad/1.png").unlink()), FITTED),
        ("bad parts in the place of good ones", parts_and_masks(lambda at: shutil.copytree(at / "bad", at / "good", dirs_exist_ok=True)), FITTED),
    ),
    *section(
        "few_shot_source",
        fit_with(LAKE, "few_shot_source"),
        ("good parts", lambda case: case.good(3, "odd.d"), FITTED),
        ("empty", folder("odd.d"), Error(ValueError, r"odd\.d.*few_shot_source")),
        ("missing", missing("odd.d"), Error(ValueError, r"odd\.d.*few_shot_source")),
        ("fewer images than k_shot", lambda case: case.good(1, "odd.d"), Error(ValueError, r"k_shot=2 .*odd\.d.*k_shot=1")),
        ("a damaged image in it", odd(lambda: half(encoded())), NAMED),
        ("a text file", file("odd.txt", b"text"), Error(ValueError, r"odd\.txt.*few_shot_source")),
    ),
    *section(
        "results folder that cannot be written",
        lambda case, path: predict(Case(path, case.made), case.good(2)),
        ("below a file", below_a_file("odd.d"), Error((OSError, ValueError), r"odd\.d|file/")),
    ),
    *section(
        "folder for the report",
        lambda case, path: write_report(path),
        ("empty", folder("odd.d"), Error(ValueError, r"odd\.d.*ExplanationVisualizer")),
        ("missing", missing("odd.d"), Error(ValueError, r"odd\.d.*ExplanationVisualizer")),
        ("records are no JSON", lambda case: file("a/explanations.json", b"{")(case).parent, Error(ValueError, r"a/explanations\.json.*again")),
        ("records of something else", lambda case: file("a/explanations.json", b"[1]")(case).parent, Error(ValueError, r"a/explanations\.json.*again")),
    ),
]


def mask(change: Callable[[Path], Any]) -> Callable[[Case], Path]:
    """Parts with masks, one of which is changed."""
    return parts_and_masks(lambda at: change(at / "masks/1.png"))


def as_mask(convert: Callable[[Image.Image], Any]) -> Callable[[Case], Path]:
    """Parts with masks, one of which is written in an odd way."""
    return mask(lambda path: write_image(path, convert(Image.open(path).copy())))


MASK = Error(ANY, r"masks/1\.png|bad/1\.png")

MASKS = [
    *section(
        "mask to learn from",
        fit(SPG, labelled),
        ("as it should be", parts_and_masks(), FITTED),
        ("missing", mask(Path.unlink), Error(ANY, r"(?i)mask")),
        ("folder missing", parts_and_masks(lambda at: shutil.rmtree(at / "masks")), Error(ANY, "masks")),
        ("one too many", parts_and_masks(lambda at: write_image(at / "masks/2.png", black())), Error(ANY, r"(?i)mask|length")),
        ("of another name", mask(lambda path: path.rename(path.with_name("x.png"))), Error(ANY, "(?i)mask")),
        ("all black", as_mask(lambda image: Image.new("L", image.size)), MASK),
        ("all white", as_mask(lambda image: Image.new("L", image.size, 255)), FITTED),
        ("of another size", as_mask(lambda image: image.resize((20, 20))), MASK),
        ("turned", as_mask(lambda image: image.crop((0, 0, 48, 30))), MASK),
        ("values 0 and 1", as_mask(lambda image: image.point(lambda value: value // 255)), FITTED),
        ("1 bit", as_mask(lambda image: image.convert("1")), FITTED),
        ("colour", as_mask(lambda image: image.convert("RGB")), FITTED),
        ("palette", as_mask(lambda image: image.convert("P")), FITTED),
        ("grey values between", as_mask(lambda image: image.resize((12, 12)).resize((48, 48))), FITTED),
        ("16-bit", as_mask(lambda image: np.asarray(image).astype(np.uint16) * 257), FITTED),
        ("truncated", mask(lambda path: path.write_bytes(half(path.read_bytes()))), MASK),
        ("zero bytes", mask(lambda path: path.write_bytes(b"")), MASK),
        ("text", mask(lambda path: path.write_bytes(b"text")), MASK),
        ("its image truncated", parts_and_masks(lambda at: (at / "bad/1.png").write_bytes(half(encoded()))), MASK),
    ),
    *section(
        "labelled data without masks",
        fit(SPG, partial(labelled, mask_dir=None)),
        ("none named", parts_and_masks(), Error(ValueError, r"2 of 2 .*no mask.*bad/0\.png")),
    ),
    *section(
        "labelled data without bad parts",
        fit(SPG, partial(labelled, mask_dir=None, abnormal_dir=None)),
        ("none named", parts_and_masks(), Error(ValueError, "no anomalous image")),
    ),
    *section(
        "mask to test by",
        fit(LAKE, partial(tested, abnormal_dir="bad", mask_dir="masks"), {"limit_val_batches": 1.0}),
        ("as it should be", parts_and_masks(), FITTED),
        ("missing", mask(Path.unlink), Error(ANY, "(?i)mask|length")),
        ("all black", as_mask(lambda image: Image.new("L", image.size)), FITTED),
        ("text", mask(lambda path: path.write_bytes(b"text")), MASK),
        ("truncated", mask(lambda path: path.write_bytes(half(path.read_bytes()))), MASK),
    ),
]


def other(**values: Any) -> Callable[[Case], Path]:
    """The guides file with other metadata; ``None`` leaves one out."""

    def change(_: Any, header: dict[str, Any]) -> None:
        header.update(values)
        for name in [name for name, value in values.items() if value is None]:
            del header[name]

    return guides_with(change)


def tensor(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[Case], Path]:
    """The guides file with another tensor."""
    return guides_with(lambda tensors, _: tensors.update({f"0.{name}": change(tensors[f"0.{name}"])}))


def one_number(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """The tensor with its first number replaced."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[0] = value
        return tensor

    return change


ODD_GUIDES = Error(ValueError, r"odd\.safetensors")

GUIDES = [
    *section(
        "guides file",
        zero_shot,
        ("as it should be", guides_with(lambda *_: None), FITTED),
        ("missing", missing("odd.safetensors"), ODD_GUIDES),
        ("a folder", folder("odd.safetensors"), ODD_GUIDES),
        ("below a file", below_a_file("odd.safetensors"), ODD_GUIDES),
        ("zero bytes", file("odd.safetensors", b""), ODD_GUIDES),
        ("truncated", damaged("guides", half, "odd.safetensors"), ODD_GUIDES),
        ("its last byte missing", damaged("guides", lambda content: content[:-1], "odd.safetensors"), ODD_GUIDES),
        ("text", file("odd.safetensors", b"text"), ODD_GUIDES),
        ("an image", file("odd.safetensors", encoded), ODD_GUIDES),
        ("weights of a backbone", damaged("weights", bytes, "odd.safetensors"), ODD_GUIDES),
        ("a checkpoint of SPG", damaged("spg_checkpoint", bytes, "odd.safetensors"), ODD_GUIDES),
        ("a pickle with code in it", trap("odd.safetensors"), ODD_GUIDES),
        ("of a newer version", other(version="2"), Error(ValueError, r"odd\.safetensors.*2.*Update")),
        ("without a version", other(version=None), ODD_GUIDES),
        ("without a backbone", other(backbone=None), ODD_GUIDES),
        ("without layers", other(layers=None), ODD_GUIDES),
        ("without an image size", other(image_size=None), (FITTED, ODD_GUIDES)),
        ("without settings", other(settings=None), (FITTED, ODD_GUIDES)),
        ("with more than is known", other(note="from the other line"), FITTED),
        ("metadata no JSON", guides_with(lambda _, header: header.update(layers="[3")), ODD_GUIDES),
        ("of a backbone that timm lacks", other(backbone="vit_gone"), Error(ValueError, "vit_gone")),
        ("of another backbone", other(backbone="vit_tiny_patch16_224"), Error(ValueError, r"odd\.sa|weights\.sa")),
        ("of a block that is not there", other(layers=[77]), Error(ValueError, r"77")),
        ("of two blocks, guides for one", other(layers=[2, 3]), ODD_GUIDES),
        ("image size 0", other(image_size=[0, 64]), Error(ValueError, r"image_size|odd\.safetensors")),
        ("temperature 0", other(temperature=0), ODD_GUIDES),
        ("temperature negative", other(temperature=-0.07), ODD_GUIDES),
        ("temperature not a number", other(temperature=nan), ODD_GUIDES),
        ("temperature a word", other(temperature=["warm"]), ODD_GUIDES),
        ("vectors not numbers", tensor("vectors", one_number(nan)), ODD_GUIDES),
        ("coefficients infinite", tensor("coefficients", one_number(inf)), ODD_GUIDES),
        ("coefficients negative", tensor("coefficients", one_number(-1)), ODD_GUIDES),
        ("vectors other than atoms make", tensor("vectors", one_number(5)), ODD_GUIDES),
        ("atoms not of unit length", tensor("atoms", one_number(5)), ODD_GUIDES),
        ("no atoms at all", tensor("atoms", lambda atoms: atoms[:0]), ODD_GUIDES),
        ("three guides", tensor("vectors", lambda vectors: vectors[:3]), ODD_GUIDES),
        ("of another width", tensor("vectors", lambda vectors: vectors[:, :10]), ODD_GUIDES),
        ("a tensor missing", guides_with(lambda tensors, _: tensors.pop("0.vectors")), ODD_GUIDES),
        ("a tensor too many", guides_with(lambda tensors, _: tensors.update(x=torch.ones(1))), ODD_GUIDES),
        ("whole numbers", tensor("vectors", lambda vectors: vectors.long()), ODD_GUIDES),
    ),
    *section(
        "guides file of this backbone",
        lambda case, path: zero_shot(case, path, **{"layers": [4]}),
        ("another layer asked for", guides_with(lambda *_: None), Error(ValueError, r"odd\.safetensors.*layers=\[3\].*layers=\[4\]")),
    ),
    *section(
        "guides file of another backbone",
        lambda case, path: zero_shot(case, path, backbone="vit_tiny_patch16_224", pre_trained=False, weights=None),
        ("another backbone asked for", guides_with(lambda *_: None), Error(ValueError, r"odd\.safetensors.*backbone=test_vit.*backbone=vit_tiny")),
    ),
]


def again(data: Callable = partial(good_parts, train_batch_size=2), **arguments: Any) -> Callable[[Case, Any], Any]:
    """The same command again, with tokens on disk."""
    return fit(SPG, data, memory_limit=0, **arguments)


def without_header(files: list[Path]) -> None:
    """A token file of which only the numbers are left."""
    from safetensors.torch import load_file, save_file

    save_file(load_file(files[1]), files[1])


def with_numbers(value: float) -> Callable[[list[Path]], None]:
    """Token files with a number replaced."""

    def change(files: list[Path]) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file, save_file

        with safe_open(files[1], "pt") as opened:
            header = opened.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(files[1]).items()}
        tensors["patches.0"].view(-1)[0] = value
        save_file(tensors, files[1], header)

    return change


def others_stay(case: Case, model: Any) -> None:
    """The other run's tokens are still there."""
    fitted(case, model)
    assert len(list((case.folder / "tokens").rglob("*.safetensors"))) > 2


TOKENS = [
    *section(
        "tokens of an interrupted run",
        again(),
        ("as they should be", interrupted(), WENT_ON),
        ("the last file missing", interrupted(lambda files: files[-1].unlink()), WENT_ON),
        ("the first file missing", interrupted(lambda files: files[0].unlink()), WENT_ON),
        ("a file truncated", interrupted(lambda files: files[1].write_bytes(half(files[1].read_bytes()))), WENT_ON),
        ("a file of zero bytes", interrupted(lambda files: files[1].write_bytes(b"")), WENT_ON),
        ("a file of text", interrupted(lambda files: files[1].write_bytes(b"text")), WENT_ON),
        ("a file without its header", interrupted(without_header), WENT_ON),
        ("a file that is not a number", interrupted(with_numbers(nan)), (WENT_ON, Error(ValueError, "tokens"))),
        ("a temporary file", interrupted(lambda files: files[0].with_name(".000009.safetensors.1.tmp").write_bytes(b"x")), WENT_ON),
        ("someone's text among them", interrupted(lambda files: files[0].with_name("note.txt").write_bytes(b"x")), WENT_ON),
        ("someone's tensors among them", interrupted(lambda files: shutil.copy(files[0], files[0].with_name("note.safetensors"))), (WENT_ON, Error(ANY, r"note\.safetensors"))),
        ("someone's file beside them", interrupted(lambda files: (files[0].parents[1] / "note.txt").write_bytes(b"x")), WENT_ON),
        ("of a run with another seed", interrupted(seed=9), Right(others_stay)),
        ("of a run with other layers", interrupted(layers=[2]), Right(others_stay)),
    ),
    *section(
        "tokens_dir",
        lambda case, path: again(tokens_dir=path)(case, case.good()),
        ("a file", file("odd.d", b"text"), Error((OSError, ValueError), r"odd\.d")),
        ("below a file", below_a_file("odd.d"), Error((OSError, ValueError), r"odd\.d")),
        ("in folders that are not there yet", missing("a/b/c"), FITTED),
        ("none, and too little memory", lambda _: None, Error(MemoryError, "memory_limit.*tokens_dir")),
    ),
]


def checkpoint(change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], Path]:
    """LAKE's checkpoint with something else in it."""
    return checkpoint_with("lake_checkpoint", change)


def saved(kind: type, **arguments: Any) -> Callable[[Case], Path]:
    """The checkpoint of a model that never learned."""

    def write(case: Case) -> Path:
        run = quiet_engine(case.folder / "results", max_epochs=0)
        run._setup_trainer(build(kind, **arguments))
        run.trainer.strategy.connect(build(kind, **arguments))
        run.trainer.save_checkpoint(case.folder / "odd.ckpt")
        return case.folder / "odd.ckpt"

    return write


def not_numbers(key: str) -> Callable[[dict[str, Any]], None]:
    """NaN in one of a checkpoint's tensors."""
    return lambda content: content["state_dict"][key].fill_(nan) and None


ODD_CHECKPOINT = Error((*ANY, Exception), r"odd\.ckpt")

CHECKPOINTS = [
    *section(
        "checkpoint",
        predict_from(LAKE),
        ("as it should be", damaged("lake_checkpoint", bytes, "odd.ckpt"), DECIDED),
        ("missing", missing("odd.ckpt"), ODD_CHECKPOINT),
        ("a folder", folder("odd.ckpt"), ODD_CHECKPOINT),
        ("zero bytes", file("odd.ckpt", b""), ODD_CHECKPOINT),
        ("truncated", damaged("lake_checkpoint", half, "odd.ckpt"), ODD_CHECKPOINT),
        ("text", file("odd.ckpt", b"text"), ODD_CHECKPOINT),
        ("a guides file", damaged("guides", bytes, "odd.ckpt"), ODD_CHECKPOINT),
        ("a weights file", damaged("weights", bytes, "odd.ckpt"), ODD_CHECKPOINT),
        ("a pickle with code in it", trap("odd.ckpt"), Error(Exception, r"(?i)odd\.ckpt|weights.only")),
        ("without state", checkpoint(lambda content: content.pop("state_dict") and None), Error(Exception, r"odd\.ckpt|state_dict")),
        ("a bare state dict", checkpoint(lambda content: content["state_dict"]), Error(Exception, r"odd\.ckpt|state_dict")),
        ("without arguments", checkpoint(lambda content: content.pop("hyper_parameters") and None), DECIDED),
        ("a tensor missing", checkpoint(lambda content: content["state_dict"].pop("model.neurons.0.indices") and None), Error(RuntimeError, r"neurons\.0\.indices")),
        ("a tensor of another shape", checkpoint(lambda content: content["state_dict"].update({"model.neurons.0.indices": torch.arange(7)})), Error(ANY, "neurons|shape|odd")),
        ("its bank not numbers", checkpoint(not_numbers("model.banks.0.0.tokens")), REJECTED),
        ("of SPG", damaged("spg_checkpoint", bytes, "odd.ckpt"), Error(ValueError, "SPG|layers=")),
        ("of a model that never learned", saved(LAKE), Error(RuntimeError, "(?i)train it|not .*fitted|no normality bank")),
    ),
    *section(
        "checkpoint of LAKE",
        lambda case, arguments: predict_from(LAKE, **arguments)(case, case.made.lake_checkpoint),
        *(
            (f"another {name}", lambda _, given=given: given, Error(ValueError, rf"saved with {name}=.*this model has {name}=.*arguments"))
            for name, given in {
                "backbone": {"backbone": "vit_tiny_patch16_224"},
                "layers": {"layers": [2, 3]},
                "image_size": {"image_size": 96},
                "num_neurons": {"num_neurons": 30},
                "scales": {"scales": [1]},
                "selection": {"selection": "lowest"},
                "normalization": {"normalization": "before"},
            }.items()
        ),
        ("another rate: the threshold moves", lambda _: {"false_alarm_rate": 0.4}, DECIDED),
    ),
    *section(
        "checkpoint of SPG",
        predict_from(SPG),
        ("as it should be", damaged("spg_checkpoint", bytes, "odd.ckpt"), DECIDED),
        ("truncated", damaged("spg_checkpoint", half, "odd.ckpt"), ODD_CHECKPOINT),
        ("of LAKE", damaged("lake_checkpoint", bytes, "odd.ckpt"), Error(ValueError, "LAKE|layers=")),
        ("its guides not numbers", checkpoint_with("spg_checkpoint", not_numbers("model.guides.0.vectors")), REJECTED),
        ("of a model that never learned", saved(SPG), Error(RuntimeError, "no guides yet")),
    ),
    *section(
        "checkpoint of SPG, other arguments",
        lambda case, arguments: predict_from(SPG, **arguments)(case, case.made.spg_checkpoint),
        ("another layer", lambda _: {"layers": [4]}, Error(ValueError, r"layers=\[3\].*layers=\[4\]")),
        ("another image size", lambda _: {"image_size": 96}, Error(ValueError, r"\[64, 64\].*\[96, 96\]")),
    ),
]

ODD_WEIGHTS = Error(ValueError, r"odd\.\w+")

WEIGHTS = [
    *section(
        "weights file",
        fit_with(LAKE, "weights", pre_trained=True),
        ("as it should be", damaged("weights", bytes, "odd.safetensors"), FITTED),
        ("in half precision", weights_with(lambda state: {key: value.half() for key, value in state.items()}), FITTED),
        ("missing", missing("odd.pth"), ODD_WEIGHTS),
        ("a folder", folder("odd.pth"), ODD_WEIGHTS),
        ("zero bytes", file("odd.safetensors", b""), ODD_WEIGHTS),
        ("truncated", damaged("weights", half, "odd.safetensors"), ODD_WEIGHTS),
        ("text", file("odd.pth", b"text"), ODD_WEIGHTS),
        ("an image", file("odd.safetensors", encoded), ODD_WEIGHTS),
        ("a pickle with code in it", trap("odd.pth"), ODD_WEIGHTS),
        ("a guides file", damaged("guides", bytes, "odd.safetensors"), ODD_WEIGHTS),
        ("a checkpoint of LAKE", damaged("lake_checkpoint", bytes, "odd.ckpt"), ODD_WEIGHTS),
        ("of another architecture", weights_with(lambda _: {"conv1.weight": torch.ones(3)}), Error(ValueError, r"odd\.safetensors.*conv1")),
        ("a tensor missing", weights_with(lambda state: state.pop("cls_token") is None or None), Error(ValueError, r"odd\.safetensors.*cls_token")),
        ("a tensor too many", weights_with(lambda state: state.update(more=torch.ones(1))), Error(ValueError, r"odd\.safetensors.*more")),
        ("a tensor of another shape", weights_with(lambda state: state.update(cls_token=torch.ones(1, 1, 9))), Error(ValueError, r"odd\.safetensors.*cls_token")),
        ("not numbers", weights_with(lambda state: state["cls_token"].fill_(nan) is None or None), Error(ValueError, r"odd\.safetensors|(?i)weights")),
        ("all zero", weights_with(lambda state: {key: value * 0 for key, value in state.items()}), Error(ValueError, r"odd\.safetensors|do not vary")),
    ),
    *section(
        "weights file for SPG",
        fit_with(SPG, "weights", pre_trained=True),
        ("truncated", damaged("weights", half, "odd.safetensors"), ODD_WEIGHTS),
        ("not numbers", weights_with(lambda state: state["cls_token"].fill_(nan) is None or None), Error(ValueError, r"odd\.safetensors|(?i)weights")),
    ),
    *section(
        "weights file for text",
        fit_with(LAKE, "weights", backbone=TINY_CLIP, pre_trained=True, layers=[4]),
        ("without a text tower", damaged("weights", bytes, "odd.safetensors"), Error(ValueError, r"odd\.safetensors.*text_weight=0")),
    ),
    *section(
        "model hub that cannot be reached",
        lambda case, kind: fit(kind, backbone="test_vit.r160_in1k", pre_trained=True)(case, case.good()),
        ("LAKE", lambda _: LAKE, Error(RuntimeError, r"test_vit\.r160_in1k.*--model\.weights")),
        ("SPG", lambda _: SPG, Error(RuntimeError, r"test_vit\.r160_in1k.*--model\.weights")),
    ),
]


def says(name: str, value: Any) -> str:
    """A pattern: the argument's name, and its value after that."""
    return rf"(?s){name}.*{re.escape(str(value))}"


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


BOTH = {
    "backbone": ["vit_tiny_patch16_223", "resnet18", "vit_tiny_patch16_224.gone"],
    "layers": [[], [6], [-7], [0, 99]],
    "image_size": [0, -64, [64], [64, 64, 64], [64, 0]],
    "sigma": [-1.0, nan, inf],
    "false_alarm_rate": [0.0, 0.51, -0.1, nan],
    "pixel_false_alarm_rate": [0.0, 0.51, nan],
    "seed": [-1, 2**32],
}
CLIP = {"backbone": TINY_CLIP, "layers": [4], "text_weight": 0.3}

ARGUMENTS = [
    *refused(
        LAKE,
        **BOTH,
        scales=[[], [2], [0], [-1], [1, 4]],
        semantic_layer=[{**CLIP, "semantic_layer": 99}],
        k_shot=[0, -1],
        num_neurons=[0, -5, 65],
        selection=["best"],
        normalization=["l2"],
        bank_size=[0, -1],
        text_weight=[-0.1, 1.1, nan, 0.3],
        class_name=[{**CLIP, "class_name": "a {}"}, {**CLIP, "class_name": " "}],
        normal_prompts=[{**CLIP, "normal_prompts": []}, {**CLIP, "normal_prompts": ["good"]}],
        anomalous_prompts=[{**CLIP, "normal_prompts": ["good"], "anomalous_prompts": ["bad", " "]}],
        temperature=[0.0, -1.0, nan, inf],
    ),
    *refused(
        SPG,
        **BOTH,
        hold_out=[-0.1, 1.0, nan],
        views=[0, -1],
        num_atoms=[0, -1],
        k=[0, 33],
        sae_epochs=[0, -1],
        guide_epochs=[0],
        guide_top_k=[0, 33, {"guide_top_k": 3, "dictionary": False}],
        sparsity=[-1e-3, nan, inf],
        ema_decay=[-0.1, 1.0, nan],
        temperature=[0.0, -1.0, nan, inf],
        image_score=["mean"],
        top_fraction=[-0.1, 1.1, nan],
        cls_weight=[-0.1, 1.1, nan],
        memory_limit=[-1.0, nan],
    ),
    *mistyped(
        LAKE,
        backbone=[3],
        layers=[[1.5], "last"],
        scales=[[1.5]],
        pre_trained=["perhaps"],
        image_size=["large", 64.5],
        k_shot=[2.5, "four"],
        num_neurons=[2.5, None],
        selection=["best"],
        text_weight=["much"],
        normal_prompts=["good"],
        temperature=["warm"],
    ),
    *mistyped(
        SPG,
        layers=["last"],
        hold_out=["few"],
        views=[2.5],
        dictionary=["perhaps"],
        num_atoms=["many"],
        guide_top_k=[1.5],
        image_score=["mean"],
        memory_limit=["16 GiB"],
        tokens_dir=[["a", "b"]],
        seed=[0.5],
        no_such_argument=[1],
    ),
]


def train(*arguments: Any, model: str = "LAKE", **config: Any) -> Callable[[Case], list[Any]]:
    """Arguments of `anomalib train` on a folder, with a config of the quick model, changed."""

    def write(case: Case) -> list[Any]:
        chosen = {"backbone": VIT, "pre_trained": False, "layers": [3], "image_size": SIZE, "visualizer": False}
        folders = {"name": "part", "root": str(case.folder), "normal_dir": case.good(6).name, "num_workers": 0}
        modes = {"test_split_mode": "none", "val_split_mode": "none"}
        settings = {
            "model": {"class_path": model, "init_args": chosen},
            "data": {"class_path": "Folder", "init_args": {**folders, **modes}},
            "trainer": {"limit_val_batches": 0, "accelerator": "cpu", "enable_progress_bar": False, "logger": False},
            **config,
        }
        (case.folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return ["train", "--config", "config.yaml", *arguments]

    return write


def config(name: str, content: bytes) -> Callable[[Case], list[Any]]:
    """`anomalib train` with that file as config."""

    def write(case: Case) -> list[Any]:
        file(name, content)(case)
        return ["train", "--config", name]

    return write


def predicting(*arguments: Any) -> Callable[[Case], list[Any]]:
    """`anomalib predict` with LAKE's checkpoint, and more arguments."""

    def write(case: Case) -> list[Any]:
        train()(case)
        return ["predict", "--config", "config.yaml", "--ckpt_path", case.made.lake_checkpoint, *arguments]

    return write


CONFIGS = [
    *section(
        "command",
        command,
        ("as it should be", train(), WORKS),
        ("unknown argument", train("--model.bakbone", "x"), Error(SystemExit, "bakbone")),
        ("unknown section", train("--modle.k_shot", "1"), Error(SystemExit, "modle")),
        ("unknown model", train("--model", "LAKEE"), Error(SystemExit, "LAKEE")),
        ("unknown data", train("--data", "Foldr"), Error(SystemExit, "Foldr")),
        ("unknown command", lambda _: ["trian"], Error(SystemExit, "trian")),
        ("value of a wrong type", train("--model.k_shot", "2.5"), Error(SystemExit, "(?s)k_shot.*2.5")),
        ("value out of range", train("--model.k_shot", "0"), Error((SystemExit, ValueError), "k_shot=0")),
        ("more shots than there are", train("--model.k_shot", "99"), Error(ValueError, "k_shot=99.* 6 ")),
        ("misspelt key in the config", train(modle={}), Error(SystemExit, "modle")),
        ("misspelt argument in the config", train(model={"class_path": "LAKE", "init_args": {"kshot": 1}}), Error(SystemExit, "kshot")),
        ("misspelt class in the config", train(model={"class_path": "LAKEE"}), Error(SystemExit, "LAKEE")),
        ("a word for a number in the config", train(trainer={"max_epochs": "one"}), Error(SystemExit, "(?s)max_epochs.*one")),
        ("config missing", lambda _: ["train", "--config", "odd.yaml"], Error(SystemExit, r"odd\.yaml")),
        ("config no YAML", config("odd.yaml", b"model: [LAKE\n"), Error(SystemExit, "(?i)config|yaml")),
        ("config a list", config("odd.yaml", b"- 1\n- 2\n"), Error((SystemExit, *ANY), "(?i)config|yaml|dict")),
        ("config not text", config("odd.yaml", b"\x89PNG\r\n\x1a\n\xff\xfe"), Error((SystemExit, *ANY), "(?i)config|yaml|decode")),
        ("guides file missing", train("--model.guides_file", "odd.safetensors", model="SPG"), Error((SystemExit, ValueError), r"odd\.safetensors")),
        ("predict", predicting("--data", "good", "--model.layers", "[1,3]", "--model.num_neurons", "20"), WORKS),
        ("predict with other arguments", predicting("--data", "good"), Error(ValueError, "layers=.*same --config")),
        ("predict on nothing", predicting("--data", "odd.d"), Error((SystemExit, *ANY), r"odd\.d")),
        ("predict from a missing checkpoint", predicting("--data", "good", "--ckpt_path", "odd.ckpt"), Error((SystemExit, *ANY), r"odd\.ckpt")),
    ),
]


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


ON_DISK = ["--model.memory_limit", "0", "--model.views", "2", "--model.num_atoms", "32", "--model.k", "4"]
ON_DISK += ["--model.seed", "0", "--trainer.enable_progress_bar", "true", "--model.guide_epochs", "1"]

SCRIPTS = [
    *section(
        "script",
        by_the_script,
        ("unknown argument", train("--model.bakbone", "x"), Error(SystemExit, "bakbone")),
        ("a damaged image", lambda case: among_good(lambda: half(encoded()))(case) and train()(case), Error(SystemExit, r"odd\.png")),
    ),
    *section("script", killed_by_the_script, ("killed, and then again", train(*ON_DISK, model="SPG"), WORKS)),
]


def killed_then_again(place: str, number: int, kind: type = SPG, **arguments: Any) -> Callable[[Case, Any], Any]:
    """A fit whose process gets a signal where a function is called, and then the same again."""

    def act(case: Case, path: Any) -> Any:
        run = fit(kind, partial(good_parts, train_batch_size=2), **arguments)

        def until_then() -> None:
            with signal_at(place, number):
                run(case, path)

        with pytest.raises((Killed, SystemExit, KeyboardInterrupt)):
            in_a_process(until_then)
        return run(case, path)

    return act


def half_a_file(*arguments: Any) -> None:
    """Power off while the second file of tokens is written."""
    Path(arguments[1]).write_bytes(b"half")
    if "000001" in str(arguments[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    from safetensors.torch import save_file

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


def all_saved(pattern: str, count: int = 2) -> Right:
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
        quiet_engine(case.folder / "results").fit(model=model, datamodule=good_parts(path))
        return model

    return act


def export(case: Case, arguments: tuple[Any, str]) -> Any:
    """`anomalib export`."""
    model, kind = arguments
    return quiet_engine(case.folder / "results").export(model, kind, export_root=case.folder / "exported")


def loader_only(case: Case, path: Any) -> Any:
    """A fit by a dataloader, without a datamodule."""
    data = good_parts(path)
    data.setup()
    loader = DataLoader(data.train_data, batch_size=2, collate_fn=data.train_data.collate_fn)
    model = build(LAKE)
    quiet_engine(case.folder / "results").fit(model=model, train_dataloaders=loader)
    return model


SIZED = {"train_batch_size": 2}
NOT_YET = "(?i)no normality bank yet|no guides yet|train it|not .*fitted"

STOPS = [
    *section("killed as tokens are all stored", killed_then_again("anomalib_spg.torch_model.train_sae", signal.SIGKILL, memory_limit=0), ("then again", few(4), WENT_ON)),
    *section("Ctrl+C as tokens are all stored", killed_then_again("anomalib_spg.torch_model.train_sae", signal.SIGINT, memory_limit=0), ("then again", few(4), WENT_ON)),
    *section("killed as guides are learned", killed_then_again("anomalib_spg.torch_model.train_guides", signal.SIGKILL, memory_limit=0), ("then again", few(4), WENT_ON)),
    *section("killed as guides are saved", killed_then_again("anomalib_spg.torch_model.save_guides", signal.SIGKILL, memory_limit=0), ("then again", few(4), WENT_ON)),
    *section("killed in memory", killed_then_again("anomalib_spg.torch_model.train_sae", signal.SIGKILL), ("then again", few(4), FITTED)),
    *section("killed while a file is written", killed_while_writing, ("then again", few(4), WENT_ON)),
    *section("killed, LAKE", killed_then_again("anomalib_lake.torch_model.LAKEModel.fit", signal.SIGKILL, LAKE), ("then again", few(4), FITTED)),
    *section("Ctrl+C, LAKE", killed_then_again("anomalib_lake.torch_model.LAKEModel.fit", signal.SIGINT, LAKE), ("then again", few(4), FITTED)),
    *section("disk full", on_a_full_disk(SPG, 2000), ("as guides are saved", few(4), Error(OSError, r"guides\.safetensors.*Make room"))),
    *section("disk full", on_a_full_disk(SPG, 2000, memory_limit=0), ("as tokens are stored", few(4), Error(OSError, "tokens.*Make room.*same command"))),
    *section("disk full", on_a_full_disk(LAKE, 50_000), ("as a checkpoint is saved", few(4), Error(OSError, r"model\.ckpt|results"))),
    *section("disk full", predict_on_a_full_disk, ("as the table is written", few(2), Error(OSError, r"predictions\.csv"))),
    *section("two processes at once", at_once(predict), ("predict into one folder", few(4), all_saved("predictions*.csv"))),
    *section("two processes at once", at_once(fit(LAKE)), ("LAKE into one folder", few(4), all_saved("model.ckpt"))),
    *section("two processes at once", at_once(again()), ("SPG, tokens in one folder", few(4), (all_saved("guides.safetensors"), Error(ANY, "tokens")))),
]  # fmt: skip

ORDER = [
    *section("16 bits of precision", fit(LAKE, trainer={"precision": "bf16-mixed"}), ("LAKE, bf16-mixed", few(4), FITTED)),
    *section("16 bits of precision", fit(SPG, trainer={"precision": "bf16-mixed"}), ("SPG, bf16-mixed", few(4), FITTED)),
    *section("16 bits of precision", fit(SPG, labelled, {"precision": "bf16-mixed"}), ("SPG, labelled, bf16-mixed", parts_and_masks(), FITTED)),
    *section("16 bits of precision", fit(LAKE, trainer={"precision": "16-mixed"}), ("LAKE, 16-mixed", few(4), FITTED)),
    *section("16 bits of precision", fit(SPG, trainer={"precision": "16-mixed"}), ("SPG, 16-mixed", few(4), FITTED)),
    *section("16 bits of precision", fit(LAKE, trainer={"precision": "bf16-true"}), ("LAKE, bf16-true", few(4), FITTED)),
    *section("16 bits of precision", fit(SPG, trainer={"precision": "bf16-true"}), ("SPG, bf16-true", few(4), FITTED)),
    *section("64 bits of precision", fit(LAKE, trainer={"precision": "64-true"}), ("LAKE", few(4), FITTED)),
    *section("64 bits of precision", fit(SPG, trainer={"precision": "64-true"}), ("SPG", few(4), FITTED)),
    *section("16 bits of precision", lambda case, path: predict(case, path, build(LAKE), {"precision": "bf16-mixed"}, ckpt_path=case.made.lake_checkpoint), ("predict, LAKE", few(3), DECIDED)),
    *section("16 bits of precision", lambda case, path: predict(case, path, build(SPG), {"precision": "bf16-mixed"}, ckpt_path=case.made.spg_checkpoint), ("predict, SPG", few(3), DECIDED)),
    *section("fitted twice", twice(LAKE), ("LAKE", few(4), FITTED)),
    *section("fitted twice", twice(SPG), ("SPG", few(4), FITTED)),
    *section("fitted after an error", again_after_an_error(LAKE), ("LAKE", few(4), FITTED)),
    *section("fitted after an error", again_after_an_error(SPG), ("SPG", few(4), FITTED)),
    *section("fitted for several epochs", fit(LAKE, trainer={"max_epochs": 3}), ("LAKE", few(4), FITTED)),
    *section("fitted for several epochs", fit(SPG, trainer={"max_epochs": 3}), ("SPG", few(4), FITTED)),
    *section("fitted on no batch", fit(LAKE, trainer={"limit_train_batches": 0}), ("LAKE", few(4), Error(ANY, "no normal images|limit_train_batches"))),
    *section("fitted without a datamodule", loader_only, ("LAKE", few(4), FITTED)),
    *section(
        "predict before fit",
        lambda case, kind: predict(case, case.good(2), build(kind)),
        ("LAKE", lambda _: LAKE, Error(RuntimeError, NOT_YET)),
        ("SPG", lambda _: SPG, Error(RuntimeError, NOT_YET)),
    ),
    *section(
        "export before fit",
        export,
        *((f"{kind.__name__} to {form}", lambda _, kind=kind, form=form: (build(kind), form), Error(ANY, NOT_YET)) for kind in (LAKE, SPG) for form in ("torch", "onnx")),
    ),
    *section(
        "export",
        export,
        ("LAKE to torch", lambda case: (case.made.lake, "torch"), WORKS),
        ("an unknown format", lambda case: (case.made.lake, "odd"), Error(ValueError, "odd")),
    ),
    *section(
        "explanations",
        lambda case, path: predict(case, path, Patchcore("resnet18", pre_trained=False, visualizer=ExplanationVisualizer())),
        ("of another model", few(2), Error(ANY, "Patchcore.*(SPG|LAKE)|explain")),
    ),
]  # fmt: skip

CATALOGUE = [*IMAGES, *NAMES, *FOLDERS, *MASKS, *GUIDES, *TOKENS, *CHECKPOINTS, *WEIGHTS, *ARGUMENTS, *CONFIGS, *STOPS, *ORDER]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Good parts, models fitted on them, and their files."""
    return make(tmp_path_factory.mktemp("made"))


def run(row: Row, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Prepare an input, act on it, and check what must come of it and what must stay."""
    value = row.prepare(case)
    before = hashes(case.folder, case.made.folder)
    capsys.readouterr()
    outcomes = row.outcome if isinstance(row.outcome[0], (Right, Error)) else (row.outcome,)
    rights = [outcome for outcome in outcomes if isinstance(outcome, Right)]
    errors = [outcome for outcome in outcomes if isinstance(outcome, Error)]
    raised = None
    try:
        result = row.act(case, value)
    except BaseException as exception:
        raised = exception
        if not any(isinstance(exception, error.type) for error in errors):
            raise
        message = f"{exception}\n{capsys.readouterr().err}"
        assert any(
            isinstance(exception, error.type) and re.search(error.says, message) for error in errors
        ), f"{type(exception).__name__}: {message}"
    else:
        assert rights, f"There was no error, but {errors} should come."
        rights[0].holds(case, result)
    after = hashes(case.folder, case.made.folder)
    for path, checksum in before.items():
        consumed = raised is None and len(path.parts) > 2 and path.parent.parent.name == "tokens"
        assert consumed or after.get(path) == checksum, f"{path} was changed"
    check_whole([path for path in after if path not in before])
    assert not (case.folder / "code_was_run").exists()


@pytest.mark.parametrize("row", CATALOGUE, ids=lambda row: row.words)
def test_kind(
    row: Row, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each kind of input gets what the table says."""
    case = Case(tmp_path / "case", made)
    case.folder.mkdir()
    monkeypatch.chdir(case.folder)
    try:
        run(row, case, capsys)
    finally:
        monkeypatch.undo()
        shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.command
@pytest.mark.slow
@pytest.mark.parametrize("row", SCRIPTS, ids=lambda row: row.words)
def test_kind_by_the_script(
    row: Row, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same, by the installed command."""
    test_kind(row, made, tmp_path, monkeypatch, capsys)
