# SPDX-License-Identifier: Apache-2.0

"""Choice of the sensitive neurons."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from anomalib_lake.neurons import SensitiveNeurons

TOKENS = torch.randn(200, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)[torch.randperm(12)]


def select(**arguments: object) -> SensitiveNeurons:
    """Neurons chosen from TOKENS."""
    neurons = SensitiveNeurons(**arguments)
    neurons.select(TOKENS, torch.Generator().manual_seed(1))
    return neurons


def test_variance_keeps_the_most_varying_channels() -> None:
    """As numpy's variances order them, most sensitive first, and the variances are kept."""
    neurons = select(count=4)
    variances = TOKENS.numpy().var(axis=0, ddof=1)
    assert neurons.indices.tolist() == np.argsort(-variances)[:4].tolist()
    np.testing.assert_allclose(neurons.variances.numpy(), variances, rtol=1e-5)


def test_controls() -> None:
    """Lowest is the other end, random is seeded, all is every channel whatever the count."""
    order = np.argsort(TOKENS.numpy().var(axis=0)).tolist()
    assert select(count=3, selection="lowest").indices.tolist() == order[:3]
    drawn = select(count=5, selection="random").indices
    assert len(set(drawn.tolist())) == 5
    assert torch.equal(drawn, select(count=5, selection="random").indices)
    assert sorted(select(count=3, selection="all").indices.tolist()) == list(range(12))


def test_pca_is_that_of_scikit_learn() -> None:
    """Up to the signs of the directions."""
    projected = select(count=3, selection="pca", normalization="none")(TOKENS)
    expected = PCA(3).fit_transform(TOKENS.numpy())
    np.testing.assert_allclose(projected.abs().numpy(), np.abs(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalization", ["after", "before", "none"])
def test_normalization(normalization: str) -> None:
    """Unit length of the kept channels, of the whole token, or neither."""
    neurons = select(count=4, normalization=normalization)
    whole = TOKENS.numpy()
    unit = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    kept = {"after": whole, "none": whole, "before": unit}[normalization][:, neurons.indices.numpy()]
    if normalization == "after":
        kept /= np.linalg.norm(kept, axis=1, keepdims=True)
    np.testing.assert_allclose(neurons(TOKENS).numpy(), kept, rtol=1e-5)
    if normalization == "before":
        np.testing.assert_allclose(neurons.variances.numpy(), unit.var(axis=0, ddof=1), rtol=1e-4)


def test_state_dict_restores_the_choice() -> None:
    """Into a module that has chosen nothing yet."""
    for selection in ("variance", "pca"):
        neurons, restored = select(count=4, selection=selection), SensitiveNeurons(4, selection)
        restored.load_state_dict(neurons.state_dict())
        torch.testing.assert_close(restored(TOKENS), neurons(TOKENS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0}, "num_neurons=0"),
        ({"selection": "best"}, "selection='best'.*variance, random, lowest, pca, all"),
        ({"normalization": "later"}, "normalization='later'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    """Named, with what there is to choose."""
    with pytest.raises(ValueError, match=message):
        SensitiveNeurons(**arguments)


def test_more_neurons_than_channels() -> None:
    """Says how many there are."""
    with pytest.raises(ValueError, match="num_neurons=13 exceeds the 12 channels"):
        SensitiveNeurons(13).select(TOKENS)


def test_nothing_varies() -> None:
    """Equal tokens leave nothing to choose by, nor do those that differ by rounding."""
    for tokens in (torch.ones(5, 4), 1 + 1e-6 * torch.randn(5, 4)):
        with pytest.raises(ValueError, match="do not vary"):
            SensitiveNeurons(2).select(tokens)
