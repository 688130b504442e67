# SPDX-License-Identifier: Apache-2.0

"""Accept or reject images with an exported OpenVINO model: OpenVINO, NumPy and Pillow, without torch or anomalib.

    pip install openvino numpy pillow
    python predict_openvino.py results/weights/openvino/model.xml new/*.png

The file resizes, normalises, finds and decides by itself: it takes the image as it is, of any size.
"""

import sys

import numpy as np
import openvino
from PIL import Image


def main(model: str, *paths: str) -> None:
    """Print the decision on each image."""
    compiled = openvino.Core().compile_model(model, "AUTO")
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255  # (H, W, 3) in [0, 1]
        result = compiled(pixels.transpose(2, 0, 1)[None])  # (1, 3, H, W)
        decision = "rejected" if result["pred_label"].item() else "accepted"
        print(f"{path}: {decision}, score {result['pred_score'].item():.4f} (threshold 0.5)")


if __name__ == "__main__":
    main(*sys.argv[1:])
