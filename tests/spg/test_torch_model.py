# SPDX-License-Identifier: Apache-2.0

"""SPGModel without Lightning."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from scipy.ndimage import gaussian_filter

from anomalib_spg import SPG, GuideSettings, SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import save_guides
from anomalib_spg.rarity import rarity
from anomalib_spg.token_store import memory_need
from tests.helpers import TINY


def build(**arguments) -> SPGModel:
    """A small model with random weights."""
    return SPGModel(TINY, **{"layers": [5], "pre_trained": False, **arguments})


def settings(**changes) -> GuideSettings:
    """Settings that take little time."""
    return GuideSettings(**{"num_atoms": 64, "k": 8, "sae_epochs": 2, "guide_epochs": 2, **changes})


def fitted(size: tuple[int, int] = (64, 64), chosen: GuideSettings | None = None, **arguments) -> SPGModel:
    """A model that has learned from eight images."""
    torch.manual_seed(0)
    model = build(**arguments)
    images = torch.randn(8, 3, *size) * 0.1
    masks = torch.zeros(8, *size)
    masks[:4, 16:32, 16:48] = 1
    images[:4, :, 16:32, 16:48] += 3
    model.train()(images, masks)
    model.fit(chosen or settings())
    return model.eval()


def test_map_and_score_follow_the_paper() -> None:
    """Map p = softmax of cosines / tau per patch, bilinear to pixels, Gaussian with sigma 4, maximum.

    The backbone is replaced by chosen tokens; the reference is numpy and scipy.
    """
    model = build(temperature=0.07)
    tokens = torch.randn(2, 64, 192)
    model.backbone.forward = lambda _: Tokens([tokens], [torch.randn(2, 192)], (8, 8))
    atoms = torch.nn.functional.normalize(torch.randn(10, 192), dim=1)
    model.guides[0].set(atoms, torch.arange(10), torch.rand(4, 10))
    result = model.eval()(torch.zeros(2, 3, 128, 128))

    g = model.guides[0].vectors.numpy()
    x = tokens.numpy()
    cosines = x @ g[2:].T / np.linalg.norm(x, axis=2, keepdims=True) / np.linalg.norm(g[2:], axis=1)
    p = np.exp(cosines / 0.07)
    p = (p / p.sum(axis=2, keepdims=True)).reshape(2, 8, 8, 2)
    patch_map = (p[..., 1] + 1 - p[..., 0]) / 2
    pixels = torch.nn.functional.interpolate(torch.from_numpy(patch_map)[:, None], size=(128, 128), mode="bilinear")
    expected = np.stack([gaussian_filter(m, sigma=4, mode="mirror") for m in pixels[:, 0].numpy()])
    np.testing.assert_allclose(result.anomaly_map[:, 0], expected, atol=2e-4)
    np.testing.assert_allclose(result.pred_score, expected.max(axis=(1, 2)), atol=2e-4)


def test_images_of_a_batch_do_not_mix() -> None:
    """The smoothing runs over pixels, not over the batch axis."""
    model = fitted()
    images = torch.randn(3, 3, 64, 64)
    together = model(images)
    for index in range(3):
        alone = model(images[index : index + 1])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index], rtol=1e-4, atol=1e-5)


def test_image_scores() -> None:
    """Maximum, top share, log-mean-exp, the pooled token, and a weighted sum, all in [0, 1]."""
    images = torch.randn(2, 3, 64, 64)
    model = fitted()
    result = model(images)
    pixels = result.anomaly_map.flatten(1)
    torch.testing.assert_close(result.pred_score, pixels.max(dim=1).values)
    model.image_score, model.top_fraction = "top", 0.1
    torch.testing.assert_close(model(images).pred_score, pixels.sort(dim=1).values[:, -410:].mean(dim=1))
    model.image_score = "lse"
    expected = 0.07 * (pixels.double() / 0.07).exp().mean(dim=1).log()
    torch.testing.assert_close(model(images).pred_score, expected.float(), rtol=1e-4, atol=1e-5)
    model.image_score, model.cls_weight = "max", 1.0
    cls = model.guides[0].global_probability(model.backbone(images).pooled[0], 0.07)
    torch.testing.assert_close(model(images).pred_score, cls)
    model.cls_weight = 0.25
    torch.testing.assert_close(model(images).pred_score, 0.75 * pixels.max(dim=1).values + 0.25 * cls)


def test_rarity_is_added_to_the_logits() -> None:
    """Its weight times the rarity of each patch of the tokens that the guides read; without a weight, nothing."""
    model = fitted(layers=[3, 7], sigma=0)
    images = torch.randn(2, 3, 64, 64)
    tokens = model.backbone(images)
    model.own_weight = 8.0
    parts = [
        torch.special.logit(guides.local_probability(x, 0.07)) + 8 * rarity(x, (4, 4))
        for guides, x in zip(model.guides, tokens.patches, strict=True)
    ]
    patch_map = torch.stack([part.sigmoid() for part in parts]).mean(dim=0).view(2, 4, 4)
    expected = model.anomaly_map_generator(patch_map, (64, 64))
    torch.testing.assert_close(model(images).anomaly_map, expected, rtol=1e-4, atol=1e-4)


def test_rounding_stays_in_range() -> None:
    """A map that is 1 (or 0) everywhere stays within [0, 1] to the last bit."""
    model = build()
    for value in (0.0, 1.0):
        anomaly_map = model.anomaly_map_generator(torch.full((1, 28, 28), value), (440, 448))
        assert 0 <= anomaly_map.min() <= anomaly_map.max() <= 1
        assert anomaly_map.mean() == pytest.approx(value, abs=1e-5)


def test_several_layers_are_averaged() -> None:
    """Each layer has its own dictionary and guides; the patch maps are averaged."""
    model = fitted(layers=[3, 7], sigma=0)
    images = torch.randn(1, 3, 64, 64)
    tokens = model.backbone(images)
    parts = [g.local_probability(x, 0.07).view(4, 4) for g, x in zip(model.guides, tokens.patches, strict=True)]
    torch.testing.assert_close(model(images).anomaly_map[0, 0, 8::16, 8::16], sum(parts) / 2, rtol=0.1, atol=0.05)
    assert not torch.equal(model.guides[0].vectors, model.guides[1].vectors)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (50, 70)])
def test_map_has_the_size_of_the_image_and_finds_the_spot(size: tuple[int, int]) -> None:
    """Square or not, multiple of the patch or not; what was learned as anomalous is found at its place."""
    model = fitted(size, settings(sae_epochs=10, guide_epochs=30, ema_warmup=True))
    images = torch.randn(2, 3, *size) * 0.1
    images[0, :, 16:32, 16:48] += 3
    result = model(images)
    assert result.anomaly_map.shape == (2, 1, *size)
    assert result.pred_score[0] > result.pred_score[1]
    y, x = divmod(result.anomaly_map[0, 0].argmax().item(), size[1])
    assert 12 <= y < 36
    assert 12 <= x < 52


def test_memory_is_stated_and_checked() -> None:
    """The need is what is really stored, and too much is refused before it is stored."""
    model = build(layers=[2, 5]).train()
    model(torch.randn(3, 3, 64, 64), torch.zeros(3, 64, 64))
    store = model.store
    stored = [*store.patches[0], *store.patches[1], *store.pooled[0], *store.pooled[1], *store.masks]
    assert sum(tensor.numel() * tensor.element_size() for tensor in stored) == memory_need(model.backbone, 3, (64, 64))
    store.memory_limit = memory_need(model.backbone, 5, (64, 64)) / 2**30
    with pytest.raises(MemoryError, match="6 images of 64x64 need.*memory_limit"):
        model(torch.randn(3, 3, 64, 64), torch.zeros(3, 64, 64))


def test_guides_file_is_zero_shot(tmp_path: Path) -> None:
    """Guides alone, with the same backbone, give the same maps; the file knows backbone, layer and size."""
    model = fitted()
    path = model.save_guides(tmp_path / "guides.safetensors", dataset="drawn")
    other = SPGModel(guides_file=path, pre_trained=False)
    assert other.backbone.name == TINY
    assert other.backbone.layers == [5]
    assert other.backbone.image_size == model.backbone.image_size
    other.backbone.load_state_dict(model.backbone.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(other.eval()(images).anomaly_map, model(images).anomaly_map)


@pytest.mark.parametrize(
    ("recorded", "warned"),
    [("1.0.99", False), (None, False), ("1.1.0", True), ("0.9.16", True), ("2.0.0.dev0", True)],
)
def test_guides_of_another_timm_are_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    recorded: str | None,
    warned: bool,
) -> None:
    """One of another major or minor number, once; old files that do not record it say nothing."""
    model = fitted()
    metadata = {**model.metadata(), "versions": {"timm": recorded}}
    if recorded is None:
        del metadata["versions"]
    path = save_guides(tmp_path / "guides.safetensors", list(model.guides), metadata)
    monkeypatch.setattr(timm, "__version__", "1.0.31")
    SPG(guides_file=path, pre_trained=False)
    messages = [record.message for record in caplog.records if "learned with timm" in record.message]
    assert len(messages) == warned
    assert all(f"'{path}' was learned with timm {recorded}, this is timm 1.0.31" in text for text in messages)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "vit_small_patch16_224"}, "learned with backbone=vit_tiny_patch16_224"),
        ({"backbone": TINY, "layers": [4]}, r"learned with layers=\[5\], this model has layers=\[4\]"),
    ],
)
def test_guides_of_another_backbone_are_refused(tmp_path: Path, arguments: dict, message: str) -> None:
    """The message says whose they are."""
    path = fitted().save_guides(tmp_path / "guides.safetensors")
    with pytest.raises(ValueError, match=message):
        SPGModel(guides_file=path, pre_trained=False, **arguments)


def test_what_cannot_be_learned_from() -> None:
    """No images; none anomalous; none normal; empty masks; no masks; masks of another size."""
    with pytest.raises(ValueError, match="no training images"):
        build().fit()
    for value, kind in ((0, "anomalous"), (1, "normal")):
        model = build().train()
        model(torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), value))
        with pytest.raises(ValueError, match=f"none of the 2 stored ones is {kind}"):
            model.fit()
    model = build().train()
    model(torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="masks of all anomalous images are empty"):
        model.fit()
    with pytest.raises(ValueError, match="there are none"):
        build().train()(torch.randn(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"masks of shape \(2, 16, 32\)"):
        build().train()(torch.randn(2, 3, 32, 32), torch.zeros(2, 16, 32))


def test_inference_without_guides_is_refused() -> None:
    """An untrained model says so instead of returning a constant map."""
    with pytest.raises(RuntimeError, match="no guides yet"):
        build().eval()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_score": "mean"}, "'max', 'top' or 'lse'"),
        ({"cls_weight": 1.5}, "cls_weight=1.5"),
        ({"own_weight": -1.0}, "own_weight=-1.0"),
        ({"own_weight": float("nan")}, "own_weight=nan"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    """Errors name the value."""
    with pytest.raises(ValueError, match=message):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 65}, "k=65"),
        ({"guide_top_k": 65}, "guide_top_k=65"),
        ({"sae_epochs": 0}, "sae_epochs=0"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0"),
        ({"sparsity": -1.0}, r"sparsity=-1\.0"),
        ({"guide_top_k": 3, "dictionary": False}, "dictionary=False has none"),
    ],
)
def test_bad_settings(arguments: dict, message: str) -> None:
    """Errors name the value."""
    with pytest.raises(ValueError, match=message):
        settings(**arguments)
