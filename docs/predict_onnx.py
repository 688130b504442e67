# SPDX-License-Identifier: Apache-2.0

"""Accept or reject images with an exported ONNX model: ONNX Runtime, NumPy and Pillow, without torch or anomalib.

    pip install onnxruntime numpy pillow
    python predict_onnx.py results/weights/onnx/model.onnx new/*.png

The file resizes, normalises, finds and decides by itself: it takes the image as it is, of any size. Heatmaps go to the
folder ``heatmaps``, under the names of their images and of the folders these lie in.
"""

import os
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def read(path: str) -> np.ndarray:
    """Read an image as ``(H, W, 3)`` in [0, 1]."""
    picture = Image.open(path)
    if picture.mode[0] in "IF":
        msg = "it has more than 8 bits a pixel, convert it as the images that the model was fitted on"
        raise ValueError(msg)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def main(model: str, *paths: str) -> None:
    """Print the decision on each image, and save its heatmap in the folder ``heatmaps``."""
    places = [Path(os.path.normpath(Path(path).absolute())) for path in paths]
    top = os.path.commonpath([place.parent for place in places] or ["."])
    session = onnxruntime.InferenceSession(model)
    names = [output.name for output in session.get_outputs()]
    failed = 0
    for path, place in zip(paths, places, strict=True):
        try:
            pixels = read(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{path}: not decided, it cannot be read: {error}", file=sys.stderr)
            failed += 1
            continue
        image = pixels.transpose(2, 0, 1)[None]  # (1, 3, H, W)
        result = dict(zip(names, session.run(None, {session.get_inputs()[0].name: image}), strict=True))
        decision = "rejected" if result["pred_label"].item() else "accepted"
        print(f"{path}: {decision}, score {result['pred_score'].item():.4f} (threshold 0.5)")
        # The map has the size of the model's input; 0.5 is the threshold of its pixels.
        heatmap = Image.fromarray((result["anomaly_map"].squeeze() * 255).clip(0, 255).astype(np.uint8))
        target = Path("heatmaps", place.relative_to(top).with_name(f"{place.name}.png"))
        target.parent.mkdir(parents=True, exist_ok=True)
        heatmap.resize((pixels.shape[1], pixels.shape[0])).save(target)
    if failed:
        sys.exit(f"{failed} of {len(paths)} files are not decided, see above.")


if __name__ == "__main__":
    main(*sys.argv[1:])
