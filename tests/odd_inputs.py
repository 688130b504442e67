# SPDX-License-Identifier: Apache-2.0

"""What the catalogue of bad and odd inputs is made of: images, files and folders, and the models that meet them."""

import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import struct
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import tifffile
import torch
from anomalib.data import Folder
from PIL import Image
from safetensors.torch import save_file

from anomalib_lake import LAKE
from anomalib_spg import SPG, AuxiliaryTarget
from anomalib_spg.components.backbone import Backbone
from anomalib_spg.components.files import load_tensors
from tests.helpers import engine

VIT = "test_vit"  # timm's own for tests: 6 blocks of width 64
SIZE = 64


@dataclass
class Made:
    """What good input makes, once for the whole catalogue."""

    folder: Path
    parts: Path  # six good parts, files
    defects: Path  # two bad ones
    masks: Path  # and their masks
    lake: LAKE
    spg: SPG
    lake_checkpoint: Path
    spg_checkpoint: Path
    guides: Path
    weights: Path


@dataclass
class Case:
    """One kind of input: where it lies, and what good input has made."""

    folder: Path
    made: Made

    def good(self, count: int = 4, to: str = "good") -> Path:
        """Some good parts in a folder of this case."""
        (self.folder / to).mkdir(parents=True, exist_ok=True)
        for path in sorted(self.made.parts.iterdir())[:count]:
            shutil.copyfile(path, self.folder / to / path.name)
        return self.folder / to


def pixels(seed: int = 0, size: tuple[int, int] = (48, 48)) -> np.ndarray:
    """A texture ``(H, W, 3)`` of 8 bits that JPEG hardly changes."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(40, 216, (8, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC))


def make(folder: Path) -> Made:
    """Good parts, bad parts with masks, weights, both models fitted, and the files they leave."""
    for name in ("parts", "defects", "masks"):
        (folder / name).mkdir(parents=True)
    for seed in range(6):
        Image.fromarray(pixels(seed)).save(folder / "parts" / f"{seed}.png")
    for seed in range(2):
        image, mask = pixels(10 + seed).copy(), np.zeros((48, 48), dtype=np.uint8)
        image[8:24, 8:24], mask[8:24, 8:24] = 255, 255
        Image.fromarray(image).save(folder / "defects" / f"{seed}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{seed}.png")
    torch.manual_seed(0)
    save_file(Backbone(VIT, pre_trained=False).vit.state_dict(), folder / "weights.safetensors")
    made = [folder / name for name in ("parts", "defects", "masks")]
    checkpoints, models = {}, {}
    for kind in (LAKE, SPG):
        model = models[kind] = build(kind, weights=folder / "weights.safetensors", pre_trained=True)
        run = quiet_engine(folder / "results")
        run.fit(model=model, datamodule=good_parts(folder / "parts"))
        checkpoints[kind] = Path(run.trainer.checkpoint_callback.best_model_path)
    guides = checkpoints[SPG].parents[1] / "guides.safetensors"
    return Made(
        folder, *made, models[LAKE], models[SPG], checkpoints[LAKE], checkpoints[SPG], guides,
        folder / "weights.safetensors",
    )  # fmt: skip


LAKE_DEFAULTS = {"layers": [1, 3], "k_shot": 2, "num_neurons": 20}
SPG_DEFAULTS = {"layers": [3], "views": 2, "num_atoms": 32, "k": 4, "sae_epochs": 1, "guide_epochs": 1}


def build(kind: type, **arguments: Any) -> Any:
    """A small model of either kind; ``None`` leaves an argument of these defaults out."""
    defaults = {"backbone": VIT, "pre_trained": False, "image_size": SIZE, "visualizer": False, "seed": 0}
    defaults |= LAKE_DEFAULTS if kind is LAKE else {**SPG_DEFAULTS, "ema_warmup": True}
    chosen = {**defaults, **arguments}
    return kind(**{name: value for name, value in chosen.items() if value is not None or name not in defaults})


def quiet_engine(folder: Path, **arguments: Any) -> Any:
    """An engine that prints nothing."""
    return engine(folder, enable_model_summary=False, **{"limit_val_batches": 0, **arguments})


def good_parts(folder: Path, **arguments: Any) -> Folder:
    """A folder of good parts and nothing else."""
    defaults = {"num_workers": 0, "test_split_mode": "none", "val_split_mode": "none", "train_batch_size": 4}
    return Folder("my_part", folder, **{**defaults, **arguments})


def labelled(folder: Path, **auxiliary: Any) -> AuxiliaryTarget:
    """Labelled auxiliary data in ``good``, ``bad`` and ``masks`` of a folder, and itself as target."""
    arguments = {"name": "other", "root": folder, "normal_dir": "good", "abnormal_dir": "bad", "mask_dir": "masks"}
    target = {"name": "part", "root": folder, "normal_dir": "good", "val_split_mode": "none", "test_split_mode": "none"}
    return AuxiliaryTarget(
        auxiliary="Folder",
        target="Folder",
        auxiliary_args={**arguments, **auxiliary},
        target_args=target,
        num_workers=0,
        train_batch_size=4,
    )


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


# Images


def odd(
    picture: Callable[[], Any], name: str = "odd.png", twin: Callable[[], Any] | None = None, **save: Any
) -> Callable[[Case], Path]:
    """An image, an array or bytes as a file, beside the same picture as an ordinary 8-bit PNG."""

    def write(case: Case) -> Path:
        folder = case.folder / "images"
        folder.mkdir()
        write_image(folder / "twin.png", (twin or colour)())
        write_image(folder / name, picture(), **save)
        return folder

    return write


def write_image(path: Path, picture: Image.Image | np.ndarray | bytes, **save: Any) -> None:
    """Write an image: Pillow's by Pillow, arrays by libraries that know more than 8 bits, bytes as they are."""
    if isinstance(picture, Image.Image):
        picture.save(path, **save)
    elif isinstance(picture, bytes):
        path.write_bytes(picture)
    elif path.suffix == ".tif":
        tifffile.imwrite(path, picture, **save)
    else:
        cv2.imwrite(str(path), picture[..., ::-1] if picture.ndim == 3 else picture)


def colour() -> Image.Image:
    """The twin itself."""
    return Image.fromarray(pixels())


def mode(name: str) -> Callable[[], Image.Image]:
    """The twin in one of Pillow's modes."""
    return lambda: colour().convert(name)


def plain(size: tuple[int, int] = (48, 48), tone: Any = 0, kind: str = "RGB") -> Callable[[], Image.Image]:
    """A single colour; width and height."""
    return lambda: Image.new(kind, size, tone)


def deep(kind: str = "L", dtype: Any = np.uint16, scale: float = 257) -> Callable[[], np.ndarray]:
    """The twin with more than 8 bits a value: 16 bits, or another number type and scale."""
    return lambda: (np.asarray(colour().convert(kind)).astype(np.float64) * scale).astype(dtype)


def encoded(kind: str = "PNG", picture: Image.Image | None = None, **save: Any) -> bytes:
    """A file's bytes."""
    buffer = io.BytesIO()
    (picture or colour()).save(buffer, kind, **save)
    return buffer.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of some hundred bytes whose header asks for gigabytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")


def scrambled() -> bytes:
    """A PNG with a flipped byte in the middle of its pixels."""
    content = bytearray(encoded())
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def turned() -> Image.Exif:
    """Camera's note that the picture lies on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def among_good(picture: Callable[[], Any], name: str = "odd.png", count: int = 5) -> Callable[[Case], Path]:
    """A folder of good parts with an odd file among them."""

    def write(case: Case) -> Path:
        folder = case.good(count)
        write_image(folder / name, picture())
        return folder

    return write


def all_good(convert: Callable[[Image.Image], Any], count: int = 6, suffix: str = "png") -> Callable[[Case], Path]:
    """A folder of good parts, each written in an odd way."""

    def write(case: Case) -> Path:
        folder = case.folder / "good"
        folder.mkdir()
        for seed in range(count):
            write_image(folder / f"{seed}.{suffix}", convert(Image.fromarray(pixels(seed))))
        return folder

    return write


def named(*names: str | bytes) -> Callable[[Case], Path]:
    """Images of these names in one folder, each another one."""

    def write(case: Case) -> Path:
        for number, name in enumerate(names):
            path = os.path.join(os.fsencode(case.folder / "images"), os.fsencode(name))  # noqa: PTH118  # bytes
            os.makedirs(os.path.dirname(path), exist_ok=True)  # noqa: PTH103, PTH120
            with open(path, "wb") as file:  # noqa: PTH123
                file.write(encoded(picture=Image.fromarray(pixels(number + 1))))
        return case.folder / "images"

    return write


# Files


def damaged(source: str, how: Callable[[bytes], bytes], name: str) -> Callable[[Case], Path]:
    """A changed copy of something that good input has made: ``source`` is its name in :class:`Made`."""

    def write(case: Case) -> Path:
        path = case.folder / name
        path.write_bytes(how(Path(getattr(case.made, source)).read_bytes()))
        return path

    return write


def half(content: bytes) -> bytes:
    """The first half of a file."""
    return content[: len(content) // 2]


def file(name: str, content: bytes | Callable[[], bytes]) -> Callable[[Case], Path]:
    """A file of that content."""

    def write(case: Case) -> Path:
        path = case.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content())
        return path

    return write


def folder(name: str) -> Callable[[Case], Path]:
    """An empty folder of that name."""

    def write(case: Case) -> Path:
        (case.folder / name).mkdir()
        return case.folder / name

    return write


def missing(name: str) -> Callable[[Case], Path]:
    """A path where nothing is."""
    return lambda case: case.folder / name


def below_a_file(name: str) -> Callable[[Case], Path]:
    """A path that no one can create, root included: it lies below a file."""

    def write(case: Case) -> Path:
        (case.folder / "file").write_bytes(b"not a folder")
        return case.folder / "file" / name

    return write


def guides_with(
    change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None], name: str = "odd.safetensors"
) -> Callable[[Case], Path]:
    """The guides file with other tensors or metadata; metadata are plain values here, JSON in the file."""

    def write(case: Case) -> Path:
        tensors, header = load_tensors(case.made.guides)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        plain = {key: value if key in {"format", "version"} else json.loads(value) for key, value in header.items()}
        change(tensors, plain)
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in plain.items()}
        texts |= {key: json.dumps(value) for key, value in plain.items() if key in {"backbone", "category"}}
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, case.folder / name, texts)
        return case.folder / name

    return write


def checkpoint_with(source: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], Path]:
    """A checkpoint with something else in it; what ``change`` returns, if anything, is saved instead."""

    def write(case: Case) -> Path:
        content = torch.load(getattr(case.made, source), weights_only=True)
        changed = change(content)
        torch.save(content if changed is None else changed, case.folder / "odd.ckpt")
        return case.folder / "odd.ckpt"

    return write


def weights_with(
    change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor] | None], name: str = "odd.safetensors"
) -> Callable[[Case], Path]:
    """The backbone's weights file with something else in it."""

    def write(case: Case) -> Path:
        state = {key: tensor.clone() for key, tensor in load_tensors(case.made.weights)[0].items()}
        changed = change(state)
        save_file(state if changed is None else changed, case.folder / name)
        return case.folder / name

    return write


class Trap:
    """Pickled, it runs code where it is loaded."""

    def __reduce__(self) -> tuple[Callable, tuple[str]]:
        """Leave a trace."""
        return os.mkdir, ("code_was_run",)


def trap(name: str) -> Callable[[Case], Path]:
    """A PyTorch file that runs code when it is loaded carelessly."""

    def write(case: Case) -> Path:
        torch.save({"state_dict": {}, "x": Trap()}, case.folder / name)
        return case.folder / name

    return write


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
def signal_at(place: str, number: int) -> Iterator[None]:
    """Send this process a signal where a function is called: power off, or Ctrl+C."""
    with patch(place, side_effect=lambda *_, **__: os.kill(os.getpid(), number)):
        yield


# Parts with masks, and runs that ended early


def parts_and_masks(change: Callable[[Path], Any] = lambda _: None) -> Callable[[Case], Path]:
    """Good parts, bad parts and their masks in ``good``, ``bad`` and ``masks``, something changed."""

    def write(case: Case) -> Path:
        case.good(6)
        shutil.copytree(case.made.defects, case.folder / "bad")
        shutil.copytree(case.made.masks, case.folder / "masks")
        change(case.folder)
        return case.folder

    return write


def tested(root: Path, **arguments: Any) -> Folder:
    """A folder with good and bad parts, half of which are tested."""
    defaults = {"root": root, "normal_dir": "good", "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder("my_part", **{**defaults, **arguments})


def interrupted(damage: Callable[[list[Path]], Any] = lambda _: None, **arguments: Any) -> Callable[[Case], Path]:
    """Good parts, and the tokens that an interrupted run has left of them, something changed."""

    def write(case: Case) -> Path:
        path = case.good(4)
        model = build(SPG, memory_limit=0, **arguments)
        run = quiet_engine(case.folder / "results")
        with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), suppress(SystemExit):
            run.fit(model=model, datamodule=good_parts(path, train_batch_size=2))
        files = sorted((case.folder / "tokens").rglob("*.safetensors"))
        assert len(files) > 2
        damage(files)
        return path

    return write
