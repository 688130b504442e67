# SPDX-License-Identifier: Apache-2.0

"""On a GPU: the CPU's scores, and steps that do not wait for it. Skipped where there is none."""

import warnings
from collections import Counter
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch

from anomalib_lake import LAKEModel
from anomalib_lake.bank import k_center_greedy
from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import Guides, train_guides
from anomalib_spg.sae import TopKSAE, train_sae
from anomalib_spg.token_store import TokenStore

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BACKBONE = "vit_tiny_patch16_224"
SIZE = (112, 96)


def equal(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Scores and maps of the CPU are those of the GPU."""
    with torch.inference_mode():
        expected = model.cpu().eval()(images)
        found = model.cuda()(images.cuda())
    torch.testing.assert_close(found.pred_score.cpu(), expected.pred_score, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.anomaly_map.cpu(), expected.anomaly_map, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("neighbors", [1, 3])
def test_lake(neighbors: int) -> None:
    """Learned on either, LAKE gives the same on both."""
    scales = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        options = {"num_neighbors": neighbors, "bank_size": 60, "num_neurons": 20}
        model = LAKEModel(BACKBONE, pre_trained=False, image_size=SIZE, **options).to(device).train()
        generator = torch.Generator().manual_seed(1)
        for _ in range(40):
            model(torch.randn(1, 3, *SIZE, generator=generator).to(device))
        model.fit()
        assert all(
            len(bank.tokens) == size for banks in model.banks for bank, size in zip(banks, (60, 30), strict=True)
        )
        scales.append(torch.stack([bank.distance_scale.cpu() for banks in model.banks for bank in banks]))
        equal(model, torch.randn(5, 3, *SIZE))
    torch.testing.assert_close(*scales, rtol=2e-2, atol=0)


def test_coreset() -> None:
    """k-center greedy chooses the same tokens."""
    tokens = torch.randn(3000, 100)
    (expected, radius), (found, other) = k_center_greedy(tokens, 700), k_center_greedy(tokens.cuda(), 700)
    assert (expected == found.cpu()).float().mean() > 0.99
    assert abs(radius - other) < 1e-3


def test_gradients_of_the_dictionary() -> None:
    """Loss and gradients are those of the CPU, those of dead atoms included."""
    sae = TopKSAE(16, 60, k=4, aux_k=5, dead_after=10)
    sae.tokens_since_fired[::2] = sae.longest_silence = 100
    copy, tokens, found = deepcopy(sae).cuda(), torch.randn(50, 16), []
    for model, device in ((sae, "cpu"), (copy, "cuda")):
        loss = model.loss(tokens.to(device))
        loss.backward()
        found.append([loss.detach().cpu(), model.encoder.grad.cpu(), model.dictionary.grad.cpu()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("own_weight", [0.0, 8.0])
def test_spg(own_weight: float) -> None:
    """Guides learned on a GPU give the same on both."""
    model = SPGModel(BACKBONE, layers=[3, 5], pre_trained=False, image_size=SIZE, own_weight=own_weight).cuda().train()
    masks = torch.zeros(6, *SIZE)
    masks[:3, :50, :50] = 1
    model(torch.randn(6, 3, *SIZE).cuda(), masks.cuda())
    model.fit(GuideSettings(num_atoms=64, k=8, sae_epochs=2, guide_epochs=2))
    equal(model, torch.randn(5, 3, *SIZE))


def waits(run: Callable[[], object]) -> Counter[str]:
    """Where a call waits for the GPU, and how often."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{warning.filename}:{warning.lineno}" for warning in caught if "synchroniz" in str(warning.message)]
    return Counter(places)


def test_steps_do_not_wait() -> None:
    """As many waits with 40 images as with 8: neither stage's step waits for the GPU, nor copies from or to it."""
    counts = []
    for images in (8, 40):
        store, masks = TokenStore(), torch.zeros(images, 96, 96)
        masks[::2, :40, :40] = 1
        tokens = Tokens([torch.randn(images, 36, 16)], [torch.randn(images, 16)], (6, 6))
        store.add(tokens, masks, [True, False] * (images // 2))
        patches = [image.cuda() for image in store.patches[0]]
        store.patches[0], store.pooled[0] = patches, [token.cuda() for token in store.pooled[0]]
        store.masks = [mask.cuda() for mask in store.masks]
        sae, guides = TopKSAE(16, 32, k=4).cuda(), Guides(16).cuda()
        alive, settings = torch.ones(32, dtype=torch.bool, device="cuda"), GuideSettings(num_atoms=32, guide_epochs=1)
        atoms = sae.dictionary.detach()
        counts.append((
            waits(lambda sae=sae, patches=patches: train_sae(sae, patches, epochs=1, batch_size=4)),
            waits(
                lambda g=guides, d=atoms, a=alive, s=store, c=settings: train_guides(g, d, a, s, 0, 16, c, batch_size=4)
            ),
        ))
    assert counts[0] == counts[1]
