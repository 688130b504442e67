# SPDX-License-Identifier: Apache-2.0

"""The sparse autoencoder against values worked out with numpy."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from anomalib_spg.sae import TopKSAE, train_sae


def test_initialisation_is_tied_and_unit_norm() -> None:
    """Encoder equals dictionary at first, as a parameter of its own."""
    sae = TopKSAE(dim=6, num_atoms=20, k=3)
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(sae.encoder, sae.dictionary)
    assert sae.encoder.data_ptr() != sae.dictionary.data_ptr()


def test_encode_decode_and_loss() -> None:
    """Code z = max(0, TopK(Wx)), x_hat = z A, mean squared error; AuxK/32 on the residual of dead atoms."""
    sae = TopKSAE(dim=4, num_atoms=12, k=3, aux_k=2, dead_after=10)
    sae.encoder.data = torch.randn(12, 4)
    before = np.array([0, 50] * 6)
    sae.tokens_since_fired[:] = torch.from_numpy(before)
    sae.longest_silence = 100
    tokens = torch.randn(5, 4)
    x, w, a = tokens.numpy(), sae.encoder.detach().numpy(), sae.dictionary.detach().numpy()

    pre = x @ w.T
    z = np.zeros_like(pre)
    for row in range(5):
        for atom in np.argsort(pre[row])[-3:]:
            z[row, atom] = max(0.0, pre[row, atom])
    reconstruction = z @ a
    since = np.where((z > 1e-3).any(axis=0), 0, before + 5)
    dead = np.flatnonzero(since > 10)
    auxiliary = np.zeros_like(x)
    for row in range(5):
        for atom in dead[np.argsort(pre[row, dead])[-2:]]:
            auxiliary[row] += max(0.0, pre[row, atom]) * a[atom]
    expected = ((x - reconstruction) ** 2).mean() + ((auxiliary - (x - reconstruction)) ** 2).mean() / 32

    assert len(dead), "the test must exercise AuxK"
    np.testing.assert_allclose(sae.decode(sae.encode(tokens)).detach(), reconstruction, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(sae.loss(tokens).item(), expected, rtol=1e-5)
    np.testing.assert_array_equal(sae.tokens_since_fired, since)


def test_gradients_are_those_of_the_dense_formula() -> None:
    """The sparse backward pass gives what autograd gives for the formula written densely, AuxK included."""
    sae = TopKSAE(dim=8, num_atoms=20, k=3, aux_k=2, dead_after=10)
    sae.encoder.data = torch.randn(20, 8)
    sae.tokens_since_fired[::2] = 100
    sae.longest_silence = 100
    tokens = torch.randn(7, 8, requires_grad=True)
    inputs = (tokens, sae.encoder, sae.dictionary)
    found = torch.autograd.grad(sae.loss(tokens), inputs)

    def code(pre: torch.Tensor, k: int) -> torch.Tensor:
        return torch.where(pre >= pre.topk(k, dim=1).values[:, -1:], pre, 0).relu()

    pre = tokens @ sae.encoder.T
    reconstruction = code(pre, 3) @ sae.dictionary
    dead = sae.tokens_since_fired > 10
    assert dead.sum() > 2
    auxiliary = code(pre[:, dead], 2) @ sae.dictionary[dead]
    residual = tokens - reconstruction.detach()
    loss = (reconstruction - tokens).square().mean() + (auxiliary - residual).square().mean() / 32
    for ours, expected in zip(found, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_auxiliary_loss_moves_only_dead_atoms() -> None:
    """The residual is detached: AuxK reaches the dead atoms and no others."""
    sae = TopKSAE(dim=4, num_atoms=6, k=1, aux_k=1, dead_after=0)
    sae.encoder.data = torch.eye(6, 4)
    sae.dictionary.data = torch.eye(6, 4)
    sae.encoder.data[5] = torch.tensor([0.5, 0.1, 0, 0])
    sae.dictionary.data[5] = torch.tensor([0.0, 1.0, 0, 0])
    tokens = torch.tensor([[2.0, 1.0, 0.0, 0.0]])
    sae.loss(tokens).backward()
    with_auxiliary = sae.dictionary.grad.clone()
    sae.dictionary.grad = None
    sae.dead_after = 10**9
    sae.loss(tokens).backward()
    difference = (with_auxiliary - sae.dictionary.grad).abs().sum(dim=1)
    assert difference[0] == 0
    assert difference.sum() > 0


def test_training_recovers_a_sparse_world() -> None:
    """Tokens made of few directions are reconstructed far better after training; atoms stay unit norm."""
    directions = torch.nn.functional.normalize(torch.randn(12, 16), dim=1)
    tokens = [torch.rand(64, 12).mul((torch.rand(64, 12) < 0.2).float()) @ directions for _ in range(8)]
    sae = TopKSAE(dim=16, num_atoms=48, k=6)
    flat = torch.cat(tokens)
    before = (sae.decode(sae.encode(flat)) - flat).square().mean().item()
    logged = []
    alive = train_sae(sae, [t.half() for t in tokens], epochs=30, batch_size=2, learning_rate=1e-2, log=logged.append)
    after = (sae.decode(sae.encode(flat)) - flat).square().mean().item()
    assert after < 0.1 * before
    assert len(logged) == 30
    assert logged[-1]["sae_loss"] < logged[0]["sae_loss"]
    torch.testing.assert_close(sae.dictionary.norm(dim=1), torch.ones(48))
    fired = torch.zeros(48, dtype=torch.bool)
    code = sae.encode(torch.cat([t.half().float() for t in tokens]))
    fired[code.atoms[code.activations > 1e-3]] = True
    assert torch.equal(alive, fired)


def test_same_seed_same_dictionary() -> None:
    """The seed decides initialisation and order."""
    tokens = [torch.randn(10, 8) for _ in range(4)]

    def train(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        sae = TopKSAE(dim=8, num_atoms=16, k=2)
        train_sae(sae, tokens, epochs=2, batch_size=2)
        return sae.dictionary

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


@pytest.mark.parametrize("k", [0, 17])
def test_k_out_of_range(k: int) -> None:
    """More atoms per token than there are make no sense."""
    with pytest.raises(ValueError, match=f"k={k}"):
        TopKSAE(dim=4, num_atoms=16, k=k)


def test_a_step_never_waits_for_the_device() -> None:
    """As long as no atom can be dead, neither stage's step reads a value back, which would make a GPU wait."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204, PLW3201
            del types
            assert func not in {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default}, func
            return func(*args, **(kwargs or {}))

    sae, tokens = TopKSAE(dim=8, num_atoms=16, k=4), torch.randn(40, 8)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)
    with NoReading():
        sae.loss(tokens).backward()
        optimizer.step()
        sae.normalize_atoms()
    sae.dead_after = 0
    with NoReading(), pytest.raises(AssertionError, match="nonzero"):
        sae.loss(tokens)
    # Once it has been seen that all fired lately, none can be dead for a while.
    sae.dead_after, sae.longest_silence = 100, 99
    sae.tokens_since_fired[:] = 10
    sae.loss(tokens)
    assert sae.longest_silence <= 50
    with NoReading():
        sae.loss(tokens)
