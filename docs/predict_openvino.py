# SPDX-License-Identifier: Apache-2.0

"""Accept or reject images with an exported OpenVINO model: OpenVINO, NumPy and Pillow, without torch or anomalib.

    pip install openvino numpy pillow
    python predict_openvino.py results/weights/openvino/model.xml new/*.png

The file resizes, normalises, finds and decides by itself: it takes the image as it is, of any size. Several images are
computed side by side (OpenVINO's throughput mode) and printed as they are done, so their order may differ.
"""

import sys

import numpy as np
import openvino
from PIL import Image


def show(request: openvino.InferRequest, path: str) -> None:
    """Print the decision on an image."""
    label, score = (request.get_tensor(name).data.item() for name in ("pred_label", "pred_score"))
    print(f"{path}: {'rejected' if label else 'accepted'}, score {score:.4f} (threshold 0.5)")


def read(path: str) -> np.ndarray:
    """Read an image as ``(H, W, 3)`` in [0, 1]."""
    picture = Image.open(path)
    if picture.mode[0] in "IF":
        msg = "it has more than 8 bits a pixel, convert it as the images that the model was fitted on"
        raise ValueError(msg)
    return np.asarray(picture.convert("RGB"), dtype=np.float32) / 255


def main(model: str, *paths: str) -> None:
    """Give the images to as many requests as suit the processor."""
    hint = "THROUGHPUT" if len(paths) > 1 else "LATENCY"
    requests = openvino.AsyncInferQueue(openvino.Core().compile_model(model, "AUTO", {"PERFORMANCE_HINT": hint}))
    requests.set_callback(show)
    failed = 0
    for path in paths:
        try:
            pixels = read(path)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            print(f"{path}: not decided, it cannot be read: {error}", file=sys.stderr)
            failed += 1
            continue
        requests.start_async({0: pixels.transpose(2, 0, 1)[None]}, path)  # (1, 3, H, W)
    requests.wait_all()
    if failed:
        sys.exit(f"{failed} of {len(paths)} files are not decided, see above.")


if __name__ == "__main__":
    main(*sys.argv[1:])
