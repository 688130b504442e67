# SPDX-License-Identifier: Apache-2.0

"""Exported OpenVINO models resize as torch does."""

from pathlib import Path


def antialias_resize(path: str | Path) -> None:
    """Make the resize of an exported OpenVINO model use the antialiasing that its graph asks for.

    torch exports an antialiased bilinear resize, and ONNX Runtime computes it so. OpenVINO reads the attribute and
    ignores it in this mode; its mode ``bilinear_pillow`` computes the same as torch.

    Args:
        path (str | Path): The ``.xml`` file; it and the ``.bin`` beside it are replaced.
    """
    import numpy as np
    import openvino as ov
    from openvino import opset11

    path = Path(path)
    model = ov.Core().read_model(path)
    resizes = [op for op in model.get_ordered_ops() if op.get_type_name() == "Interpolate"]
    resizes = [op for op in resizes if op.get_attributes()["antialias"]]
    for resize in resizes:
        axes = opset11.constant(np.array([2, 3]))
        sizes = opset11.gather(resize.input_value(1), axes, opset11.constant(0))
        pads = [0, 0, 0, 0]
        replacement = opset11.interpolate(
            resize.input_value(0), sizes, "bilinear_pillow", "sizes", pads_begin=pads, pads_end=pads, axes=axes
        )
        replacement.set_friendly_name(resize.get_friendly_name())
        for target in resize.output(0).get_target_inputs():
            target.replace_source_output(replacement.output(0))
    if not resizes:
        return
    temporary = path.with_name(f".{path.stem}.tmp.xml")
    ov.save_model(model, temporary, compress_to_fp16=False)
    del model  # it maps the file that is replaced now
    for suffix in (".bin", ".xml"):
        temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
