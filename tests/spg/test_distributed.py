# SPDX-License-Identifier: Apache-2.0

"""Training in two processes gives what one process gives."""

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from anomalib_spg import GuideSettings
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import Guides, train_guides
from anomalib_spg.sae import TopKSAE, train_sae
from anomalib_spg.token_store import TokenStore

IMAGES, PATCHES, DIM, ATOMS = 8, 16, 12, 600


def learn(numbers: range) -> dict[str, torch.Tensor]:
    """Train both stages on some of the images, the whole set being one batch, so that the order does not matter."""
    torch.manual_seed(0)
    patches = list(torch.randn(IMAGES, PATCHES, DIM))
    masks = list(torch.zeros(IMAGES, 16, 16))
    for image in range(0, IMAGES, 3):  # so that processes hold different numbers of anomalous images
        masks[image][:4, :4] = 1
        patches[image][0, 0] += 3
    patches, masks = [patches[i] for i in numbers], [masks[i] for i in numbers]
    torch.manual_seed(numbers.start)  # each process draws its own beginning; the first one's must win
    sae = TopKSAE(DIM, ATOMS, k=3, dead_after=200)
    alive = train_sae(sae, patches, epochs=12, batch_size=IMAGES)
    torch.manual_seed(numbers.start)
    guides, store = Guides(DIM), TokenStore()
    tokens = torch.stack(patches)
    store.add(Tokens([tokens], [tokens.mean(dim=1)], (4, 4)), torch.stack(masks), [bool(mask.any()) for mask in masks])
    settings = GuideSettings(guide_epochs=20, ema_warmup=True)
    train_guides(guides, sae.dictionary.detach(), alive, store, 0, 4, settings, batch_size=IMAGES)
    return {"dictionary": sae.dictionary.detach(), "since": sae.tokens_since_fired, "vectors": guides.vectors}


def process(rank: int, folder: Path) -> None:
    """One of two processes, with every second image."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    torch.save(learn(range(rank, IMAGES, 2)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Same dictionary, same bookkeeping of dead atoms, same guides, in both processes and in one with all images."""
    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = learn(range(IMAGES))
    assert (alone["since"] > 200).any(), "AuxK must have been at work"
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-3, msg=name)
