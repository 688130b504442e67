# SPDX-License-Identifier: Apache-2.0

"""INT8 for the backbone only: quantising the head too would make all scores equal."""

from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .backbone import Backbone

if TYPE_CHECKING:
    from anomalib.data import AnomalibDataModule
    from anomalib.deploy import CompressionType
    from anomalib.models.components import AnomalibModule as _Base
    from openvino import Model
else:
    _Base = object


class CompressBackboneOnly(_Base):
    """Mixin of an anomalib model whose ``model.backbone`` is a :class:`Backbone`; goes before ``AnomalibModule``.

    anomalib tells NNCF nothing about the model, so every operation is quantised to 256 levels as in a convolutional
    network. All scores then become equal: the head distinguishes patches by small differences of distances or cosines,
    and a transformer has outlier channels. Here NNCF is told that the model is a transformer, and the head, a small
    share of the run time, is not quantised. Applies to ``INT8``, ``INT8_PTQ`` and ``INT8_ACQ``.
    """

    model: Any

    def _compress_ov_model(
        self,
        model: "Model",
        compression_type: "CompressionType | None" = None,
        datamodule: "AnomalibDataModule | None" = None,
        *args: Any,
        **kwargs: Any,
    ) -> "Model":
        import nncf

        give_validation_images(datamodule)
        scope = {"ignored_scope": nncf.IgnoredScope(names=head_operations(model, self.model.backbone), validate=False)}
        options = {**scope, "model_type": nncf.ModelType.TRANSFORMER}
        with _completed(nncf, compress_weights=scope, quantize=options, quantize_with_accuracy_control=options):
            return super()._compress_ov_model(model, compression_type, datamodule, *args, **kwargs)


def give_validation_images(datamodule: Any) -> None:  # noqa: ANN401  # any of anomalib's datamodules, or none
    """Let a datamodule without a validation set validate on its training images, by which anomalib calibrates INT8.

    Args:
        datamodule (Any): Datamodule, or ``None``.
    """
    if datamodule is not None:
        datamodule.setup("fit")
        if getattr(datamodule, "val_data", None) is None:
            datamodule.val_data = datamodule.train_data


@contextmanager
def _completed(module: ModuleType, **options: dict[str, Any]) -> Generator[None, None, None]:
    """Complete the calls of a module's functions for a while: anomalib offers a model no say in those of NNCF."""
    functions = {name: getattr(module, name) for name in options}
    try:
        for name, function in functions.items():
            setattr(module, name, partial(function, **options[name]))
        yield
    finally:
        for name, function in functions.items():
            setattr(module, name, function)


def head_operations(model: "Model", backbone: Backbone) -> list[str]:
    """Name the operations of an exported graph that come after the backbone's last block.

    Args:
        model (openvino.Model): Graph.
        backbone (Backbone): Its backbone. In the graph the parameters have lost their names, not their shapes.

    Returns:
        list[str]: Operations that the last block's last product with a weight does not depend on.
    """
    parameters = backbone.vit.blocks[backbone.layers[-1]].parameters()
    weights = {tuple(sorted(parameter.shape)) for parameter in parameters if parameter.ndim == 2}
    operations = model.get_ordered_ops()
    products = [op for op in operations if op.get_type_name() == "MatMul" and op.input(1).get_partial_shape().is_static]
    waiting = [op for op in products if tuple(sorted(op.input(1).get_shape())) in weights][-1:]
    seen: set[str] = set()
    while waiting:
        operation = waiting.pop()
        if operation.get_friendly_name() not in seen:
            seen.add(operation.get_friendly_name())
            waiting += [source.get_source_output().get_node() for source in operation.inputs()]
    plain = {"Constant", "Parameter", "Result"}
    names = {op.get_friendly_name() for op in operations if op.get_type_name() not in plain}
    return sorted(names - seen)
