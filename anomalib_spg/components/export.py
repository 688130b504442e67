# SPDX-License-Identifier: Apache-2.0

"""Exported models compute what torch does: they resize as it does, and in single precision behind the backbone."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree as ET  # noqa: S405  # the file has been written by this process

import numpy as np
from anomalib.deploy import ExportType
from anomalib.models.components.base.export_mixin.utils import create_export_root

from .backbone import Backbone
from .compression import CompressBackboneOnly, head_operations

if TYPE_CHECKING:
    from openvino import Model, Node

ROWS = 32  # output rows resized by one product: more multiply more zeros, fewer are more products


class ExactExports(CompressBackboneOnly):
    """Mixin of an anomalib model whose ``model.backbone`` is a :class:`Backbone`; goes before ``AnomalibModule``."""

    def to_torch(self, *args: Any, **kwargs: Any) -> Path:
        """Export to torch as anomalib does, which saves a model that has learned nothing as well.

        Raises:
            RuntimeError: If there is nothing to export yet.
        """
        if not self.model.is_fitted:
            msg = f"{self.name} has learned nothing yet, so there is nothing to export. Train it first."
            raise RuntimeError(msg)
        return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:  # type: ignore[override]  # anomalib's is not Lightning's
        """Export to ONNX as anomalib does, but in operator set 18: 14, its default, has no antialiased resize."""
        return super().to_onnx(*args, **{"opset_version": 18, **kwargs})

    def to_openvino(self, export_root: Path | str, *args: Any, **kwargs: Any) -> Path:
        """Export to OpenVINO as anomalib does; see :func:`finish_openvino` for what is different."""
        with TemporaryDirectory() as folder:
            path = super().to_openvino(folder, *args, **kwargs)
            return finish_openvino(path, create_export_root(export_root, ExportType.OPENVINO), self.model.backbone)


def finish_openvino(path: Path, folder: Path, backbone: Backbone) -> Path:
    """Make an exported OpenVINO model compute what torch does.

    Its resize gets the antialiasing that its graph asks for, see :func:`antialias_resize`. Resize, distances or
    cosines, maps and scores are computed in single precision whatever precision the runtime takes, see
    :func:`keep_float32`; the backbone takes the runtime's.

    Args:
        path (Path): The ``.xml`` file as it was exported.
        folder (Path): Where the finished ``.xml`` and ``.bin`` go. Files there are replaced at once, because a program
            that uses them maps them.
        backbone (Backbone): The model's backbone.

    Returns:
        Path: The finished ``.xml`` file.
    """
    import openvino as ov

    model = ov.Core().read_model(path)
    names = antialias_resize(model)
    write_out(model, head_operations(model, backbone))
    names += head_operations(model, backbone)
    with TemporaryDirectory(dir=folder) as temporary:
        finished = Path(temporary) / path.name
        ov.save_model(model, finished, compress_to_fp16=False)
        keep_float32(finished, names)
        for suffix in (".bin", ".xml"):
            finished.with_suffix(suffix).replace((folder / path.name).with_suffix(suffix))
    return folder / path.name


def antialias_resize(model: "Model") -> list[str]:
    """Replace the antialiased resizes of an OpenVINO model by products that do the same.

    torch exports an antialiased bilinear resize, and ONNX Runtime computes it so. OpenVINO reads the attribute and
    ignores it in this mode, and its mode that resizes as Pillow does takes eight times as long as torch.

    Args:
        model (openvino.Model): Model, changed in place.

    Returns:
        list[str]: Names of the new operations.
    """
    known = {op.get_friendly_name() for op in model.get_ordered_ops()}
    for resize in [op for op in model.get_ordered_ops() if op.get_type_name() == "Interpolate"]:
        if resize.get_attributes()["antialias"]:
            height, width = resize.get_output_partial_shape(0)[2], resize.get_output_partial_shape(0)[3]
            if height.is_dynamic or width.is_dynamic:  # a transform that keeps the image's proportions
                replacement = _resize_as_pillow(resize)
            else:
                rows = _resize(resize.input_value(0).get_node(), axis=2, size=height.get_length())
                replacement = _resize(rows, axis=3, size=width.get_length())
            for target in resize.output(0).get_target_inputs():
                target.replace_source_output(replacement.output(0))
    return [op.get_friendly_name() for op in model.get_ordered_ops() if op.get_friendly_name() not in known]


def _resize_as_pillow(resize: "Node") -> "Node":
    """The same resize in OpenVINO's mode that antialiases: slow, but to any size."""
    from openvino import opset11 as op

    axes = op.constant(np.array([2, 3]))
    sizes = op.gather(resize.input_value(1), axes, op.constant(0))
    pads = [0, 0, 0, 0]
    images = resize.input_value(0)
    return op.interpolate(images, sizes, "bilinear_pillow", "sizes", pads_begin=pads, pads_end=pads, axes=axes)


def _resize(images: "Node", axis: int, size: int) -> "Node":
    """Resize images ``(B, C, H, W)`` along one axis, antialiased: a product with a triangle around each output.

    Output ``i`` lies at ``(i + 1/2) n / size`` among the ``n`` pixels, and weighs pixel ``j`` by how far its middle is
    from there, over ``max(n / size, 1)``. In integers, which no precision rounds, the weight is proportional to
    ``2 m - |(2 j + 1) size - (2 i + 1) n|`` with ``m = max(n, size)``, where that is positive. It is so for a few
    pixels only, so :data:`ROWS` outputs at a time are made from their part of the input.
    """
    from openvino import opset11 as op

    def integer(*values: int) -> Any:  # noqa: ANN401  # opset's nodes are untyped
        return op.constant(np.array(values))

    length = op.gather(op.shape_of(images), integer(axis), op.constant(0))
    reach = op.multiply(op.maximum(length, integer(size)), integer(2))
    parts = []
    for first in range(0, size, ROWS):
        twice = 2 * np.arange(first, min(first + ROWS, size)) + 1
        lowest = op.subtract(op.multiply(length, integer(twice[0])), reach)
        highest = op.add(op.multiply(length, integer(twice[-1])), op.add(reach, integer(2 * size - 1)))
        start = op.divide(op.maximum(lowest, integer(0)), integer(2 * size))
        stop = op.minimum(op.divide(highest, integer(2 * size)), length)
        pixels = op.range(op.squeeze(start, op.constant(0)), op.squeeze(stop, op.constant(0)), op.constant(1), "i64")
        pixels = op.add(op.multiply(pixels, integer(2 * size)), integer(size))
        centres = op.multiply(op.constant(twice[None, None, :, None]), length)
        triangles = op.maximum(op.subtract(reach, op.abs(op.subtract(pixels, centres))), integer(0))
        weights = op.convert(triangles, "f32")
        weights = _divide(weights, op.reduce_sum(weights, integer(3), keep_dims=True))
        part = op.slice(images, start, stop, integer(1), integer(axis))
        factors = (weights, part) if axis == 2 else (part, weights)
        parts.append(op.matmul(*factors, transpose_a=False, transpose_b=axis == 3))
    return op.concat(parts, axis)


def _divide(dividend: Any, divisor: Any) -> "Node":  # noqa: ANN401  # nodes or outputs of nodes
    """Divide by what is not 0, without operations whose precision the runtime forgets: a division, a power of -1."""
    from openvino import opset11 as op

    root = op.power(op.multiply(divisor, divisor), op.constant(np.float32(-0.5)))
    return op.multiply(op.multiply(dividend, divisor), op.multiply(root, root))


def _negative(value: Any) -> "Node":  # noqa: ANN401  # an output of a node
    """The negative, without a second factor: the runtime puts two into one, whose precision it forgets."""
    from openvino import opset11 as op

    node = value.get_node()
    if node.get_type_name() == "Multiply":
        for own, other in ((0, 1), (1, 0)):
            factor = node.input_value(own).get_node()
            if factor.get_type_name() == "Constant":
                return op.multiply(node.input_value(other), op.constant(-factor.data))
    return op.multiply(value, op.constant(np.float32(-1)))


def write_out(model: "Model", names: Collection[str]) -> None:
    """Replace operations that the runtime rewrites, losing the precision to keep, by what it makes of them.

    Args:
        model (openvino.Model): Model, changed in place.
        names (Collection[str]): Operations to look at.
    """
    from openvino import opset11 as op

    for node in [node for node in model.get_ordered_ops() if node.get_friendly_name() in names]:
        kind, shape = node.get_type_name(), node.get_output_partial_shape(0)
        if kind == "MatMul":
            for source in node.inputs():
                _fold(source)
        known = [-1 if size.is_dynamic else size.get_length() for size in shape]
        if node.get_output_element_type(0).to_string() != "f32" or not known or known.count(-1) > 1:
            continue
        sizes = op.constant(np.array(known))
        if kind in {"Squeeze", "Unsqueeze"}:
            new = op.reshape(node.input_value(0), sizes, special_zero=False)
        elif kind == "Subtract":
            new = op.add(node.input_value(0), _negative(node.input_value(1)))
        elif kind == "Divide":
            new = _divide(node.input_value(0), node.input_value(1))
        elif kind == "MatMul" and node.get_input_partial_shape(1).rank.get_length() == 1:
            column = op.unsqueeze(node.input_value(1), op.constant(1))
            new = op.reshape(
                op.matmul(node.input_value(0), column, transpose_a=False, transpose_b=False), sizes, special_zero=False
            )
            _fold(new.input_value(0).get_node().input(1))
        else:
            continue
        for target in node.output(0).get_target_inputs():
            target.replace_source_output(new.output(0))


def _fold(source: Any) -> None:  # noqa: ANN401  # openvino's Input has no name in Python
    """Put the value itself in the place of what an input is computed from, where that is constant."""
    import openvino as ov
    from openvino import opset11 as op

    value = source.get_source_output()
    waiting = [value.get_node()]
    if waiting[0].get_type_name() in {"Constant", "Convert"}:  # the latter is a compressed constant
        return
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter":
            return
        waiting += [parent.get_source_output().get_node() for parent in node.inputs()]
    single = {"INFERENCE_PRECISION_HINT": "f32"}
    result = ov.Core().compile_model(ov.Model([value], []), "CPU", single)([])[0]
    source.replace_source_output(op.constant(result).output(0))


def keep_float32(path: str | Path, names: Collection[str]) -> None:
    """Have operations of an OpenVINO file computed in single precision whatever precision the runtime takes.

    By default that is bfloat16 where the processor has it, and float16 on a GPU: probabilities near 1 are 0.004 apart
    then, and high scores tie. The attribute is OpenVINO's own, but Python has no name for it.

    Args:
        path (str | Path): The ``.xml`` file, which is replaced.
        names (Collection[str]): Operations.
    """
    tree = ET.parse(path)  # noqa: S314
    for layer in tree.iter("layer"):
        if layer.get("name") in names:
            info = layer.find("rt_info")
            if info is None:
                info = ET.SubElement(layer, "rt_info")
            ET.SubElement(info, "attribute", {"name": "precise", "version": "0"})
    tree.write(path, encoding="utf-8", xml_declaration=True)
