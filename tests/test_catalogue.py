# SPDX-License-Identifier: Apache-2.0

"""A catalogue of bad and odd inputs, and what comes of each.

Read the tables: a row names an input in words, says how it is made, and what comes of it. Either it works, with what
must hold then (``Right``), or it is refused with a message that names the file or the value (``Error``). Whatever
comes, no file that was there is changed, nothing half-written and nothing temporary stays: that is checked each time.
"""

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
import skimage
import sklearn
import torch
from anomalib.data.errors import MisMatchError
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from anomalib_lake import LAKE
from anomalib_spg import SPG
from tests.helpers import TINY_CLIP
from tests.odd_inputs import (
    VIT,
    Case,
    Made,
    all_black,
    all_good,
    among_good,
    as_mask,
    below_a_file,
    bomb,
    build,
    checkpoint,
    checkpoint_with,
    colour,
    config,
    damaged,
    dangling,
    deep,
    encoded,
    few,
    file,
    folder,
    folder_called_png,
    guides_with,
    half,
    in_16_bits,
    interrupted,
    labelled,
    linked,
    linked_folder,
    looped,
    make,
    mask,
    missing,
    mode,
    named,
    not_numbers,
    odd,
    one_number,
    other,
    parts_and_masks,
    plain,
    predicting,
    saved,
    scrambled,
    tensor,
    train,
    trap,
    turned,
    weights_with,
    with_bad_parts,
    with_linked_folder,
    with_numbers,
    without,
    without_header,
    write_image,
)
from tests.odd_runs import (
    Error,
    Right,
    Row,
    again,
    again_after_an_error,
    at_once,
    build_with,
    by_the_script,
    check,
    command,
    decided,
    each_left,
    explain_patchcore,
    explained,
    export,
    fit,
    fit_with,
    fitted,
    fitted_on_the_pictures,
    hashes,
    killed,
    killed_by_the_script,
    killed_while_writing,
    learned,
    like_its_twin,
    loader_only,
    mistyped,
    not_fitted,
    on_a_full_disk,
    others_stay,
    pictured,
    predict,
    predict_explained,
    predict_from,
    predict_on_a_full_disk,
    predict_with,
    refused,
    rejected,
    report,
    section,
    several,
    tokens_gone,
    twice,
    without_error,
    zero_shot,
)

DECIDED, SAME, PICTURED, EXPLAINED = Right(decided), Right(like_its_twin), Right(pictured), Right(explained)
REJECTED, LEARNED = Right(rejected), Right(learned)
FITTED, AS_PICTURES, WENT_ON = Right(fitted), Right(fitted_on_the_pictures), Right(tokens_gone)
WORKS = Right(without_error)
NAMED = Error((ValueError, OSError), r"odd\.\w+")  # the message names the file
ANY = (ValueError, OSError, RuntimeError, TypeError, MisMatchError)
DEEP = Error(ValueError, r"odd\.\w+.*8 bits.*Convert")  # more than 8 bits
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
        ("YCbCr TIFF", odd(mode("YCbCr"), "odd.tiff"), (SAME, NAMED)),  # older releases of Pillow cannot read it
        ("LAB TIFF", odd(plain(kind="LAB"), "odd.tiff"), (DECIDED, NAMED)),
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
        ("16-bit grey PNG", odd(deep(), twin=mode("L")), DEEP),
        ("16-bit grey TIFF", odd(deep(), "odd.tif", twin=mode("L")), DEEP),
        ("16-bit grey TIFF, big-endian", odd(deep(), "odd.tif", twin=mode("L"), byteorder=">"), DEEP),
        ("16-bit colour PNG", odd(deep("RGB")), SAME),
        ("16-bit colour TIFF", odd(deep("RGB"), "odd.tif", photometric="rgb"), (SAME, NAMED)),
        ("32-bit whole numbers", odd(deep(dtype=np.int32), "odd.tif", twin=mode("L")), DEEP),
        ("floating point in [0, 1]", odd(deep("L", np.float32, 1 / 255), "odd.tif", twin=mode("L")), DEEP),
        ("floating point, not a number", odd(deep("L", np.float32, nan), "odd.tif"), DEEP),
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
        ("a single colour", among_good(black), FITTED),
        ("1x1 pixel", among_good(plain((1, 1))), FITTED),
        ("grey among colour", among_good(mode("L")), FITTED),
        ("of another size and shape", among_good(lambda: colour().resize((300, 20))), FITTED),
        ("the same twice", among_good(colour), FITTED),
        ("all the same", all_good(lambda _: colour()), Error(ValueError, "copies of each other.*images that differ")),
        ("all of a single colour", all_good(lambda _: black()), Error(ValueError, "of one colour.*images that differ")),
        ("all 16-bit grey", all_good(in_16_bits), Error(ValueError, r"\d\.png.*8 bits.*Convert")),
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
        ("a single colour", among_good(black), FITTED),
        ("1x1 pixel", among_good(plain((1, 1))), FITTED),
        ("grey among colour", among_good(mode("L")), FITTED),
        ("of another size and shape", among_good(lambda: colour().resize((300, 20))), FITTED),
        ("all the same", all_good(lambda _: colour()), FITTED),
        ("all of a single colour", all_good(lambda _: black()), Error(ValueError, "nothing shows")),
        ("all 16-bit grey", all_good(in_16_bits), Error(ValueError, r"\d\.png.*8 bits.*Convert")),
    ),
    *section(
        "a good part that only sets the threshold",
        fit(LAKE, k_shot=2),
        ("truncated", among_good(lambda: half(encoded())), NAMED),
        ("a single colour", among_good(black), FITTED),
    ),
]


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
        ("the same in several folders", named("a/1.png", "b/1.png", "1.png"), PICTURED),
        # anomalib's visualizer names a picture by the last folder only, so here one replaces the other.
        ("the same, folders of the same name", named("a/b/1.png", "b/1.png"), DECIDED),
        ("the same but for the suffix", named("1.png", "1.bmp", "1.jpg"), PICTURED),
        ("symbolic links", linked, PICTURED),
        ("a link to nothing", dangling, NAMED),
        ("a link that leads back", looped, PICTURED),
        ("a link to another folder: left out, and named", with_linked_folder, PICTURED),
        ("a suffix that anomalib does not know: left out, and named", named("a.png", "b.gif"), PICTURED),
        ("a folder called .png", folder_called_png, (PICTURED, NAMED)),
        ("what macOS leaves beside images", odd(lambda: b"\0\5\x16\7", "._odd.png"), NAMED),
    ),
    *section(
        "name of an image to explain",
        predict_explained,
        ("not ASCII, signs of web addresses", named("größe 50%#1?.png"), EXPLAINED),
        ("markup", named("<b onclick='x'>&amp;.png"), EXPLAINED),
        ("255 bytes", named("a" * 251 + ".png"), EXPLAINED),
        ("newline", named("a\nb.png"), EXPLAINED),
        ("not UTF-8", named(b"a\xff.png"), EXPLAINED),
        ("the same in several folders", named("a/1.png", "b/1.png"), EXPLAINED),
    ),
    *section(
        "name of the folder of good parts",
        fit(LAKE),
        ("spaces and signs", lambda case: case.good(to="good parts #1 50%"), FITTED),
        ("not ASCII", lambda case: case.good(to="größe"), Error(ValueError, "non-printable.*größe")),
        ("leading dot", lambda case: case.good(to=".good"), FITTED),
        ("leading dash", lambda case: case.good(to="--good"), FITTED),
        ("a link", linked_folder, FITTED),
    ),
]


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
    *section(
        "folder of good parts, SPG that draws once",
        fit(SPG, views=1),
        ("one image", few(1), Error(ValueError, "views")),
    ),
    *section(
        "folder of bad parts",
        fit(LAKE, partial(with_bad_parts, abnormal_dir="bad"), {"limit_val_batches": 1.0}),
        ("empty", parts_and_masks(lambda at: shutil.rmtree(at / "bad") or (at / "bad").mkdir()), Error(ANY, "bad")),
        ("missing", parts_and_masks(lambda at: shutil.rmtree(at / "bad")), Error(ANY, "bad")),
        (
            "a bad part is no image",
            parts_and_masks(lambda at: (at / "bad/1.png").write_bytes(b"")),
            Error(ANY, r"bad/1\.png"),
        ),
        ("one bad part", parts_and_masks(lambda at: (at / "bad/1.png").unlink()), FITTED),
        (
            "bad parts in the place of good ones",
            parts_and_masks(lambda at: shutil.copytree(at / "bad", at / "good", dirs_exist_ok=True)),
            FITTED,
        ),
    ),
    *section(
        "few_shot_source",
        fit_with(LAKE, "few_shot_source"),
        ("good parts", lambda case: case.good(3, "odd.d"), FITTED),
        ("empty", folder("odd.d"), Error(ValueError, r"odd\.d.*few_shot_source")),
        ("missing", missing("odd.d"), Error(ValueError, r"odd\.d.*few_shot_source")),
        (
            "fewer images than k_shot",
            lambda case: case.good(1, "odd.d"),
            Error(ValueError, r"k_shot=2 .*odd\.d.*k_shot=1"),
        ),
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
        report,
        ("empty", folder("odd.d"), Error(ValueError, r"odd\.d.*ExplanationVisualizer")),
        ("missing", missing("odd.d"), Error(ValueError, r"odd\.d.*ExplanationVisualizer")),
        (
            "records are no JSON",
            lambda case: file("a/explanations.json", b"{")(case).parent,
            Error(ValueError, r"a/explanations\.json.*again"),
        ),
        (
            "records of something else",
            lambda case: file("a/explanations.json", b"[1]")(case).parent,
            Error(ValueError, r"a/explanations\.json.*again"),
        ),
    ),
]


MASK = Error(ANY, r"masks/1\.png|bad/1\.png")

MASKS = [
    *section(
        "mask to learn from",
        fit(SPG, labelled),
        ("as it should be", parts_and_masks(), LEARNED),
        ("missing", mask(Path.unlink), Error(ANY, r"mask")),
        ("folder missing", parts_and_masks(lambda at: shutil.rmtree(at / "masks")), Error(ANY, "masks")),
        (
            "one too many",
            parts_and_masks(lambda at: write_image(at / "masks/2.png", black())),
            Error(ANY, r"mask|length"),
        ),
        ("of another name", mask(lambda path: path.rename(path.with_name("x.png"))), Error(ANY, "mask")),
        ("one of two all black", as_mask(lambda image: Image.new("L", image.size)), LEARNED),
        ("all of them all black", parts_and_masks(all_black), Error(ValueError, r"2 of 2 masks.*masks/1\.png.*white")),
        ("all white", as_mask(lambda image: Image.new("L", image.size, 255)), LEARNED),
        ("of another size", as_mask(lambda image: image.resize((20, 20))), MASK),
        ("turned", as_mask(lambda image: image.crop((0, 0, 48, 30))), MASK),
        ("values 0 and 1", as_mask(lambda image: image.point(lambda value: value // 255)), LEARNED),
        ("1 bit", as_mask(lambda image: image.convert("1")), LEARNED),
        ("colour", as_mask(lambda image: image.convert("RGB")), LEARNED),
        ("palette", as_mask(lambda image: image.convert("P")), LEARNED),
        ("grey values between", as_mask(lambda image: image.resize((12, 12)).resize((48, 48))), LEARNED),
        ("16-bit", as_mask(lambda image: np.asarray(image).astype(np.uint16) * 257), LEARNED),
        ("truncated", mask(lambda path: path.write_bytes(half(path.read_bytes()))), MASK),
        ("zero bytes", mask(lambda path: path.write_bytes(b"")), MASK),
        ("text", mask(lambda path: path.write_bytes(b"text")), MASK),
        ("its image truncated", parts_and_masks(lambda at: (at / "bad/1.png").write_bytes(half(encoded()))), MASK),
    ),
    *section(
        "labelled data without masks",
        fit(SPG, partial(labelled, mask_dir=None)),
        ("none named", parts_and_masks(), Error(ValueError, r"None of the 2 anomalous .* has a mask, .*bad/0\.png")),
    ),
    *section(
        "labelled data without bad parts",
        fit(SPG, partial(labelled, mask_dir=None, abnormal_dir=None)),
        ("none named", parts_and_masks(), Error(ValueError, "no anomalous image")),
    ),
    *section(
        "mask to test by",
        fit(LAKE, partial(with_bad_parts, abnormal_dir="bad", mask_dir="masks"), {"limit_val_batches": 1.0}),
        ("as it should be", parts_and_masks(), FITTED),
        ("missing", mask(Path.unlink), Error(ANY, "mask|length")),
        ("all black", as_mask(lambda image: Image.new("L", image.size)), FITTED),
        ("text", mask(lambda path: path.write_bytes(b"text")), MASK),
        ("truncated", mask(lambda path: path.write_bytes(half(path.read_bytes()))), MASK),
    ),
]


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
        lambda case, path: zero_shot(case, path, layers=[4]),
        (
            "another layer asked for",
            guides_with(lambda *_: None),
            Error(ValueError, r"odd\.safetensors.*layers=\[3\].*layers=\[4\]"),
        ),
    ),
    *section(
        "guides file of another backbone",
        lambda case, path: zero_shot(case, path, backbone="vit_tiny_patch16_224", pre_trained=False, weights=None),
        (
            "another backbone asked for",
            guides_with(lambda *_: None),
            Error(ValueError, r"odd\.safetensors.*backbone=test_vit.*backbone=vit_tiny"),
        ),
    ),
]


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
        (
            "a temporary file",
            interrupted(lambda files: files[0].with_name(".000009.safetensors.1.tmp").write_bytes(b"x")),
            WENT_ON,
        ),
        (
            "someone's text among them",
            interrupted(lambda files: files[0].with_name("note.txt").write_bytes(b"x")),
            WENT_ON,
        ),
        (
            "someone's tensors among them",
            interrupted(lambda files: shutil.copy(files[0], files[0].with_name("note.safetensors"))),
            (WENT_ON, Error(ANY, r"note\.safetensors")),
        ),
        (
            "someone's file beside them",
            interrupted(lambda files: (files[0].parents[1] / "note.txt").write_bytes(b"x")),
            WENT_ON,
        ),
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


DAMAGED_GUIDES = Error(ValueError, "guides in the checkpoint are damaged.*not finite.*train SPG again")
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
        ("a pickle with code in it", trap("odd.ckpt"), Error(Exception, r"odd\.ckpt|weights.only")),
        (
            "without state",
            checkpoint(without("state_dict")),
            Error(Exception, r"odd\.ckpt|state_dict"),
        ),
        (
            "a bare state dict",
            checkpoint(lambda content: content["state_dict"]),
            Error(Exception, r"odd\.ckpt|state_dict"),
        ),
        ("without arguments", checkpoint(without("hyper_parameters")), DECIDED),
        (
            "a tensor missing",
            checkpoint(without("state_dict", "model.neurons.0.indices")),
            Error(RuntimeError, r"neurons\.0\.indices"),
        ),
        (
            "a tensor of another shape",
            checkpoint(lambda content: content["state_dict"].update({"model.neurons.0.indices": torch.arange(7)})),
            Error(ANY, "neurons|shape|odd"),
        ),
        ("its bank not numbers", checkpoint(not_numbers("model.banks.0.0.tokens")), REJECTED),
        ("of SPG", damaged("spg_checkpoint", bytes, "odd.ckpt"), Error(ValueError, "SPG|layers=")),
        ("of a model that never learned", saved(LAKE), Error(RuntimeError, "train it|not .*fitted|no normality bank")),
    ),
    *section(
        "checkpoint of LAKE",
        lambda case, arguments: predict_from(LAKE, **arguments)(case, case.made.lake_checkpoint),
        *(
            (
                f"another {name}",
                lambda _, given=given: given,
                Error(ValueError, rf"saved with {name}=.*this model has {name}=.*arguments"),
            )
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
        (
            "its guides not numbers",
            checkpoint_with("spg_checkpoint", not_numbers("model.guides.0.vectors")),
            DAMAGED_GUIDES,
        ),
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
        (
            "of another architecture",
            weights_with(lambda _: {"conv1.weight": torch.ones(3)}),
            Error(ValueError, r"odd\.safetensors.*conv1"),
        ),
        (
            "a tensor missing",
            weights_with(lambda state: state.pop("cls_token")),
            Error(ValueError, r"odd\.safetensors.*cls_token"),
        ),
        (
            "a tensor too many",
            weights_with(lambda state: state.update(more=torch.ones(1))),
            Error(ValueError, r"odd\.safetensors.*more"),
        ),
        (
            "a tensor of another shape",
            weights_with(lambda state: state.update(cls_token=torch.ones(1, 1, 9))),
            Error(ValueError, r"odd\.safetensors.*cls_token"),
        ),
        (
            "not numbers",
            weights_with(lambda state: state["cls_token"].fill_(nan)),
            Error(ValueError, r"odd\.safetensors|weights"),
        ),
        (
            "all zero",
            weights_with(lambda state: {key: value * 0 for key, value in state.items()}),
            Error(ValueError, r"odd\.safetensors|do not vary"),
        ),
    ),
    *section(
        "weights file for SPG",
        fit_with(SPG, "weights", pre_trained=True),
        ("truncated", damaged("weights", half, "odd.safetensors"), ODD_WEIGHTS),
        (
            "not numbers",
            weights_with(lambda state: state["cls_token"].fill_(nan)),
            Error(ValueError, r"odd\.safetensors|weights"),
        ),
    ),
    *section(
        "weights file for text",
        fit_with(LAKE, "weights", backbone=TINY_CLIP, pre_trained=True, layers=[4]),
        (
            "without a text tower",
            damaged("weights", bytes, "odd.safetensors"),
            Error(ValueError, r"odd\.safetensors.*text_weight=0"),
        ),
    ),
    *section(
        "model hub that cannot be reached",
        lambda case, kind: fit(kind, backbone="test_vit.r160_in1k", pre_trained=True)(case, case.good()),
        ("LAKE", lambda _: LAKE, Error(RuntimeError, r"test_vit\.r160_in1k.*--model\.weights")),
        ("SPG", lambda _: SPG, Error(RuntimeError, r"test_vit\.r160_in1k.*--model\.weights")),
    ),
]


ONE_LIST = Error(ValueError, "normal_prompts is given without anomalous_prompts.*both")
BOTH = {
    "backbone": ["vit_tiny_patch16_223", "resnet18"],
    "layers": [[], [6], [-7], [0, 99]],
    "image_size": [0, -64, [64], [64, 64, 64], [64, 0]],
    "sigma": [-1.0, nan, inf],
    "false_alarm_rate": [0.0, 0.51, -0.1, nan],
    "pixel_false_alarm_rate": [0.0, 0.51, nan],
    "seed": [-1, 2**32],
}
SAE, GUIDES_TRAINING = "anomalib_spg.torch_model.train_sae", "anomalib_spg.torch_model.train_guides"
GUIDES_SAVING, LAKE_FIT = "anomalib_spg.torch_model.save_guides", "anomalib_lake.torch_model.LAKEModel.fit"
FULL_GUIDES = Error(OSError, r"guides\.safetensors.*Make room")
FULL_TOKENS = Error(OSError, "tokens.*Make room.*same command")
IN_USE = Error(ANY, "tokens")
NOT_YET = Error(RuntimeError, "(LAKE|SPG).*yet.*Train it")
CLIP = {"backbone": TINY_CLIP, "layers": [4], "text_weight": 0.3}

ARGUMENTS = [
    *several(
        "backbone",
        (
            "weights that timm lacks",
            lambda _: None,
            build_with(SPG, backbone=f"{VIT}.gone"),
            Error(ANY, f"gone.*{VIT}"),
        ),
    ),
    *several(
        "LAKE",
        (
            "one list of prompts without the other",
            lambda _: None,
            build_with(LAKE, **CLIP, normal_prompts=["a"]),
            ONE_LIST,
        ),
    ),
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
        normal_prompts=[{**CLIP, "normal_prompts": []}],
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
        num_neurons=[2.5],
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
        ("value of a wrong type", train("--model.k_shot", "2.5"), Error(SystemExit, "k_shot.*2.5")),
        ("value out of range", train("--model.k_shot", "0"), Error((SystemExit, ValueError), "k_shot=0")),
        ("more shots than there are", train("--model.k_shot", "99"), Error(ValueError, "k_shot=99.* 6 ")),
        ("misspelt key in the config", train(modle={"class_path": "LAKE"}), Error(SystemExit, "modle")),
        (
            "misspelt argument in the config",
            train(model={"class_path": "LAKE", "init_args": {"kshot": 1}}),
            Error(SystemExit, "kshot"),
        ),
        ("misspelt class in the config", train(model={"class_path": "LAKEE"}), Error(SystemExit, "LAKEE")),
        (
            "a word for a number in the config",
            train(trainer={"max_epochs": "one"}),
            Error(SystemExit, "max_epochs.*one"),
        ),
        ("config missing", lambda _: ["train", "--config", "odd.yaml"], Error(SystemExit, r"odd\.yaml")),
        ("config no YAML", config("odd.yaml", b"model: [LAKE\n"), Error(SystemExit, "config|yaml")),
        ("config a list", config("odd.yaml", b"- 1\n- 2\n"), Error((SystemExit, *ANY), "config|yaml|dict")),
        (
            "config not text",
            config("odd.yaml", b"\x89PNG\r\n\x1a\n\xff\xfe"),
            Error((SystemExit, *ANY), "config|yaml|decode"),
        ),
        (
            "guides file missing",
            train("--model.guides_file", "odd.safetensors", model="SPG"),
            Error((SystemExit, ValueError), r"odd\.safetensors"),
        ),
        ("predict", predicting("--data", "good"), WORKS),
        (
            "predict with other arguments",
            predicting("--data", "good", "--model.layers", "[2,3]"),
            Error(ValueError, "layers=.*same --config"),
        ),
        ("predict on nothing", predicting("--data", "odd.d"), Error((SystemExit, *ANY), r"odd\.d")),
        (
            "predict from a missing checkpoint",
            predicting("--data", "good", "--ckpt_path", "odd.ckpt"),
            Error((SystemExit, *ANY), r"odd\.ckpt"),
        ),
    ),
]


ON_DISK = ["--model.memory_limit", "0", "--model.views", "2", "--model.num_atoms", "32", "--model.k", "4"]
ON_DISK += ["--model.seed", "0", "--trainer.enable_progress_bar", "true", "--model.guide_epochs", "1"]

SCRIPTS = [
    *section(
        "script",
        by_the_script,
        ("unknown argument", train("--model.bakbone", "x"), Error(SystemExit, "bakbone")),
        (
            "a damaged image",
            lambda case: among_good(lambda: half(encoded()))(case) and train()(case),
            Error(SystemExit, r"odd\.png"),
        ),
    ),
    *several("script", ("killed, and then again", train(*ON_DISK, model="SPG"), killed_by_the_script, WORKS)),
]


STOPS = [
    *several(
        "killed, and then again",
        ("SPG, tokens on disk all stored", few(4), killed(SAE, memory_limit=0), WENT_ON),
        ("SPG, as guides are learned", few(4), killed(GUIDES_TRAINING, memory_limit=0), WENT_ON),
        ("SPG, as guides are saved", few(4), killed(GUIDES_SAVING, memory_limit=0), WENT_ON),
        ("SPG, in the middle of a file", few(4), killed_while_writing, WENT_ON),
        ("SPG, tokens in memory", few(4), killed(SAE), FITTED),
        ("LAKE", few(4), killed(LAKE_FIT, LAKE), FITTED),
    ),
    *several(
        "Ctrl+C, and then again",
        ("SPG, tokens on disk all stored", few(4), killed(SAE, number=signal.SIGINT, memory_limit=0), WENT_ON),
        ("LAKE", few(4), killed(LAKE_FIT, LAKE, number=signal.SIGINT), FITTED),
    ),
    *several(
        "disk full",
        ("as guides are saved", few(4), on_a_full_disk(SPG, 2000), FULL_GUIDES),
        ("as tokens are stored", few(4), on_a_full_disk(SPG, 2000, memory_limit=0), FULL_TOKENS),
        ("as a checkpoint is saved", few(4), on_a_full_disk(LAKE, 50_000), Error(OSError, r"model\.ckpt|results")),
        ("as the table is written", few(2), predict_on_a_full_disk, Error(OSError, r"predictions\.csv")),
    ),
    *several(
        "two processes at once",
        ("predict into one folder", few(4), at_once(predict), each_left("predictions*.csv")),
        ("LAKE into one folder", few(4), at_once(fit(LAKE)), each_left("model*.ckpt")),
        ("SPG, tokens in one folder", few(4), at_once(again()), (each_left("guides.safetensors"), IN_USE)),
    ),
]


def at(precision: str) -> dict[str, Any]:
    """The trainer's precision."""
    return {"trainer": {"precision": precision}}


REFUSED_PRECISION = Error(ValueError, "precision.*(32|bf16-mixed)")

ORDER = [
    *several(
        "precision",
        *((f"LAKE, {name}", few(4), fit(LAKE, **at(name)), FITTED) for name in ("bf16-mixed", "16-mixed")),
        *((f"SPG, {name}", few(4), fit(SPG, **at(name)), FITTED) for name in ("bf16-mixed", "16-mixed")),
        *(
            (f"{kind.__name__}, {name}", few(4), fit(kind, **at(name)), (FITTED, REFUSED_PRECISION))
            for kind in (LAKE, SPG)
            for name in ("bf16-true", "16-true", "64-true")
        ),
        ("SPG, labelled, bf16-mixed", parts_and_masks(), fit(SPG, labelled, **at("bf16-mixed")), LEARNED),
        ("LAKE predicts, bf16-mixed", few(3), predict_with(LAKE, **at("bf16-mixed")), DECIDED),
        ("SPG predicts, bf16-mixed", few(3), predict_with(SPG, **at("bf16-mixed")), DECIDED),
    ),
    *several(
        "fitted",
        ("LAKE, twice", few(4), twice(LAKE), FITTED),
        ("SPG, twice", few(4), twice(SPG), FITTED),
        ("LAKE, after an error", few(4), again_after_an_error(LAKE), FITTED),
        ("SPG, after an error", few(4), again_after_an_error(SPG), FITTED),
        ("LAKE, for several epochs", few(4), fit(LAKE, trainer={"max_epochs": 3}), FITTED),
        ("SPG, for several epochs", few(4), fit(SPG, trainer={"max_epochs": 3}), FITTED),
        ("LAKE, on no batch: not at all", few(4), fit(LAKE, trainer={"limit_train_batches": 0}), Right(not_fitted)),
        ("LAKE, without a datamodule", few(4), loader_only, FITTED),
    ),
    *section(
        "predict before fit",
        lambda case, kind: predict(case, case.good(2), build(kind)),
        ("LAKE", lambda _: LAKE, Error(RuntimeError, "no normality bank yet.*train it.*--ckpt_path")),
        ("SPG", lambda _: SPG, Error(RuntimeError, "no guides yet.*train it.*--ckpt_path")),
    ),
    *section(
        "export before fit",
        export,
        *(
            (f"{kind.__name__} to {form}", lambda _, given=(kind, form): (build(given[0]), given[1]), NOT_YET)
            for kind in (LAKE, SPG)
            for form in ("torch", "onnx")
        ),
    ),
    *section(
        "export",
        export,
        ("LAKE to torch", lambda case: (case.made.lake, "torch"), WORKS),
        ("an unknown format", lambda case: (case.made.lake, "odd"), Error(ValueError, "odd")),
    ),
    *several("explanations", ("of another model", few(2), explain_patchcore, Error(ANY, "Patchcore"))),
]

SUFFIXES = {*IMG_EXTENSIONS, ".gif", ".jp2", ".ico", ".tga", ".dds", ".icns", ".psd", ".pcx", ".xbm", ".svg"}

CATALOGUE = [*IMAGES, *NAMES, *FOLDERS, *MASKS, *GUIDES, *TOKENS, *CHECKPOINTS, *WEIGHTS, *ARGUMENTS, *CONFIGS]
CATALOGUE += [*STOPS, *ORDER]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Good parts, models fitted on them, and their files."""
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def case(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    """An empty folder, in which the row is acted on, and which is then removed."""
    case = Case(tmp_path / "case", made)
    case.folder.mkdir()
    monkeypatch.chdir(case.folder)
    yield case
    monkeypatch.undo()
    shutil.rmtree(case.folder, ignore_errors=True)


def words(row: Row) -> str:
    """A name for the row's test."""
    return row.words


@pytest.mark.parametrize("row", CATALOGUE, ids=words)
def test_kind(row: Row, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of input gets what the table says."""
    check(row, case, lambda: capsys.readouterr().err)


def collections() -> dict[str, Path]:
    """Folders of images that others have made: of installed packages, and what ODD_IMAGES names."""
    found = {
        "scikit-image": Path(skimage.__file__).parent / "data",
        "scikit-learn": Path(sklearn.__file__).parent / "datasets" / "images",
        "matplotlib": Path(mpl.get_data_path()),
        "ODD_IMAGES": Path(os.environ.get("ODD_IMAGES", "")),
    }
    return {name: path for name, path in found.items() if path.is_dir() and path != Path()}


@pytest.mark.slow
@pytest.mark.parametrize("name", collections())
def test_images_of_others(name: str, case: Case) -> None:
    """Every file of the collection is decided on with a finite score, or refused by a message that names it."""
    root = collections()[name]
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    before, outcomes = hashes(*{path.parent for path in paths}), Counter()
    for path in paths:
        shutil.rmtree(case.folder / "results", ignore_errors=True)
        try:
            result = predict(case, path)
        except (ValueError, OSError) as error:
            outcomes["refused by name" if str(path) in str(error) else f"wrong: {path}: {error}"] += 1
        else:
            decided(case, result, 1)
            outcomes["decided"] += 1
    assert set(outcomes) <= {"decided", "refused by name"}
    assert outcomes["decided"] > 0
    assert hashes(*{path.parent for path in paths}) == before
    print(name, dict(outcomes))  # for those who run it by hand, with -s


@pytest.mark.command
@pytest.mark.slow
@pytest.mark.parametrize("row", SCRIPTS, ids=words)
def test_kind_by_the_script(row: Row, case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The same, by the installed command."""
    check(row, case, lambda: capsys.readouterr().err)
