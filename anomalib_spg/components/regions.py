# SPDX-License-Identifier: Apache-2.0

"""Defects one by one: where an outlined place lies, how large it is, how high it scores."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image
from skimage.measure import approximate_polygon, find_contours, label, regionprops

if TYPE_CHECKING:
    import torch
    from anomalib.data import ImageBatch
    from numpy.typing import ArrayLike


class Defect(NamedTuple):
    """A connected place of a mask, in pixels of the image.

    Attributes:
        box (tuple[int, int, int, int]): Left, top, right and bottom of the pixels it touches, the latter two exclusive.
        area (int): Pixels.
        score (float): Highest value of the anomaly map in it; not a number where one there is not.
        contour (list[tuple[float, float]]): Corners ``(x, y)`` of the polygon around it, without its holes; the first
            is not repeated. Whole numbers are the edges of pixels, so 0 and the width are those of the image.
    """

    box: tuple[int, int, int, int]
    area: int
    score: float
    contour: list[tuple[float, float]]


def defects(
    anomaly_map: "torch.Tensor | ArrayLike",
    mask: "torch.Tensor | ArrayLike | None",
    size: tuple[int, int] | None = None,
) -> list[Defect]:
    """Split a mask into its connected places.

    Map and mask are those of ``anomalib predict``, or of an exported model: the mask holds what exceeds the pixel
    threshold, and is empty where an image is accepted. Pixels that touch at a corner belong together.

    Args:
        anomaly_map (torch.Tensor | ArrayLike): Anomaly map ``(h, w)``; further axes have length 1.
        mask (torch.Tensor | ArrayLike | None): Mask of the same size. ``None`` has no defects.
        size (tuple[int, int] | None): Width and height of the image in whose pixels to answer, as PIL gives them.
            ``None`` takes those of the map.

    Returns:
        list[Defect]: The largest first.

    Raises:
        ValueError: If map and mask differ in size, or are not those of one image.

    Example:
        >>> anomaly_map = np.array([[0.1, 0.9, 0.6], [0.1, 0.2, 0.1]])
        >>> found = defects(anomaly_map, anomaly_map > 0.5, size=(30, 40))
        >>> found[0].box, found[0].area, found[0].score
        ((10, 0, 30, 20), 400, 0.9)
    """
    if mask is None:
        return []
    values, marked = _plane(anomaly_map, "anomaly map").astype(float), _plane(mask, "mask").astype(bool)
    if values.shape != marked.shape:
        msg = f"The anomaly map has {values.shape} pixels, the mask {marked.shape}. Give both of one prediction."
        raise ValueError(msg)
    rows, columns = marked.shape
    width, height = size or (columns, rows)
    found = []
    for place in regionprops(label(marked), intensity_image=values):
        top, left, bottom, right = place.bbox
        box = (
            int(left * width / columns),
            int(top * height / rows),
            -int(-right * width // columns),
            -int(-bottom * height // rows),
        )
        area = max(1, round(place.num_pixels * width * height / (columns * rows)))
        corners = (_corners(place.image_filled) + np.array([top, left])) * (height / rows, width / columns)
        contour = [(round(float(x), 1), round(float(y), 1)) for y, x in corners]
        found.append(Defect(box, area, float(place.intensity_max), contour))
    return sorted(found, key=lambda defect: -defect.area)


def defects_of(batch: "ImageBatch", index: int) -> list[Defect]:
    """Defects of an image of a batch of predictions, in pixels of its file.

    Pixels count as they are stored, whatever EXIF says, which is how anomalib reads them.

    Args:
        batch (ImageBatch): Predictions of images that come from files.
        index (int): Number of the image in the batch.

    Returns:
        list[Defect]: The largest first; none without a map, a mask or a path.
    """
    if batch.anomaly_map is None or batch.pred_mask is None or not batch.image_path:
        return []
    mask = batch.pred_mask[index]
    if not mask.any():
        return []
    with Image.open(batch.image_path[index]) as image:  # reads the header only
        size = image.size
    return defects(batch.anomaly_map[index], mask, size)


def _plane(values: "torch.Tensor | ArrayLike", name: str) -> np.ndarray:
    """Bring a map of one image to two axes."""
    tensor = values.detach().float().cpu() if hasattr(values, "detach") else values
    array = np.asarray(tensor)
    if array.ndim < 2 or array.size != array.shape[-2] * array.shape[-1]:
        msg = f"The {name} has shape {array.shape}; it must be that of one image, such as (448, 448)."
        raise ValueError(msg)
    return array.reshape(array.shape[-2:])


def _corners(place: np.ndarray) -> np.ndarray:
    """Corners ``(row, column)`` of the polygon around a place without holes, in its pixels' edges."""
    # With a border, so that it closes. A curve between pixel centres at 0.5 runs half-way between in and out.
    curves = find_contours(np.pad(place, 1).astype(float), 0.5, fully_connected="high")
    curve = max(curves, key=len) - 0.5  # the border moves centres by 1, which lie at 0.5 of a pixel
    return approximate_polygon(curve, tolerance=0.3)[:-1]
