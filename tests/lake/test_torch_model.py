# SPDX-License-Identifier: Apache-2.0

"""LAKE's formulas, recomputed by hand, and its errors."""

from pathlib import Path

import pytest
import torch
from anomalib.data import InferenceBatch
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import LAKEModel
from anomalib_lake import torch_model as module
from anomalib_lake.text import embed_prompts, prompts, read_checkpoint, text_tower
from tests.helpers import TINY, TINY_CLIP

TINY_MODEL = LAKEModel(TINY, layers=[2, 3], pre_trained=False)
PAPER = {"own_weight": 0, "top_patches": 1, "num_shifts": 1}  # the bank alone, and the maximum


def fitted(images: torch.Tensor, *names: str, **arguments: object) -> LAKEModel:
    """A model fitted on images."""
    model = LAKEModel(names[0] if names else TINY, **{"pre_trained": False, "num_neurons": 20, **arguments})
    model.train()(images)
    model.fit()
    return model.eval()


def deviation_by_hand(model: LAKEModel, normal: torch.Tensor, images: torch.Tensor, layer: int) -> torch.Tensor:
    """Distances over the usual distance, with numpy-like steps and torch.cdist."""
    with torch.no_grad():
        kwargs = {"indices": [layer], "norm": False, "intermediates_only": True, "output_fmt": "NLC"}
        train = model.backbone.vit.forward_intermediates(normal, **kwargs)[0]
        test = model.backbone.vit.forward_intermediates(images, **kwargs)[0]
    channels = train.flatten(0, 1).var(dim=0).topk(20).indices
    train, test = (F.normalize(tokens[..., channels], dim=-1).double() for tokens in (train, test))
    distance = torch.cdist(test.flatten(0, 1), train.flatten(0, 1)).amin(dim=1).view(test.shape[:2])
    usual = torch.cat([torch.cdist(train[i], train[1 - i]).amin(dim=1) for i in (0, 1)]).quantile(0.99)
    return distance / usual


def test_structural_deviation() -> None:
    """Two layers averaged, d / (1 + d), score the maximum over patches, map upsampled and smoothed."""
    normal, images = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 64, 64)
    model = fitted(normal, layers=[3, 5], scales=[1], sigma=0, **PAPER)
    deviation = sum(deviation_by_hand(model, normal, images, layer) for layer in (3, 5)) / 2
    expected = deviation / (1 + deviation)
    batch = model(images)
    assert isinstance(batch, InferenceBatch)
    torch.testing.assert_close(batch.pred_score.double(), expected.amax(dim=1), rtol=1e-4, atol=1e-4)
    upsampled = F.interpolate(expected.view(3, 1, 4, 4), size=64, mode="bilinear", align_corners=False)
    torch.testing.assert_close(batch.anomaly_map.double(), upsampled, rtol=1e-4, atol=1e-4)


def test_scales() -> None:
    """Windows of 3 by 3 patches, compared with every second window; the larger deviation of the scales counts."""
    normal, images = torch.randn(2, 3, 80, 64), torch.randn(2, 3, 80, 64)
    model = fitted(normal, layers=[3], scales=[1, 3], **PAPER)
    with torch.no_grad():
        train, test = model.tokens(normal)[0][3], model.tokens(images)[0][3]

    def windows(tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens[..., model.neurons[0].indices].view(2, 5, 4, 20)
        rows = []
        for row in range(5):
            for column in range(4):
                window = tokens[:, max(0, row - 1) : row + 2, max(0, column - 1) : column + 2]
                rows.append(F.normalize(window.mean(dim=(1, 2)), dim=-1))
        return torch.stack(rows, dim=1).double()

    kept = [row * 4 + column for row in (0, 2, 4) for column in (0, 2)]
    queries, bank = windows(test), windows(train)[:, kept]
    usual = torch.cat([torch.cdist(windows(train)[i], bank[1 - i]).amin(dim=1) for i in (0, 1)]).quantile(0.99)
    coarse = torch.cdist(queries.flatten(0, 1), bank.flatten(0, 1)).amin(dim=1).view(2, 20) / usual
    deviation = torch.maximum(coarse, deviation_by_hand(model, normal, images, 3))
    expected = (deviation / (1 + deviation)).amax(dim=1)
    torch.testing.assert_close(model(images).pred_score.double(), expected, rtol=1e-4, atol=1e-4)
    assert model.banks[0][1].patch_indices.tolist() == kept * 2


def own_by_hand(tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Distance of each patch ``(B, N, K)`` to the nearest one more than a fifth of the image away."""
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    result = torch.zeros(tokens.shape[:2], dtype=tokens.dtype)
    for image, patches in enumerate(tokens):
        for patch, token in enumerate(patches):
            far = ((rows - rows[patch]).abs() / grid[0] > 0.2) | ((columns - columns[patch]).abs() / grid[1] > 0.2)
            result[image, patch] = (patches[far] - token).norm(dim=1).min()
    return result


def test_own_image_and_top_patches() -> None:
    """By default 0.7 of the deviation from the bank, 0.3 of that from the own image; the mean of three patches."""
    normal, images = torch.randn(2, 3, 128, 96), torch.randn(3, 3, 128, 96)
    model = fitted(normal, layers=[3], scales=[1], num_shifts=1)
    channels = model.neurons[0].indices
    with torch.no_grad():
        train, test = (
            F.normalize(model.tokens(batch)[0][3][..., channels], dim=-1).double() for batch in (normal, images)
        )
    grid = (8, 6)
    usual = own_by_hand(train, grid).quantile(0.99).maximum(model.banks[0][0].distance_scale)
    deviation = 0.7 * deviation_by_hand(model, normal, images, 3) + 0.3 * own_by_hand(test, grid) / usual
    expected = (deviation / (1 + deviation)).sort(dim=1).values[:, -3:].mean(dim=1)
    torch.testing.assert_close(model(images).pred_score.double(), expected, rtol=1e-4, atol=1e-4)


def test_scores_of_the_normal_images() -> None:
    """One image against the other, corrected for the smaller bank; its own part needs no correction."""
    normal = torch.randn(2, 3, 128, 96)
    model = LAKEModel(TINY, pre_trained=False, num_neurons=20, layers=[3], scales=[1], num_shifts=1)
    model.train()(normal)
    result = model.fit()
    with torch.no_grad():
        tokens = F.normalize(model.tokens(normal)[0][3][..., model.neurons[0].indices], dim=-1).double()
    bank = torch.stack([torch.cdist(tokens[i], tokens[1 - i]).amin(dim=1) for i in (0, 1)])
    own = own_by_hand(tokens, (8, 6))
    usual = bank.quantile(0.99)
    deviation = 0.7 * bank / usual * 0.5**0.09 + 0.3 * own / own.quantile(0.99).maximum(usual)
    expected = (deviation / (1 + deviation)).topk(3, dim=1).values.mean(dim=1)
    torch.testing.assert_close(result.pred_score.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_fusion_with_text(clip_file: Path) -> None:
    """0.7 structural and 0.3 semantic, the latter from the last block, projected, against the two embeddings."""
    normal, images = torch.randn(2, 3, 64, 64), torch.randn(3, 3, 64, 64)
    model = LAKEModel(TINY_CLIP, layers=[3], scales=[1], weights=clip_file, num_neurons=20, sigma=0, **PAPER)
    model.train()(normal)
    model.fit("bottle")
    model.eval()
    state, _ = read_checkpoint(TINY_CLIP, clip_file)
    text = embed_prompts(text_tower(state, quick_gelu=False), *prompts("bottle"))
    torch.testing.assert_close(model.text_embeddings, text)
    with torch.no_grad():
        tokens = model.backbone.vit.forward_features(images)[:, 1:]
    cosine = F.normalize(tokens @ state["visual.proj"], dim=-1) @ text.T
    semantic = torch.sigmoid((cosine[..., 1] - cosine[..., 0]) / 0.07)
    deviation = deviation_by_hand(model, normal, images, 3)
    expected = 0.7 * deviation / (1 + deviation) + 0.3 * semantic
    torch.testing.assert_close(model(images).pred_score.double(), expected.amax(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_own_prompts_and_class_name_change_the_embeddings(clip_file: Path) -> None:
    """Whatever is said reaches the tower."""

    def embeddings(name: str, **arguments: object) -> torch.Tensor:
        model = LAKEModel(TINY_CLIP, weights=clip_file, num_neurons=20, **arguments)
        model.train()(torch.randn(2, 3, 32, 32))
        model.fit(name)
        return model.text_embeddings

    nut = embeddings("nut")
    assert not torch.allclose(nut, embeddings("bottle"), atol=1e-3)
    own = {"normal_prompts": ["fine"], "anomalous_prompts": ["broken"]}
    torch.testing.assert_close(embeddings("nut", **own), embeddings("bottle", **own))


def test_without_text_there_is_one_tower_that_stops_early(clip_file: Path) -> None:
    """text_weight=0 needs no text tower and does not run the deep blocks; a timm file then suffices."""
    model = LAKEModel(TINY_CLIP, layers=[3], text_weight=0, pre_trained=False, num_neurons=20)
    assert model.backbone.layers == [3]
    assert model.text_embeddings.numel() == 0
    ran = []
    model.backbone.vit.blocks[4].register_forward_hook(lambda *_: ran.append(4))
    model.train()(torch.randn(2, 3, 32, 32))
    model.fit()
    model.eval()(torch.randn(1, 3, 32, 32))
    assert not ran
    both = LAKEModel(TINY_CLIP, layers=[3], text_weight=0, weights=clip_file, num_neurons=20)
    both.train()(torch.randn(2, 3, 32, 32))
    assert both.backbone.has_weights


def test_text_tower_is_not_kept(clip_file: Path) -> None:
    """After fitting there are two vectors, and no parameter or buffer of the text tower."""
    model = LAKEModel(TINY_CLIP, weights=clip_file, num_neurons=20)
    model.train()(torch.randn(2, 3, 32, 32))
    model.fit()
    assert model._checkpoint is None
    assert not any("token_embedding" in key for key in model.state_dict())
    assert not any(49408 in value.shape for value in model.state_dict().values())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_scores_stay_inside_and_do_not_saturate(value: float) -> None:
    """Far-off images get scores below 1, and farther is never lower."""
    model = fitted(torch.randn(2, 3, 64, 64), layers=[2])
    scores = model(torch.full((1, 3, 64, 64), value) * 50 + torch.randn(1, 3, 64, 64)).pred_score
    assert (scores < 1).all()
    assert (scores > 0).all()


def test_score_is_taken_before_smoothing() -> None:
    """Smoothing changes the map, not the score."""
    normal, images = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64)
    sharp = fitted(normal, layers=[2], sigma=0)
    smooth = LAKEModel(TINY, pre_trained=False, num_neurons=20, layers=[2], sigma=8)
    smooth.load_state_dict({**smooth.state_dict(), **sharp.state_dict()})
    smooth.eval()
    torch.testing.assert_close(smooth(images).pred_score, sharp(images).pred_score)
    assert smooth(images).anomaly_map.std() < sharp(images).anomaly_map.std()


def test_random_selection_follows_the_seed() -> None:
    """The seed of the process, not the generator's state."""
    images = torch.randn(2, 3, 64, 64)

    def chosen(seed: int, waste: int) -> list[int]:
        torch.manual_seed(seed)
        torch.randn(waste)
        return fitted(images, layers=[2], selection="random").neurons[0].indices.tolist()

    assert chosen(5, 0) == chosen(5, 100)
    assert chosen(5, 0) != chosen(6, 0)


@pytest.mark.parametrize("size", [(64, 96), (70, 90)])
def test_any_size(size: tuple[int, int]) -> None:
    """Rectangles, and sides that are no multiple of the patch; grey images too."""
    model = fitted(torch.randn(2, 3, *size), layers=[2])
    assert model(torch.randn(1, 1, *size)).anomaly_map.shape == (1, 1, *size)


def test_one_normal_image_works() -> None:
    """No other image to leave out."""
    model = fitted(torch.randn(1, 3, 64, 64), layers=[2])
    assert 0 < model(torch.randn(1, 3, 64, 64)).pred_score < 1


@pytest.mark.parametrize("selection", ["variance", "pca"])
@pytest.mark.parametrize("count", [1, 4])
def test_normal_images_of_a_single_colour(count: int, selection: str) -> None:
    """Learned from as far as they differ, be it by the place alone; every number is finite."""
    model = LAKEModel(TINY, pre_trained=False, num_neurons=20, selection=selection).train()
    model(torch.randn(count, 3, 1, 1).expand(-1, -1, 64, 64))
    result = model.fit()
    assert all(tensor.isfinite().all() for tensor in (*model.state_dict().values(), *result) if tensor is not None)
    scores = model.eval()(torch.randn(2, 3, 64, 64)).pred_score
    assert scores.isfinite().all()


@pytest.mark.parametrize("selection", ["variance", "pca"])
def test_one_colour_for_all_is_nothing_to_learn_from(selection: str) -> None:
    """Where the backbone does not know the place either, all tokens are equal but for rounding."""
    model = LAKEModel(TINY, pre_trained=False, num_neurons=20, selection=selection).train()
    torch.nn.init.zeros_(model.backbone.vit.pos_embed)
    model(torch.ones(2, 3, 1, 1).expand(-1, -1, 64, 64))
    with pytest.raises(ValueError, match="do not vary"):
        model.fit()


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> int:
    """Images that decide the neurons."""
    monkeypatch.setattr(module, "SAMPLE", 10)
    return 10


@pytest.mark.parametrize("batches", [[14], [1] * 14, [9, 2, 3], [10, 4]])
def test_batches_do_not_matter(batches: list[int], small_sample: int) -> None:
    """However the images come, the model is the same; so it is when it learns them again."""
    images = torch.randn(14, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    tokens, grid = TINY_MODEL.tokens(images)
    model = LAKEModel(TINY, layers=[2, 3], pre_trained=False, num_neurons=20, bank_size=40, num_shifts=1)
    states = []
    for parts in (batches, [5, 9]):
        for part in zip(*(stored.split(parts) for stored in tokens.values()), strict=True):
            model.store(dict(zip(tokens, part, strict=True)), grid, (64, 64))
        model.fit()
        states.append({name: value.clone() for name, value in model.state_dict().items() if "backbone" not in name})
    assert states[0]["banks.0.0.tokens"].shape == (40, 20)
    assert states[0]["banks.0.1.tokens"].shape == (20, 20)
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=0, atol=0)
    variances = tokens[3][:small_sample].flatten(0, 1).var(dim=0)
    assert model.neurons[1].indices.tolist() == variances.argsort(descending=True)[:20].tolist()


def test_memory_does_not_grow(small_sample: int) -> None:
    """What is held between two images, and at most what was said."""
    model = LAKEModel(TINY, layers=[2, 3], pre_trained=False, num_neurons=20, bank_size=40, num_shifts=1)
    held = []
    for _ in range(40):
        model.store({layer: torch.randn(1, 16, 192) for layer in (2, 3)}, (4, 4), (64, 64))
        tensors = [tensor for stored in model._stored for tensor in stored] + model._projected
        tensors += [rows[0] for bank in model._all_banks() for rows in bank._added]
        held.append(4 * sum(tensor.numel() for tensor in tensors))
    assert held[small_sample - 1] == max(held) == small_sample * 2 * 16 * 192 * 4
    assert max(held[small_sample:]) <= 2 * 4 * (small_sample * 16 + 80 + 40) * 20
    sized = LAKEModel(TINY, layers=[2, 3], pre_trained=False, num_neurons=20, bank_size=40, image_size=(64, 64))
    assert max(held) < sized.memory_need(40) == sized.memory_need(4000)
    unbounded = LAKEModel(TINY, layers=[2, 3], pre_trained=False, num_neurons=20, bank_size=None)
    assert unbounded.memory_need(4000) > 10 * unbounded.memory_need(40)


@pytest.mark.parametrize("images", [1, 11])
def test_interrupted_fit(images: int) -> None:
    """The names of the images are new, the banks would be old: there are none, and it is said."""
    model = fitted(torch.randn(2, 3, 64, 64), layers=[2]).train()
    model(torch.randn(images, 3, 64, 64))
    with pytest.raises(RuntimeError, match="no normality bank yet"):
        model.eval()(torch.randn(1, 3, 64, 64))


def test_sizes_that_differ() -> None:
    """Normal images of two sizes cannot share a bank."""
    model = LAKEModel(TINY, pre_trained=False, num_neurons=20).train()
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="must have one size"):
        model(torch.randn(1, 3, 64, 32))


def test_order_of_steps() -> None:
    """Fitting without images and predicting without a bank say what is missing."""
    model = LAKEModel(TINY, pre_trained=False)
    with pytest.raises(ValueError, match="no normal images"):
        model.fit()
    with pytest.raises(RuntimeError, match="no normality bank yet"):
        model.eval()(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_neurons": 193}, "num_neurons=193 exceeds the 192 channels"),
        ({"layers": [12]}, r"blocks 0 to 11.*\[12\]"),
        ({"layers": []}, "layers=.. is empty"),
        ({"text_weight": 0.3}, "needs a CLIP backbone, and 'vit_tiny_patch16_224' has no text tower"),
        ({"text_weight": 1.5}, r"text_weight=1\.5 must lie in \[0, 1\]"),
        ({"scales": []}, r"scales=\[\] must be odd"),
        ({"scales": [1, 2]}, r"scales=\[1, 2\] must be odd"),
        ({"temperature": 0}, "temperature=0 must be a positive"),
        ({"bank_size": 0}, "bank_size=0"),
        ({"num_neighbors": 0}, "num_neighbors=0 must be at least 1"),
        ({"own_weight": -0.1}, r"own_weight=-0\.1 must lie in \[0, 1\]"),
        ({"top_patches": 0}, "top_patches=0 must be at least 1"),
        ({"backbone": TINY_CLIP, "normal_prompts": []}, "normal_prompts"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    """Named before anything is computed."""
    with pytest.raises(ValueError, match=message):
        LAKEModel(**{"backbone": TINY, "pre_trained": False, **arguments})


@pytest.mark.slow
def test_defaults() -> None:
    """Text goes by itself with CLIP and without it elsewhere; layers by depth."""
    assert LAKEModel(TINY_CLIP).text_weight == pytest.approx(0.3)
    assert LAKEModel(TINY).text_weight == 0
    assert LAKEModel(TINY).layers == [4, 7]
    large = LAKEModel()
    assert large.layers == [9, 15]
    assert large.semantic_layer == 23
    assert (large.backbone.name, large.text_weight) == ("vit_large_patch14_clip_quickgelu_336.openai", 0.3)


@pytest.mark.parametrize("before", [0, 12])
def test_tokens_that_are_not_finite(before: int, small_sample: int) -> None:
    """An image that gives such is named, also where a full bank would have dropped it in silence."""
    model = LAKEModel(TINY, layers=[2], pre_trained=False, num_neurons=20, bank_size=40).train()
    assert before == 0 or before > small_sample
    for image in torch.randn(before, 1, 3, 64, 64):
        model(image)
    images = torch.randn(3, 3, 64, 64)
    images[1, 0, 5, 5] = float("nan")
    with pytest.raises(ValueError, match=rf"number {before + 2}\) are not finite"):
        model(images)


def test_a_fit_that_failed_can_be_repeated() -> None:
    """Images that do not vary leave nothing behind: others are learned from as if they were the first."""
    images = torch.randn(3, 3, 64, 64)
    model = LAKEModel(TINY, layers=[2], pre_trained=False, num_neurons=20).train()
    model(torch.zeros(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"(do not vary|copies of each other)"):
        model.fit()
    assert model.num_stored == 0
    model(images)
    model.fit()
    other = LAKEModel(TINY, layers=[2], pre_trained=False, num_neurons=20)
    other.backbone.load_state_dict(model.backbone.state_dict())
    other.train()(images)
    other.fit()
    assert torch.equal(model.banks[0][0].tokens, other.banks[0][0].tokens)


def test_text_of_other_weights(clip_file: Path) -> None:
    """A second fit reads the text side alone, and refuses that of another checkpoint: the bank would be of neither."""
    model = LAKEModel(TINY_CLIP, layers=[3], scales=[1], weights=clip_file, num_neurons=20).train()
    for _ in range(2):
        before = model.backbone.fingerprint()
        model(torch.randn(2, 3, 64, 64))
        model.fit()
        assert model.backbone.fingerprint() == before
    with torch.no_grad():
        next(model.backbone.vit.parameters()).add_(1)
    before = model.backbone.fingerprint()
    model(torch.randn(2, 3, 64, 64))
    with pytest.raises(ValueError, match="weights are not those of .*weights=<file>"):
        model.fit()
    assert model.backbone.fingerprint() == before
