# SPDX-License-Identifier: Apache-2.0

"""LAKE's neurons in anomalib's PatchCore and AnomalyDINO, with small random backbones."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from anomalib.data import ImageBatch
from anomalib.models import AnomalibModule, AnomalyDINO, Padim, Patchcore
from anomalib.models.components.feature_extractors import TimmFeatureExtractor
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.utils.serialization import anomalib_safe_globals
from torch import nn

from anomalib_lake import SelectSensitiveNeurons
from tests.helpers import data, engine

MODELS = ["patchcore", "anomaly_dino"]
SIZE = 70  # five of DINOv2's patches
Create = Callable[..., AnomalibModule]


@pytest.fixture(scope="module")
def create() -> Create:
    """Makes a model; those of one kind have the same random weights."""

    def make(kind: str, layers: tuple[str, ...] = ("layer1", "layer2"), **arguments: object) -> AnomalibModule:
        torch.manual_seed(1)
        # as text: Python 3.11.0 to 3.11.3 pickle an enumeration so that weights_only=True refuses it
        arguments = {"precision": "float32", **arguments}
        if kind == "patchcore":
            arguments = {"coreset_sampling_ratio": 1.0, "num_neighbors": 2, **arguments}
            return Patchcore("resnet18", layers, pre_trained=False, visualizer=False, **arguments)
        with pytest.MonkeyPatch.context() as patch:
            module = "anomalib.models.image.anomaly_dino.torch_model"
            patch.setattr(f"{module}.DINO_DEPTHS", {"small": 3})

            def extractor(**given: object) -> TimmFeatureExtractor:
                return TimmFeatureExtractor(**given | {"pre_trained": False})

            patch.setattr(f"{module}.TimmFeatureExtractor", extractor)
            return AnomalyDINO(encoder_name="vit_small_patch14_dinov2", visualizer=False, **arguments)

    return make


def images(count: int, seed: int) -> torch.Tensor:
    """Noise."""
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def fit(model: AnomalibModule, callback: SelectSensitiveNeurons | None = None) -> AnomalibModule:
    """Fit on six images by the model's own steps."""
    if callback:
        callback.attach(model)
    model.train()
    for seed in range(2):
        model.training_step(ImageBatch(image=images(3, seed)))
    torch.manual_seed(2)  # the coreset's first token
    model.fit()
    return model.eval()


def stored_tokens(model: AnomalibModule) -> torch.Tensor:
    """Tokens of the six normal images, without the selection."""
    model.train()
    for seed in range(2):
        model.training_step(ImageBatch(image=images(3, seed)))
    return torch.cat(model.model.embedding_store)


def predict(model: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and maps of a torch model."""
    with torch.inference_mode():
        result = model.eval()(batch)
    return result.pred_score.flatten(), result.anomaly_map


@pytest.mark.parametrize(
    ("kind", "layers", "columns"),
    [("patchcore", ("layer2",), 20), ("patchcore", ("layer1", "layer2"), 40), ("anomaly_dino", (), 20)],
)
def test_columns_of_the_bank(kind: str, layers: tuple[str, ...], columns: int, create: Create) -> None:
    """K columns for each layer."""
    model = fit(create(kind, layers), SelectSensitiveNeurons(20))
    assert model.model.memory_bank.shape[1] == columns
    assert len(model.model.memory_bank) == len(stored_tokens(create(kind, layers)))


@pytest.mark.parametrize("kind", MODELS)
def test_all_channels_are_the_unmodified_model(kind: str, create: Create) -> None:
    """Scores and maps of new images; the order of the channels does not matter."""
    plain = fit(create(kind)).model
    selecting = fit(create(kind), SelectSensitiveNeurons(selection="all")).model
    for expected, found in zip(predict(plain, images(2, 9)), predict(selecting, images(2, 9)), strict=True):
        assert expected.std() > 0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_patchcore_keeps_the_channels_of_largest_variance(create: Create) -> None:
    """Of each layer, by the tokens of all images; the bank is these columns."""
    tokens = stored_tokens(create("patchcore")).double().numpy()
    model = fit(create("patchcore"), SelectSensitiveNeurons(20)).model
    parts = tokens[:, :64], tokens[:, 64:]
    expected = [np.argsort(-part.var(axis=0))[:20] for part in parts]
    assert [set(neurons.indices.tolist()) for neurons in model.neurons] == [set(part.tolist()) for part in expected]
    columns = np.concatenate([part[:, neurons.indices] for part, neurons in zip(parts, model.neurons, strict=True)], 1)
    order = np.lexsort(columns.T), np.lexsort(model.memory_bank.double().numpy().T)
    np.testing.assert_allclose(model.memory_bank.numpy()[order[1]], columns[order[0]], atol=1e-6)


def test_anomaly_dino_keeps_the_channels_of_largest_variance(create: Create) -> None:
    """And scores by the cosine distance of what is kept."""
    tokens = stored_tokens(create("anomaly_dino")).double().numpy()
    model = fit(create("anomaly_dino"), SelectSensitiveNeurons(20)).model
    indices = model.neurons[0].indices.numpy()
    assert set(indices.tolist()) == set(np.argsort(-tokens.var(axis=0))[:20].tolist())
    new = create("anomaly_dino").model.extract_features(images(1, 9))[0].double().numpy()[:, indices]
    bank = tokens[:, indices]
    bank, new = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (bank, new))
    distances = (1 - new @ bank.T).min(axis=1)  # of 25 patches, whose top 1 % is the largest
    assert predict(model, images(1, 9))[0].item() == pytest.approx(distances.max(), abs=1e-6)


def test_neurons_are_chosen_before_the_coreset(create: Create) -> None:
    """A coreset does not change which."""
    whole, coreset = (
        fit(create("patchcore", coreset_sampling_ratio=ratio), SelectSensitiveNeurons(20)).model for ratio in (1.0, 0.1)
    )
    assert len(coreset.memory_bank) == len(whole.memory_bank) // 10
    for first, second in zip(whole.neurons, coreset.neurons, strict=True):
        assert torch.equal(first.indices, second.indices)


def test_background_is_told_by_all_channels(create: Create, monkeypatch: pytest.MonkeyPatch) -> None:
    """AnomalyDINO's mask is made of what it is made of without the selection."""
    seen = []

    def upper_half(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
        seen.append((tokens, grid))
        return np.arange(25)[None] < 15

    monkeypatch.setattr(AnomalyDINOModel, "compute_background_masks", staticmethod(upper_half))
    plain, selecting = fit(create("anomaly_dino")).model, fit(create("anomaly_dino"), SelectSensitiveNeurons(20)).model
    for model in (plain, selecting):
        model.masking = True
        _, anomaly_map = predict(model, images(1, 9))
        assert anomaly_map[..., -1, :].amax() < 0.1 * anomaly_map[..., 0, :].amin()
    assert seen[0][0].shape == (1, 25, 384)
    np.testing.assert_array_equal(seen[0][0], seen[1][0])
    assert seen[0][1] == seen[1][1] == (5, 5)


@pytest.mark.parametrize("selection", ["variance", "pca", "random", "lowest"])
@pytest.mark.parametrize("kind", MODELS)
def test_normal_images_score_near_zero(kind: str, selection: str, create: Create) -> None:
    """Bank and queries are restricted alike."""
    model = fit(create(kind), SelectSensitiveNeurons(20, selection)).model
    normal, _ = predict(model, images(3, 0))
    new, _ = predict(model, images(3, 9))
    assert normal.max() < 0.05 * new.min()


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_exported_equals_torch(kind: str, create: Create, tmp_path: Path) -> None:
    """ONNX at f32 precision."""
    model = fit(create(kind), SelectSensitiveNeurons(20))
    batch = images(2, 9)  # anomalib fixes PatchCore's graph to this number
    path = model.to_onnx(tmp_path, input_size=(SIZE, SIZE))
    compiled = ov.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.inference_mode():
        expected = model.eval()(batch)
    result = compiled(batch.numpy())
    assert expected.anomaly_map.std() > 0
    np.testing.assert_allclose(result["anomaly_map"], expected.anomaly_map.numpy(), atol=1e-4)
    np.testing.assert_allclose(result["pred_score"].flatten(), expected.pred_score.numpy().flatten(), atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_half_precision_and_pickle(kind: str, create: Create) -> None:
    """The dtype of the model is kept; a pickled model is the same."""
    model = fit(create(kind, precision="float16"), SelectSensitiveNeurons(20, "pca")).model
    assert model.memory_bank.dtype == torch.float16
    again = pickle.loads(pickle.dumps(model))
    for expected, found in zip(predict(model, images(1, 9)), predict(again, images(1, 9)), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_checkpoint(kind: str, create: Create, mvtec: Path, tmp_path: Path) -> None:
    """A new model with the callback says what the trained one said; one without cannot read the checkpoint."""
    source = data(mvtec)
    arguments = {"coreset_sampling_ratio": 0.01} if kind == "patchcore" else {}
    trained, restored = create(kind, **arguments), create(kind, **arguments)
    for parameter in restored.parameters():
        parameter.data.zero_()
    train = engine(tmp_path, callbacks=[SelectSensitiveNeurons(20)])
    train.fit(trained, datamodule=source)
    checkpoint = train.trainer.checkpoint_callback.best_model_path
    assert trained.model.memory_bank.shape[1] == (40 if kind == "patchcore" else 20)
    test = partial(engine(tmp_path, callbacks=[SelectSensitiveNeurons(20)]).test, datamodule=source, verbose=False)
    assert test(restored, ckpt_path=checkpoint) == train.test(trained, datamodule=source, verbose=False)
    expected = predict(trained.model, images(2, 9))
    for found, value in zip(predict(restored.model, images(2, 9)), expected, strict=True):
        assert torch.equal(found, value)
    with pytest.raises(RuntimeError, match="neurons"):
        engine(tmp_path).test(create(kind), datamodule=source, ckpt_path=checkpoint)

    attached = create(kind)
    SelectSensitiveNeurons(20).attach(attached)
    with anomalib_safe_globals():
        attached.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    assert torch.equal(predict(attached.model, images(2, 9))[0], expected[0])


def test_other_models_are_refused(mvtec: Path, tmp_path: Path) -> None:
    """By name, with those that work."""
    model = Padim("resnet18", ["layer1"], pre_trained=False, n_features=20)
    with pytest.raises(TypeError, match="with Patchcore and AnomalyDINO, not with Padim"):
        engine(tmp_path, callbacks=[SelectSensitiveNeurons()]).fit(model, datamodule=data(mvtec))


@pytest.mark.parametrize("kind", MODELS)
def test_a_fitted_bank_is_refused(kind: str, create: Create) -> None:
    """Its columns are all channels; a model that has the selection keeps it."""
    with pytest.raises(ValueError, match="bank of all channels already"):
        SelectSensitiveNeurons().attach(fit(create(kind)))
    model = fit(create(kind), SelectSensitiveNeurons(20))
    before = predict(model.model, images(1, 9))[0]
    SelectSensitiveNeurons(30).attach(model)
    assert torch.equal(predict(model.model, images(1, 9))[0], before)


@pytest.mark.parametrize(("arguments", "message"), [({"num_neurons": 0}, "num_neurons=0"), ({"selection": "x"}, "'x'")])
def test_bad_arguments(arguments: dict, message: str) -> None:
    """They are named at once."""
    with pytest.raises(ValueError, match=message):
        SelectSensitiveNeurons(**arguments)


def test_too_many_neurons(create: Create) -> None:
    """More than a layer has."""
    with pytest.raises(ValueError, match="num_neurons=65 exceeds the 64 channels"):
        fit(create("patchcore"), SelectSensitiveNeurons(65))


def test_nothing_stored(create: Create) -> None:
    """anomalib's own error."""
    model = create("patchcore")
    SelectSensitiveNeurons().attach(model)
    with pytest.raises(ValueError, match="Embedding store is empty"):
        model.fit()


@pytest.mark.command
@pytest.mark.slow
def test_command(mvtec: Path, tmp_path: Path, anomalib_command: Callable[..., str]) -> None:
    """`anomalib train`, and `anomalib predict` from its checkpoint."""
    model = [
        *("--model", "Patchcore", "--model.backbone", "resnet18", "--model.pre_trained", "false"),
        *("--trainer.callbacks", "anomalib_lake.SelectSensitiveNeurons", "--trainer.callbacks.num_neurons", "20"),
    ]
    source = ["--data", "MVTecAD", "--data.root", mvtec, "--data.category", "brick", "--data.num_workers", "0"]
    anomalib_command("train", *model, *source, folder=tmp_path)
    checkpoint = next(tmp_path.rglob("latest/weights/lightning/model.ckpt"))
    with anomalib_safe_globals():
        state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert state["model.memory_bank"].shape[1] == 40
    images = mvtec / "brick/test/hole"
    anomalib_command("predict", *model, "--data", images, "--ckpt_path", checkpoint, folder=tmp_path)
    made = {path.name for path in (tmp_path / "results/Patchcore/latest/images").rglob("*")}
    assert {path.name for path in images.iterdir()} <= made
