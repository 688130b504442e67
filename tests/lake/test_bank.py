# SPDX-License-Identifier: Apache-2.0

"""The normality bank: distances, their scale, the bound on its size."""

from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import bank as module
from anomalib_lake.bank import NormalityBank, k_center_greedy, leave_one_out_correction, nearest


@pytest.mark.parametrize("neighbors", [1, 2, 5, 30, 100])
@pytest.mark.parametrize(("table", "group"), [(1, 16), (200, 4), (1000, 8)])
def test_nearest_is_the_euclidean_distance(
    table: int, group: int, neighbors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean of the smallest ones, against torch.cdist in double precision, however tokens and bank are cut."""
    monkeypatch.setattr(module, "CACHED", table)
    monkeypatch.setattr(module, "GROUP", group)
    tokens, bank = torch.randn(2, 7, 5), torch.randn(93, 5)
    bank[50:60] = bank[49]  # several that are equally near
    expected = torch.cdist(tokens.double(), bank.double()).sort(dim=-1).values[..., :neighbors].mean(dim=-1)
    torch.testing.assert_close(nearest(tokens, bank, neighbors).double(), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(module, "CHUNK", 40)
    with patch("torch.compiler.is_compiling", return_value=True):  # as in an export
        torch.testing.assert_close(nearest(tokens, bank, neighbors).double(), expected, rtol=1e-4, atol=1e-4)


def test_several_neighbors_in_scale_and_deviation() -> None:
    """The leave-one-out distances that give the scale are means of as many as the deviation's are."""
    tokens, queries = torch.randn(3, 16, 6), torch.randn(2, 16, 6)
    bank = NormalityBank(num_neighbors=4)
    bank.fit(tokens, (4, 4))

    def by_hand(query: torch.Tensor, images: list[int]) -> torch.Tensor:
        return torch.cdist(query, tokens[images].flatten(0, 1)).sort(dim=-1).values[..., :4].mean(dim=-1)

    scale = torch.stack([by_hand(tokens[i], [j for j in range(3) if j != i]) for i in range(3)]).quantile(0.99)
    torch.testing.assert_close(bank.distance_scale, scale)
    torch.testing.assert_close(bank(queries), by_hand(queries, [0, 1, 2]) / scale)


def test_scale_leaves_one_image_out() -> None:
    """Worked out with loops over images and patches."""
    tokens = torch.randn(3, 4, 5)
    bank = NormalityBank()
    bank.fit(tokens, (2, 2))
    distances = []
    for image in range(3):
        others = [tokens[other, patch] for other in range(3) if other != image for patch in range(4)]
        distances += [min((token - other).norm().item() for other in others) for token in tokens[image]]
    assert bank.distance_scale.item() == pytest.approx(np.quantile(distances, 0.99), rel=1e-4)
    assert bank.tokens.shape == (12, 5)


def test_one_image_leaves_its_quarters_out() -> None:
    """A patch is compared with the other three quarters, not with its neighbours in its own."""
    tokens = torch.randn(1, 6, 5)
    bank = NormalityBank()
    bank.fit(tokens, (2, 3))  # quarters: {0, 1}, {2}, {3, 4}, {5}
    quarters = [0, 0, 1, 2, 2, 3]
    expected = [
        min((tokens[0, a] - tokens[0, b]).norm().item() for b in range(6) if quarters[b] != quarters[a])
        for a in range(6)
    ]
    assert bank.distance_scale.item() == pytest.approx(np.quantile(expected, 0.99), rel=1e-4)
    left_out = bank.leave_out(tokens, 0, (2, 3)) * bank.distance_scale
    torch.testing.assert_close(left_out[0], torch.tensor(expected) * leave_one_out_correction(1))


def test_image_left_out_of_a_thinned_bank() -> None:
    """It is compared with what the bank holds of the others."""
    tokens = torch.randn(12, 16, 4)
    bank = NormalityBank(size=60)
    bank.fit(tokens, (4, 4))
    for number in (0, 7):
        others = [i for i in range(60) if bank.image_indices[i] != number]
        assert 0 < len(others) < 60
        expected = (
            torch.cdist(tokens[number], bank.tokens[others]).amin(dim=1) / bank.distance_scale * (11 / 12) ** 0.09
        )
        torch.testing.assert_close(bank.leave_out(tokens[[number]], number, (4, 4))[0], expected, atol=1e-4, rtol=1e-4)


def test_one_normal_patch_in_a_hundred_deviates_by_more_than_one() -> None:
    """Whatever the scale of the tokens; foreign ones lie far above."""
    for scale in (0.01, 100):
        bank = NormalityBank()
        bank.fit(torch.randn(8, 64, 6) * scale, (8, 8))
        share = (bank(torch.randn(40, 64, 6) * scale) > 1).float().mean().item()
        assert 0.002 < share < 0.03
        assert bank(torch.randn(4, 64, 6) * scale + 10 * scale).mean() > 3


def test_size_is_bounded_by_a_coreset() -> None:
    """Exactly the size asked for, tokens of the images and positions they are said to be from, and well spread."""
    tokens = torch.randn(4, 16, 5)
    bank = NormalityBank(size=10)
    bank.fit(tokens, (4, 4))
    assert bank.tokens.shape == (10, 5)
    assert torch.equal(bank.tokens, tokens[bank.image_indices, bank.patch_indices])
    spread = nearest(tokens, bank.tokens).amax()
    drawn = [nearest(tokens, tokens.flatten(0, 1)[torch.randperm(64)[:10]]).amax() for _ in range(5)]
    assert spread < torch.stack(drawn).mean()


@pytest.mark.parametrize("ahead", [1, 4, 1000])
def test_k_center_greedy(ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens one by one, each time the farthest from those chosen, however many are looked at in one go."""
    monkeypatch.setattr(module, "AHEAD", ahead)
    tokens = torch.randn(60, 5, dtype=torch.float64)
    distances = torch.cdist(tokens, tokens)
    expected = [0]
    for _ in range(24):
        expected.append(int(distances[:, expected].amin(dim=1).argmax()))
    chosen, radius = k_center_greedy(tokens, 25)
    assert chosen.tolist() == expected
    assert radius == pytest.approx(float(distances[:, expected].amin(dim=1).amax()))


def test_k_center_greedy_of_copies() -> None:
    """No token is chosen twice, not even where all are equal."""
    for tokens in (torch.ones(9, 4), torch.randn(3, 4).repeat(3, 1), F.normalize(torch.randn(9, 4), dim=-1)):
        chosen, radius = k_center_greedy(tokens, 8)
        assert len(set(chosen.tolist())) == 8
        assert radius < 1


def test_images_added_before() -> None:
    """With room for all they are kept, and the last images are compared with them and with each other."""
    tokens = torch.randn(5, 16, 6)
    bank, at_once = NormalityBank(size=80), NormalityBank(size=80)
    bank.add(tokens[3:], [3, 4], (4, 4))
    assert not len(bank.tokens), "nothing counts before the fit"
    bank.fit(tokens[:3], (4, 4), numbers=[0, 1, 2])
    distances = [nearest(tokens[i], tokens[[j for j in range(5) if j != i]].flatten(0, 1)) for i in range(5)]
    torch.testing.assert_close(bank.distance_scale, torch.cat(distances[:3]).quantile(0.99))
    for number in range(5):  # those added before, too
        expected = distances[number] / bank.distance_scale * leave_one_out_correction(5)
        torch.testing.assert_close(bank.leave_out(tokens[number : number + 1], number, (4, 4))[0], expected)
    at_once.fit(tokens, (4, 4))
    queries = torch.randn(2, 16, 6)
    torch.testing.assert_close(nearest(queries, bank.tokens), nearest(queries, at_once.tokens))
    assert torch.equal(bank.tokens, tokens[bank.image_indices, bank.patch_indices])


def test_many_images_need_a_bounded_number_of_tokens() -> None:
    """Never more than twice the size; what is left lies about as near to all tokens as a coreset of all of them."""
    tokens = F.normalize(torch.randn(60, 16, 4), dim=-1)
    bank, held = NormalityBank(size=50), []
    for number, image in enumerate(tokens[8:], start=8):
        bank.add(image[None], [number], (4, 4))
        held.append(bank.num_added)
    assert max(held) <= 100
    assert held[5] == 6 * 16, "not reduced while there is room"
    bank.fit(tokens[:8], (4, 4))
    assert bank.tokens.shape == (50, 4)
    assert torch.equal(bank.tokens, tokens[bank.image_indices, bank.patch_indices])
    everything = tokens.flatten(0, 1)
    chosen, _ = k_center_greedy(everything, 50)
    assert nearest(everything, bank.tokens).mean() < 1.15 * nearest(everything, everything[chosen]).mean()
    drawn = nearest(everything, everything[torch.randperm(len(everything))[:50]])
    assert nearest(everything, bank.tokens).amax() < drawn.amax()


def test_what_the_bank_explains_is_not_taken_up() -> None:
    """Once there was too much, only tokens farther than the radius, up to which others were left out."""
    tokens = torch.randn(12, 16, 4)
    bank = NormalityBank(size=50)
    bank.add(tokens[:6], range(6), (4, 4))
    assert bank.radius == 0
    bank.add(tokens[6:7], [6], (4, 4))
    assert (bank.radius > 0, bank.num_added) == (True, 50)
    kept = bank._added[0][0]
    far = nearest(tokens[7], kept) > bank.radius
    assert 0 < far.sum() < 16
    bank.add(tokens[7:8], [7], (4, 4))
    assert torch.equal(bank._added[1][0], tokens[7, far])
    assert bank._added[1][2].tolist() == far.nonzero().flatten().tolist()


def test_deviation_of_new_images_is_the_one_foretold() -> None:
    """Of many images, too: one normal patch in a hundred deviates by more than 1."""
    tokens = torch.randn(60, 64, 6)
    bank = NormalityBank(size=500)
    bank.add(tokens[8:], range(8, 60), (8, 8))
    bank.fit(tokens[:8], (8, 8))
    share = (bank(torch.randn(100, 64, 6)) > 1).float().mean().item()
    assert 0.002 < share < 0.03


def test_enough_room_keeps_every_token_in_order() -> None:
    """No coreset where none is needed."""
    tokens = F.normalize(torch.randn(2, 9, 5), dim=-1)
    bank = NormalityBank(size=18)
    bank.fit(tokens, (3, 3))
    assert torch.equal(bank.tokens, tokens.flatten(0, 1))
    assert bank(tokens).amax() < 1e-2


def test_compiled_path_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The form that is exported computes what the loop over images computes."""
    bank = NormalityBank()
    bank.fit(torch.randn(2, 9, 5), (3, 3))
    queries = torch.randn(3, 9, 5)
    expected = bank(queries)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(bank(queries), expected)


def test_state_dict_restores_the_bank() -> None:
    """Into an empty one."""
    bank, restored = NormalityBank(), NormalityBank()
    bank.fit(torch.randn(2, 9, 5), (3, 3))
    restored.load_state_dict(bank.state_dict())
    queries = torch.randn(1, 9, 5)
    torch.testing.assert_close(restored(queries), bank(queries))


def test_copies_are_refused() -> None:
    """Identical images give no usual distance to measure by."""
    with pytest.raises(ValueError, match="copies of each other"):
        NormalityBank().fit(torch.randn(1, 9, 5).expand(3, -1, -1), (3, 3))


def test_bad_size() -> None:
    """A bank of nothing."""
    with pytest.raises(ValueError, match="bank_size=0"):
        NormalityBank(0)
    with pytest.raises(ValueError, match="num_neighbors=0 must be at least 1"):
        NormalityBank(num_neighbors=0)
