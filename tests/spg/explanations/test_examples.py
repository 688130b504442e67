# SPDX-License-Identifier: Apache-2.0

"""Training images kept for explanations."""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.files import load_tensors
from anomalib_spg.explanations.examples import Examples, to_picture
from anomalib_spg.guides import Guides

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.2, 0.2]


def image(value: float) -> torch.Tensor:
    """A normalised image of one grey."""
    return ((torch.full((3, 32, 48), value) - torch.tensor(MEAN)[:, None, None]) / 0.2)[None]


def test_pictures_undo_the_normalisation() -> None:
    """Grey stays grey, also from a single channel."""
    assert np.abs(to_picture(image(0.25)[0], MEAN, STD).astype(int) - 64).max() <= 1
    assert to_picture(torch.zeros(1, 4, 4), MEAN, STD).shape == (4, 4, 3)


def test_bounded_and_every_image_has_the_same_chance() -> None:
    """Of 40 images 8 are kept, over many draws each about as often; torch's random state stays as it was."""
    state = torch.get_rng_state()
    counts = np.zeros(40)
    for seed in range(60):
        examples = Examples(limit=8, patch_size=16)
        examples._random = np.random.default_rng(seed)
        for _ in range(10):
            examples.add(torch.zeros(4, 3, 16, 16), MEAN, STD)
        assert len(examples.images) == 8
        counts[list(examples.images)] += 1
    assert torch.equal(torch.get_rng_state(), state)
    assert counts.sum() == 480
    assert counts.min() >= 3
    assert counts.max() <= 25


def test_examples_are_where_atoms_fire_most(tmp_path: Path) -> None:
    """Found by hand: the atom is an axis, and the patch along it wins, one patch per image; a file keeps them."""
    examples = Examples(patch_size=16)
    for number in range(3):
        examples.add(image(number / 4), MEAN, STD)
    guides = Guides(dim=2)
    guides.set(torch.eye(2), torch.tensor([5, 8]), torch.rand(4, 2) + 0.1)
    tokens = [torch.rand(6, 2) + 1 for _ in range(3)]
    tokens[2][4] = torch.tensor([9.0, 0.0])  # most along the first axis
    tokens[0][1] = torch.tensor([50.0, 10.0])  # longer, but less along it
    examples.find(6, guides.atoms, guides.atom_indices, tokens, count=2)
    assert examples.patches[6, 5] == [(2, 4), (0, 1)]
    restored = Examples.load(examples.save(tmp_path / "weights" / "examples.safetensors"))
    assert restored.patches == examples.patches
    assert restored.grid == (2, 3)
    cuts = restored.of(6, 5, window=1)
    assert [cut.shape for cut in cuts] == [(16, 16, 3)] * 2
    assert abs(int(cuts[0][8, 8, 0]) - 128) < 4  # image 2 is half grey
    assert restored.of(6, 99) == []


def test_views_of_an_image_count_once() -> None:
    """Of two views of an image only the one where the atom fires more is an example."""
    examples = Examples(patch_size=16)
    examples.add(torch.zeros(3, 3, 32, 32), MEAN, STD, names=["a.png#0", "a.png#1", "b#c.png#0"])
    guides = Guides(dim=2)
    guides.set(torch.eye(2)[:1], torch.tensor([5]), torch.ones(4, 1))
    examples.find(6, guides.atoms, guides.atom_indices, [torch.tensor([[x, 1.0]]) for x in (2.0, 3.0, 1.0)], count=2)
    assert examples.patches[6, 5] == [(1, 0), (2, 0)]


def test_cuts_stay_inside_and_outline_the_patch() -> None:
    """At the edge the cut moves, and the outline is where the patch is."""
    examples = Examples(patch_size=8)
    examples.add(torch.zeros(1, 3, 64, 64), MEAN, STD)
    cut = examples.crop(0, patch=0, window=3)
    assert cut.shape == (24, 24, 3)
    assert tuple(cut[0, 0]) == (255, 210, 0)
    assert tuple(cut[12, 12]) != (255, 210, 0)
    wide = examples.crop(0, patch=18, window=5, outline=3)  # row 2, column 2 of 8
    assert [tuple(wide[at, at]) == (255, 210, 0) for at in (8, 16, 20, 31)] == [True, False, False, True]
    assert examples.crop(1, patch=0) is None


def test_cuts_have_the_proportions_of_their_image(tmp_path: Path) -> None:
    """What was squeezed to a square is wide or tall again, also from a file and however extreme; the patch with it."""
    examples = Examples(patch_size=8)
    examples.add(torch.zeros(5, 3, 64, 64), MEAN, STD, aspects=[2.0, 0.5, 1.0, 1e-5, 1e5])
    examples = Examples.load(examples.save(tmp_path / "examples.safetensors"))
    cuts = [examples.crop(number, patch=18, window=3) for number in range(5)]
    assert [cut.shape[:2] for cut in cuts[:4]] == [(24, 48), (24, 12), (24, 24), (24, 1)]
    assert cuts[4].shape[1] > 1000
    blue = cuts[0][..., 2] < 40  # as the outline has it, and the grey has not
    assert (np.ptp(np.nonzero(blue)[0]) + 1, np.ptp(np.nonzero(blue)[1]) + 1) == (8, pytest.approx(16, abs=2))


def test_what_is_learned_does_not_depend_on_them() -> None:
    """Guides are bit-identical with and without examples."""
    vectors = []
    for examples in (None, Examples(limit=2, patch_size=16)):
        torch.manual_seed(0)
        model = SPGModel("vit_tiny_patch16_224", layers=[5], pre_trained=False)
        masks = torch.zeros(4, 64, 64)
        masks[:2, :32, :32] = 1
        images = torch.randn(4, 3, 64, 64)
        model.train()(images, masks)
        learned = []
        if examples is not None:
            examples.add(images, MEAN, STD)
            learned = [lambda block, own, patches: examples.find(block, own.atoms, own.atom_indices, patches)]  # noqa: B023
        model.fit(GuideSettings(num_atoms=32, k=4, sae_epochs=2, guide_epochs=2), lambda *_: None, *learned)
        vectors.append(model.guides[0].vectors)
    assert torch.equal(*vectors)
    assert len(examples.images) == 2
    assert {atom for _, atom in examples.patches} == set(model.guides[0].atom_indices.tolist())


def test_a_full_disk_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on."""
    examples = Examples()
    examples.add(image(0.5), MEAN, STD)
    with patch("anomalib_spg.components.files.save_file", side_effect=OSError("No space left on device")):
        assert examples.save(tmp_path / "examples.safetensors") is None
    assert "No space left" in caplog.text


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Messages name the file."""
    with pytest.raises(ValueError, match=r"Cannot read the examples file.*none\.safetensors"):
        Examples.load(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors' holds no example images"):
        Examples.load(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": None}, "it has no grid of patches"),
        ({"grid": torch.tensor([2, 3])}, "it has no grid of patches"),
        ({"grid": torch.tensor([2, 3, 0])}, "it has no grid of patches"),
        ({"grid": torch.tensor([2.0, 3, 16])}, "it has no grid of patches"),
        ({"image.0": torch.tensor([1.0])}, "'image.0' is not what it should be"),
        ({"image.0": torch.tensor([1, 2], dtype=torch.uint8)}, "'image.0' is not"),
        ({"image.first": torch.tensor([1], dtype=torch.uint8)}, "'image.first' is not"),
        ({"atom.6": torch.tensor([[0, 1]])}, "'atom.6' is not"),
        ({"atom.6.5": torch.tensor([0, 1])}, "'atom.6.5' is not"),
        ({"atom.6.5": torch.tensor([[0, 6]])}, "'atom.6.5' is not"),
        ({"guides": torch.zeros(2)}, "'guides' is not"),
    ],
)
def test_damaged_files_are_refused(change: dict[str, torch.Tensor | None], message: str, tmp_path: Path) -> None:
    """Right header, other contents: the message names the file and the tensor."""
    examples = Examples(patch_size=16)
    examples.add(image(0.5), MEAN, STD)
    examples.patches[6, 5] = [(0, 5)]
    tensors, header = load_tensors(examples.save(tmp_path / "whole.safetensors"))
    assert Examples.load(tmp_path / "whole.safetensors").images == examples.images
    tensors = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
    save_file(tensors, tmp_path / "x.safetensors", header)
    with pytest.raises(ValueError, match=rf"examples file '.*x\.safetensors' is damaged: {message}"):
        Examples.load(tmp_path / "x.safetensors")
