# SPDX-License-Identifier: Apache-2.0

"""What is done to an exported OpenVINO file: the resize, and the precision behind the backbone."""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule
from openvino import opset11 as op
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import LAKE
from anomalib_spg import SPG, GuideSettings
from anomalib_spg.components.compression import head_operations
from anomalib_spg.components.export import antialias_resize, keep_float32
from tests.helpers import TINY

HAS_BF16 = "BF16" in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def resizing_model(size: tuple[int, int], shape: tuple[int, ...]) -> ov.Model:
    """A graph with the resize that OpenVINO makes of torch's, and a product behind it."""
    images = op.parameter(shape, np.float32)
    resized = op.interpolate(
        images,
        op.constant(np.array(size)),
        "linear_onnx",
        "sizes",
        coordinate_transformation_mode="half_pixel",
        antialias=True,
        pads_begin=[0, 0, 0, 0],
        pads_end=[0, 0, 0, 0],
        axes=op.constant(np.array([2, 3])),
    )
    return ov.Model([op.relu(resized)], [images])


@pytest.mark.parametrize("precision", ["f32", "default"])
@pytest.mark.parametrize("shape", [(-1, 3, -1, -1), None], ids=["any size", "one size"])
def test_resize_is_that_of_torch(shape: tuple[int, ...] | None, precision: str, tmp_path: Path) -> None:
    """Enlarged and reduced, square or not, one pixel wide; in half precision as well, as the operations are kept."""
    rng = np.random.default_rng(0)
    sizes = [(211, 97), (40, 300), (70, 45), (1, 9), (1031, 33), (2048, 64)]
    for batch, (height, width) in enumerate(sizes, start=1):
        images = rng.random((batch % 3 + 1, 3, height, width), dtype=np.float32)
        model = resizing_model((70, 45), shape or images.shape)
        names = antialias_resize(model)
        assert not any(node.get_type_name() == "Interpolate" for node in model.get_ops())
        ov.save_model(model, tmp_path / "model.xml", compress_to_fp16=False)
        keep_float32(tmp_path / "model.xml", names)
        config = {} if precision == "default" else {"INFERENCE_PRECISION_HINT": precision}
        result = ov.Core().compile_model(tmp_path / "model.xml", "CPU", config)(images)[0]
        expected = F.interpolate(torch.from_numpy(images), (70, 45), mode="bilinear", antialias=True).numpy()
        # The last operation is not kept, so half precision rounds what it gives.
        assert np.abs(result - expected).max() < (1e-5 if precision == "f32" else 3e-3), (height, width)


@pytest.fixture(scope="module", params=["LAKE", "SPG", "SPG with rarity"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[AnomalibModule, Path]:
    """A small model that has learned something, and its OpenVINO file."""
    torch.manual_seed(0)
    arguments = {"backbone": TINY, "pre_trained": False, "image_size": 64}
    if request.param == "LAKE":
        model = LAKE(**arguments, layers=[0, 1])
        model.model.train()(torch.randn(3, 3, 64, 64))
        model.model.fit()
    else:
        # A low temperature, so that probabilities are close to 1.
        own_weight = 8.0 if "rarity" in request.param else 0.0
        model = SPG(**arguments, layers=[0, 1], temperature=0.005, own_weight=own_weight)
        masks = torch.zeros(4, 64, 64)
        masks[:2, :32, :32] = 1
        model.model.train()(torch.randn(4, 3, 64, 64), masks)
        model.model.fit(GuideSettings(num_atoms=64, k=8, sae_epochs=1, guide_epochs=1))
    return model.eval(), model.to_openvino(tmp_path_factory.mktemp(request.param))


@pytest.mark.slow
def test_head_is_computed_in_single_precision(exported: tuple[AnomalibModule, Path]) -> None:
    """At the runtime's own precision nothing behind the backbone is bfloat16, and the backbone is."""
    model, path = exported
    graph = ov.Core().read_model(path)
    head = set(head_operations(graph, model.model.backbone))
    products = [node for node in graph.get_ordered_ops() if node.get_type_name() == "MatMul"]
    # LAKE: distances to bank and own image in two blocks at two scales; SPG: cosines in two blocks, with rarity
    # distances, too; both: the map.
    expected = 10 if isinstance(model, LAKE) else 6 if model.model.own_weight else 4
    assert sum(node.get_friendly_name() in head for node in products) == expected
    half = {"inside": 0, "behind": 0}
    for node in ov.Core().compile_model(path, "CPU").get_runtime_model().get_ordered_ops():
        info = {key: value.value for key, value in node.get_rt_info().items()}
        # Conversions between precisions are the runtime's; a one appended to each token is exact in any.
        if info.get("runtimePrecision") != "bf16" or info["layerType"] in {"Reorder", "Const", "Input"}:
            continue
        if "ones_like" not in node.get_friendly_name():
            half["behind" if node.get_friendly_name() in head else "inside"] += 1
    assert half["behind"] == 0
    assert half["inside"] > 20 or not HAS_BF16


def run_both(exported: tuple[AnomalibModule, Path], count: int, **config: str) -> tuple[InferenceBatch, Any]:
    """What torch and the file give for so many random images."""
    model, path = exported
    images = torch.rand(count, 3, 90, 70)
    with torch.inference_mode():
        return model(images), ov.Core().compile_model(path, "CPU", config)(images.numpy())


@pytest.mark.slow
def test_file_computes_what_torch_does(exported: tuple[AnomalibModule, Path]) -> None:
    """In single precision, to what rounding gives."""
    expected, result = run_both(exported, 5, INFERENCE_PRECISION_HINT="f32")
    np.testing.assert_allclose(result["pred_score"].flatten(), expected.pred_score, atol=2e-4)
    np.testing.assert_allclose(result["anomaly_map"], expected.anomaly_map, atol=5e-4)


@pytest.mark.slow
def test_default_precision_ties_no_scores(exported: tuple[AnomalibModule, Path]) -> None:
    """Each of many images has a score of its own; maps have nearly as many values as those of torch."""
    expected, result = run_both(exported, 24)
    assert len(set(expected.pred_score.tolist())) == 24
    assert len(set(result["pred_score"].flatten().tolist())) == 24
    assert len(np.unique(result["anomaly_map"][0])) > 0.8 * len(expected.anomaly_map[0].unique())
