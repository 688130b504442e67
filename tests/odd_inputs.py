# SPDX-License-Identifier: Apache-2.0

"""What the catalogue of bad and odd inputs is made of: images, files and folders, and the models that meet them."""

import io
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import tifffile
import torch
import yaml
from anomalib.data import Folder
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

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


def in_16_bits(image: Image.Image) -> np.ndarray:
    """Grey, with 16 bits a pixel."""
    return np.asarray(image.convert("L")).astype(np.uint16) * 257


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
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 999)) + chunk(b"IEND", b"")
    )


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
    change: Callable[[dict[str, torch.Tensor], dict[str, str]], Any], name: str = "odd.safetensors"
) -> Callable[[Case], Path]:
    """The guides file with other tensors or texts in its header."""

    def write(case: Case) -> Path:
        tensors, header = load_tensors(case.made.guides)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        change(tensors, header)
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, case.folder / name, header)
        return case.folder / name

    return write


def checkpoint_with(source: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Case], Path]:
    """A checkpoint with something else in it; what ``change`` returns, if anything, is saved instead."""

    def write(case: Case) -> Path:
        content = torch.load(getattr(case.made, source), weights_only=True)
        changed = change(content)
        torch.save(changed if isinstance(changed, dict) else content, case.folder / "odd.ckpt")
        return case.folder / "odd.ckpt"

    return write


def weights_with(
    change: Callable[[dict[str, torch.Tensor]], Any], name: str = "odd.safetensors"
) -> Callable[[Case], Path]:
    """The backbone's weights file with something else in it."""

    def write(case: Case) -> Path:
        state = {key: tensor.clone() for key, tensor in load_tensors(case.made.weights)[0].items()}
        changed = change(state)
        save_file(changed if isinstance(changed, dict) else state, case.folder / name)
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


def with_bad_parts(root: Path, **arguments: Any) -> Folder:
    """A folder with good and bad parts, half of which are tested."""
    defaults = {"root": root, "normal_dir": "good", "num_workers": 0, "val_split_mode": "same_as_test"}
    return Folder("my_part", **{**defaults, **arguments})


def interrupted(damage: Callable[[list[Path]], Any] = lambda _: None, **arguments: Any) -> Callable[[Case], Path]:
    """Good parts, and the tokens that an interrupted run has left of them, something changed."""

    def write(case: Case) -> Path:
        path = case.good(4)
        model = build(SPG, memory_limit=0, weights=case.made.weights, pre_trained=True, **arguments)
        run = quiet_engine(case.folder / "results")
        with patch("anomalib_spg.torch_model.train_sae", side_effect=KeyboardInterrupt), suppress(SystemExit):
            run.fit(model=model, datamodule=good_parts(path, train_batch_size=2))
        files = sorted((case.folder / "tokens").rglob("*.safetensors"))
        assert len(files) > 2
        damage(files)
        return path

    return write


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


def linked_folder(case: Case) -> Path:
    """A link to the folder of good parts."""
    (case.folder / "link").symlink_to(case.good(), target_is_directory=True)
    return case.folder / "link"


def with_linked_folder(case: Case) -> Path:
    """Images beside a link to a folder of others."""
    (case.good(2, "images") / "linked").symlink_to(case.good(1, "other"), target_is_directory=True)
    return case.folder / "images"


def few(count: int) -> Callable[[Case], Path]:
    """So many good parts."""
    return lambda case: case.good(count)


def all_black(at: Path) -> None:
    """Masks that mark nothing."""
    for path in (at / "masks").iterdir():
        write_image(path, Image.new("L", (48, 48)))


def mask(change: Callable[[Path], Any]) -> Callable[[Case], Path]:
    """Parts with masks, one of which is changed."""
    return parts_and_masks(lambda at: change(at / "masks/1.png"))


def as_mask(convert: Callable[[Image.Image], Any]) -> Callable[[Case], Path]:
    """Parts with masks, one of which is written in an odd way."""
    return mask(lambda path: write_image(path, convert(Image.open(path).copy())))


def other(**values: Any) -> Callable[[Case], Path]:
    """The guides file with other metadata; ``None`` leaves one out."""

    def change(_: Any, header: dict[str, str]) -> None:
        for name, value in values.items():
            if value is None:
                del header[name]
            else:
                header[name] = value if name == "version" else json.dumps(value)

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


def without_header(files: list[Path]) -> None:
    """A token file of which only the numbers are left."""
    save_file(load_file(files[1]), files[1])


def with_numbers(value: float) -> Callable[[list[Path]], None]:
    """Token files with a number replaced."""

    def change(files: list[Path]) -> None:
        with safe_open(files[1], "pt") as opened:
            header = opened.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(files[1]).items()}
        tensors["patches.0"].view(-1)[0] = value
        save_file(tensors, files[1], header)

    return change


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


def without(*keys: str) -> Callable[[dict[str, Any]], Any]:
    """A checkpoint without an entry: its name, or where it lies."""

    def change(content: dict[str, Any]) -> None:
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


def not_numbers(key: str) -> Callable[[dict[str, Any]], Any]:
    """NaN in one of a checkpoint's tensors."""
    return lambda content: content["state_dict"][key].fill_(float("nan"))


def train(*arguments: Any, model: str = "LAKE", **config: Any) -> Callable[[Case], list[Any]]:
    """Arguments of `anomalib train` on a folder, with a config of the quick model, changed."""

    def write(case: Case) -> list[Any]:
        chosen = {
            "backbone": VIT,
            "weights": str(case.made.weights),
            "layers": [1, 3],
            "image_size": SIZE,
            "visualizer": False,
        }
        chosen |= {"k_shot": 2, "num_neurons": 20} if model == "LAKE" else {}
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
