# SPDX-License-Identifier: Apache-2.0

"""Guides: the map's formula, learning, and the file."""

import json
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_spg import GuideSettings
from anomalib_spg.components.anomaly_map import to_pixels
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import FILE_FORMAT, FILE_VERSION, Guides, guides_fault, read_guides, save_guides, train_guides
from anomalib_spg.token_store import TokenStore


def learn(epochs: int = 40, free: bool = False, batch_size: int = 8, **settings) -> tuple[Guides, torch.Tensor]:
    """Learn on a world where one direction means anomalous."""
    torch.manual_seed(0)
    dictionary = torch.eye(8)
    masks = [torch.zeros(4, 4) for _ in range(16)]
    patches, pooled = [], []
    for index, mask in enumerate(masks):
        patch = torch.zeros(2, 2, 8)
        patch[..., 0] = 1
        patch += 0.1 * torch.rand_like(patch)
        if index % 2:
            mask[:2, 2:] = 1
            patch[0, 1, 3] += 2
        patches.append(patch.view(4, 8))
        pooled.append(patch.view(4, 8).mean(dim=0))
    guides, store = Guides(8), TokenStore()
    labels = [bool(mask.any()) for mask in masks]
    store.add(Tokens([torch.stack(patches)], [torch.stack(pooled)], (2, 2)), torch.stack(masks), labels)
    alive = torch.ones(8, dtype=torch.bool)
    alive[7] = False
    atoms, usable = (None, None) if free else (dictionary, alive)
    chosen = GuideSettings(num_atoms=8, k=8, guide_epochs=epochs, **settings)
    train_guides(guides, atoms, usable, store, 0, 2, chosen, batch_size=batch_size)
    return guides, torch.stack(patches)


def test_local_probability_is_the_published_map() -> None:
    """softmax([cos_n, cos_a] / tau), map (p_a + 1 - p_n) / 2."""
    guides = Guides(5)
    atoms = torch.nn.functional.normalize(torch.randn(6, 5), dim=1)
    coefficients = torch.rand(4, 6)
    guides.set(atoms, torch.arange(6), coefficients)
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    g = coefficients.numpy() @ atoms.numpy()

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return a @ b / np.linalg.norm(a, axis=1) / np.linalg.norm(b)

    for function, normal, anomaly in ((guides.local_probability, 2, 3), (guides.global_probability, 0, 1)):
        logits = np.stack([cosine(x, g[normal]), cosine(x, g[anomaly])], axis=1) / 0.07
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(function(torch.from_numpy(x), 0.07), (p[:, 1] + 1 - p[:, 0]) / 2, rtol=1e-4)


def test_set_keeps_only_atoms_in_use() -> None:
    """Negative coefficients count as zero; the vectors are the sums."""
    guides = Guides(2)
    coefficients = torch.tensor([[1.0, -1, 0], [0, -2, 0], [0, 0, 0], [2, 0, 0]])
    guides.set(torch.tensor([[1.0, 0], [0, 1], [0.6, 0.8]]), torch.tensor([4, 7, 9]), coefficients)
    assert guides.atom_indices.tolist() == [4]
    assert guides.vectors.tolist() == [[1, 0], [0, 0], [0, 0], [2, 0]]


@pytest.mark.parametrize("grid", [(2, 3), (1, 1)])
def test_to_pixels_is_aligned(grid: tuple[int, int]) -> None:
    """A patch's value sits at the patch's centre; padding is cut off."""
    patch_map = torch.arange(grid[0] * grid[1], dtype=torch.float32).view(1, *grid)
    pixels = to_pixels(patch_map, 5, (grid[0] * 5 - 2, grid[1] * 5 - 1))
    assert pixels.shape == (1, grid[0] * 5 - 2, grid[1] * 5 - 1)
    torch.testing.assert_close(pixels[0, 2::5, 2::5], patch_map[0])


def test_to_pixels_is_bilinear_upsampling() -> None:
    """Values and gradients are those of torch's own upsampling."""
    patch_map = torch.rand(2, 5, 7, requires_grad=True)
    weights = torch.rand(2, 66, 95)
    expected = F.interpolate(patch_map[:, None], scale_factor=14, mode="bilinear", align_corners=False)[:, 0, :66, :95]
    pixels = to_pixels(patch_map, 14, (66, 95))
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=1e-6)
    gradients = [torch.autograd.grad((pixels * weights).sum(), patch_map)[0] for pixels in (pixels, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("arguments", [{"ema_warmup": True}, {"ema_decay": 0.0}])
def test_free_vectors_are_a_control(arguments: dict, tmp_path: Path) -> None:
    """Without a dictionary the guides are any vectors; they find the direction too, and travel in the same file."""
    guides, patches = learn(free=True, epochs=80, **arguments)
    probability = guides.local_probability(patches, 0.07)
    assert probability[1::2, 1].min() > 0.9
    assert probability[::2].max() < 0.2
    assert (guides.vectors < 0).any(), "free, so not a sum of atoms with non-negative coefficients"
    assert (guides.coefficients > 0).sum() == 4
    tensors, _ = read_guides(save_guides(tmp_path / "guides.safetensors", [guides], {}))
    torch.testing.assert_close(tensors["0.vectors"], guides.vectors)


@pytest.mark.parametrize("arguments", [{"ema_warmup": True}, {"ema_decay": 0.0}])
def test_learning_finds_the_anomalous_direction(arguments: dict) -> None:
    """Patches with the anomalous direction score high, the others low; a dead atom is never used."""
    guides, patches = learn(**arguments)
    probability = guides.local_probability(patches, 0.07)
    assert probability[1::2, 1].min() > 0.9
    assert probability[::2].max() < 0.2
    assert 7 not in guides.atom_indices
    assert (guides.coefficients >= 0).all()
    assert guides.global_probability(patches[1].mean(dim=0), 0.07) > guides.global_probability(
        patches[0].mean(dim=0), 0.07
    )


def test_published_average_starts_as_a_copy_of_the_first_step() -> None:
    """With decay d, after t steps the first copy still weighs d^(t-1): on small data the guides hardly move."""
    slow, _ = learn(epochs=5)
    fast, _ = learn(epochs=5, ema_warmup=True)
    assert (slow.coefficients - 0.1).abs().mean() < 0.3 * (fast.coefficients - 0.1).abs().mean()


def test_average_follows_its_formula() -> None:
    """One epoch of two steps: ema = d * first + (1 - d) * second, seen through a run with and without averaging."""
    first, _ = learn(epochs=1, batch_size=16, ema_decay=0.0)
    last, _ = learn(epochs=2, batch_size=16, ema_decay=0.0)
    averaged, _ = learn(epochs=2, batch_size=16, ema_decay=0.25)
    torch.testing.assert_close(averaged.coefficients, 0.25 * first.coefficients + 0.75 * last.coefficients)


def test_top_k_keeps_exactly_k() -> None:
    """The truncated guides use k atoms each and still learn."""
    guides, patches = learn(guide_top_k=2, ema_decay=0.0)
    assert (guides.coefficients > 0).sum(dim=1).max() <= 2
    assert guides.local_probability(patches, 0.07)[1::2, 1].min() > 0.9


def test_impossible_requests() -> None:
    """top_k above the living atoms, and no living atom at all."""
    with pytest.raises(ValueError, match="guide_top_k=8.*7 atoms"):
        learn(guide_top_k=8)
    store = TokenStore()
    store.add(Tokens([torch.zeros(1, 1, 2)], [torch.zeros(1, 2)], (1, 1)), torch.zeros(1, 1, 1), [False])
    with pytest.raises(ValueError, match="sae_epochs"):
        train_guides(Guides(2), torch.eye(2), torch.zeros(2, dtype=torch.bool), store, 0, 1, GuideSettings())


def test_file_round_trip(tmp_path: Path) -> None:
    """Tensors and metadata come back as they were."""
    guides, _ = learn(epochs=1)
    path = save_guides(tmp_path / "new" / "guides.safetensors", [guides], {"layers": [3], "temperature": 0.07})
    tensors, metadata = read_guides(path)
    assert metadata == {"layers": [3], "temperature": 0.07}
    for name, tensor in guides.named_buffers():
        assert torch.equal(tensors[f"0.{name}"], tensor)
    assert list(path.parent.iterdir()) == [path]


def test_full_disk_leaves_the_old_file_and_no_rest(tmp_path: Path) -> None:
    """A write that fails half-way keeps what was there and names the path."""
    path = tmp_path / "guides.safetensors"
    path.write_bytes(b"old")

    def fail(tensors: dict, path: Path, header: dict) -> None:
        del tensors, header
        path.write_bytes(b"half a fil")
        raise OSError(28, "No space left on device")

    with (
        patch("anomalib_spg.components.files.save_file", fail),
        pytest.raises(OSError, match=r"guides\.safetensors.*No space left"),
    ):
        save_guides(path, [Guides(2)], {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """Missing, unreadable, not guides, and a newer format: each message names the file."""
    with pytest.raises(ValueError, match=r"none\.safetensors"):
        read_guides(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ValueError, match=r"Cannot read.*text\.safetensors"):
        read_guides(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"holds no SPG guides\. Pass model weights as weights=, not guides_file="):
        read_guides(tmp_path / "weights.safetensors")
    header = {"format": "anomalib_spg.guides", "version": "9", "layers": json.dumps([1])}
    save_file({"a": torch.zeros(1)}, tmp_path / "new.safetensors", metadata=header)
    with pytest.raises(ValueError, match="format 9"):
        read_guides(tmp_path / "new.safetensors")


@pytest.mark.parametrize("name", ["half.safetensors", "header.safetensors", "lake.ckpt", "", ".", "none/"])
def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Cut off, no safetensors, no file at all: the name, and what file is wanted."""
    monkeypatch.chdir(tmp_path)
    whole = save_guides(tmp_path / "whole.safetensors", [learned_guides()], {}).read_bytes()
    Path("half.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("header.safetensors").write_bytes(whole[:20])
    torch.save({"state_dict": {}}, "lake.ckpt")
    with pytest.raises(ValueError, match="Cannot read the guides file") as caught:
        read_guides(name)
    assert f"'{name}'" in str(caught.value)
    assert "that training SPG leaves" in str(caught.value)


def learned_guides() -> Guides:
    """Guides as after learning."""
    guides = Guides(3)
    guides.set(torch.eye(3)[:2], torch.tensor([4, 7]), torch.tensor([[1.0, 0], [0, 2], [1, 1], [0.5, 0]]))
    return guides


GOOD = {"layers": "[3]", "image_size": "[64, 64]", "temperature": "0.07", "backbone": '"vit"', "settings": "{}"}
NAN = torch.full((4, 3), float("nan"))
OWN = learned_guides()
ONE_PATCH = torch.tensor([[1.0, 0], [0, 2], [0, 0], [0, 1]])  # a guide may have lost its atoms
NO_PATCH = torch.tensor([[1.0, 0], [0, 2], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    ("tensors", "header", "message"),
    [
        ({}, {}, None),
        ({"0.vectors": None}, {}, "its tensors are"),
        ({"0.more": torch.zeros(1)}, {}, "its tensors are"),
        ({"0.atoms": torch.zeros(2, 4)}, {}, "do not fit together"),
        ({"0.coefficients": torch.ones(4, 3)}, {}, "do not fit together"),
        ({"0.vectors": torch.ones(3)}, {}, "do not fit together"),
        ({"0.atom_indices": torch.tensor(1)}, {}, "do not fit together"),
        ({"0.atom_indices": torch.tensor([1.0, 2.0])}, {}, "wrong type"),
        ({"0.vectors": torch.ones(4, 3, dtype=torch.long)}, {}, "wrong type"),
        ({"0.vectors": NAN}, {}, "not finite"),
        ({"0.atoms": NAN[:2]}, {}, "not finite"),
        ({"0.coefficients": -torch.ones(4, 2)}, {}, "negative coefficients"),
        ({"0.vectors": torch.ones(4, 3)}, {}, "not the sums of their atoms"),
        ({"0.atoms": torch.zeros(2, 0), "0.vectors": torch.zeros(4, 0)}, {}, "the vectors have no width"),
        ({"0.atoms": torch.zeros(2, 3), "0.vectors": torch.zeros(4, 3)}, {}, "atoms that have not length 1"),
        ({"0.atoms": 2 * torch.eye(3)[:2], "0.vectors": 2 * OWN.vectors}, {}, "atoms that have not length 1"),
        ({"0.coefficients": ONE_PATCH, "0.vectors": ONE_PATCH @ OWN.atoms}, {}, None),
        ({"0.coefficients": NO_PATCH, "0.vectors": NO_PATCH @ OWN.atoms}, {}, "both guides of the patches are zero"),
        ({}, {"layers": "[3"}, "no JSON"),
        ({}, {"layers": "3"}, "layers=3"),
        ({}, {"layers": "[3, 5]"}, r"layers=\[3, 5\]"),
        ({}, {"layers": "[true]"}, r"layers=\[True\]"),
        ({}, {"image_size": "[64]"}, r"image_size=\[64\]"),
        ({}, {"image_size": "[64, 0]"}, r"image_size=\[64, 0\]"),
        ({}, {"image_size": "[64, 64.5]"}, "image_size="),
        ({}, {"temperature": "0"}, "temperature=0"),
        ({}, {"temperature": "NaN"}, "temperature=nan"),
        ({}, {"temperature": '"warm"'}, "temperature='warm'"),
        ({}, {"backbone": "3"}, "backbone=3"),
        ({}, {"settings": "[]"}, r"settings=\[\]"),
        ({}, {"versions": '["1.0"]'}, r"versions=\['1.0'\]"),
        ({}, {"versions": '{"timm": 1.0}'}, r"versions=\{'timm': 1.0\}"),
        ({}, {"version": None}, "guides format None"),
    ],
)
def test_files_that_contradict_themselves(tmp_path: Path, tensors: dict, header: dict, message: str | None) -> None:
    """Whatever was changed is named, with the file."""
    own = {f"0.{name}": tensor for name, tensor in learned_guides().named_buffers()}
    tensors = {name: value for name, value in {**own, **tensors}.items() if value is not None}
    whole = {"format": FILE_FORMAT, "version": FILE_VERSION, **GOOD, **header}
    save_file(tensors, tmp_path / "g.safetensors", {name: text for name, text in whole.items() if text is not None})
    if message is None:
        assert read_guides(tmp_path / "g.safetensors")[1]["layers"] == [3]
        return
    with pytest.raises(ValueError, match=message) as caught:
        read_guides(tmp_path / "g.safetensors")
    assert str(tmp_path / "g.safetensors") in str(caught.value)


def test_guides_without_atoms_are_no_guides(tmp_path: Path) -> None:
    """What was never learned cannot be used elsewhere."""
    with pytest.raises(ValueError, match="holds no atoms"):
        read_guides(save_guides(tmp_path / "g.safetensors", [Guides(3)], {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("free", [True, False])
def test_what_training_writes_is_in_order(free: bool, dtype: torch.dtype) -> None:
    """Atoms of a dictionary and free vectors, in half precision, too."""
    guides, _ = learn(epochs=1, free=free)
    assert guides_fault({f"0.{name}": tensor for name, tensor in guides.to(dtype).named_buffers()}) is None


def test_too_much_sparsity(caplog: pytest.LogCaptureFixture) -> None:
    """Guides that lost all their atoms are refused, one that did is named."""
    with pytest.raises(ValueError, match=r"no atom left.*sparsity=1000"):
        learn(sparsity=1000.0, ema_decay=0.0)
    start = torch.tensor([[-50.0], [0.0], [0.0], [0.0]]).expand(4, 7)  # the first guide has lost them before it starts
    with patch("anomalib_spg.guides.torch.randn", return_value=start):
        learn(epochs=1)
    assert "global_normal without any atom. Lower sparsity=0.001" in caplog.text
