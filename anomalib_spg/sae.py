# SPDX-License-Identifier: Apache-2.0

"""Stage 1: the TopK sparse autoencoder whose dictionary the guides are written in.

Reference: Gao et al., Scaling and evaluating sparse autoencoders (arXiv 2406.04093), with the settings of SPG
(arXiv 2604.02871).
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from .distributed import any_process, average_processes, broadcast, num_processes
from .token_store import gather, on_device

FIRE_THRESHOLD = 1e-3  # an atom counts as fired above this activation (paper)


class SparseCode(NamedTuple):
    """Sparse code of ``n`` tokens.

    Attributes:
        activations (torch.Tensor): Kept activations ``(n, k)``, non-negative.
        atoms (torch.Tensor): Which atom each belongs to ``(n, k)``.
    """

    activations: torch.Tensor
    atoms: torch.Tensor


class _Gather(torch.autograd.Function):
    """The products of tokens and encoder that TopK kept ``(n, k)``.

    Plain autograd would scatter each token's ``k`` gradients into a dense matrix ``(n, C)`` and multiply the tokens by
    it, which takes longer than the product of the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # what autograd gives
        tokens: torch.Tensor,
        encoder: torch.Tensor,
        products: torch.Tensor,
        atoms: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(tokens, encoder, atoms)
        return products.gather(1, atoms)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        tokens, encoder, atoms = ctx.saved_tensors
        for_tokens = None
        if ctx.needs_input_grad[0]:
            for_tokens = F.embedding_bag(atoms, encoder, per_sample_weights=gradient, mode="sum")
        return for_tokens, _scatter(tokens, gradient, atoms, len(encoder)), None, None


class _Combine(torch.autograd.Function):
    """The sums of atoms weighted by their activations ``(n, D)``, reading only the atoms that are used."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401  # what autograd gives
        activations: torch.Tensor,
        dictionary: torch.Tensor,
        atoms: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(activations, dictionary, atoms)
        return F.embedding_bag(atoms, dictionary, per_sample_weights=activations, mode="sum")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: ANN401
        activations, dictionary, atoms = ctx.saved_tensors
        # embedding_bag's gradient for the activations is fast; the one for the dictionary first sorts all indices.
        with torch.enable_grad():
            weights = activations.detach().requires_grad_()
            sums = F.embedding_bag(atoms, dictionary.detach(), per_sample_weights=weights, mode="sum")
        for_activations = torch.autograd.grad(sums, weights, gradient)[0]
        return for_activations, _scatter(gradient, activations, atoms, len(dictionary)), None


def _scatter(tokens: torch.Tensor, weights: torch.Tensor, atoms: torch.Tensor, num_atoms: int) -> torch.Tensor:
    """Sum weighted tokens ``(n, D)`` into the rows of the atoms they use: ``(C, D)``."""
    size, values, k = (num_atoms, len(tokens)), weights.flatten(), atoms.shape[1]
    if tokens.device.type == "cpu":
        numbers = torch.stack([atoms.flatten(), torch.arange(len(tokens)).repeat_interleave(k)])
        return torch.sparse.mm(torch.sparse_coo_tensor(numbers, values, size, check_invariants=False), tokens)
    # With sorted atoms a GPU takes a quarter of the time, sorting included. A CPU gains next to nothing.
    atom, order = atoms.flatten().sort(stable=True)
    ends = torch.searchsorted(atom, torch.arange(num_atoms + 1, device=atom.device))
    with warnings.catch_warnings():  # torch says that it calls these tensors beta
        warnings.filterwarnings("ignore", "Sparse CSR")
        code = torch.sparse_csr_tensor(ends, order // k, values[order], size, check_invariants=False)
    return code @ tokens


def _fired(code: SparseCode, num_atoms: int) -> torch.Tensor:
    """Which atoms fired ``(C,)``, without waiting for a GPU to say how many."""
    fired = torch.zeros(num_atoms + 1, dtype=torch.bool, device=code.atoms.device)
    numbers = torch.where(code.activations > FIRE_THRESHOLD, code.atoms, num_atoms)  # the last stands for none
    return fired.index_fill_(0, numbers.flatten(), True)[:num_atoms]  # noqa: FBT003


class TopKSAE(nn.Module):
    r"""TopK sparse autoencoder with unit-norm atoms.

    .. math:: z = \max(0, \mathrm{TopK}_k(W x)), \qquad \hat x = z^\top A

    The encoder :math:`W` starts equal to the dictionary :math:`A` and is trained separately. There is no bias and no
    normalisation of the input.

    Args:
        dim (int): Token dimension ``D``.
        num_atoms (int): Dictionary size ``C``. Defaults to 4096 (paper).
        k (int): Atoms kept per token. Defaults to 32 (paper).
        aux_k (int): Dead atoms that reconstruct the residual. Defaults to 512 (paper).
        dead_after (int): Tokens without firing after which an atom is dead. Defaults to 10 million (paper).

    Raises:
        ValueError: If ``k`` is not in ``[1, num_atoms]``.

    Example:
        >>> sae = TopKSAE(dim=8, num_atoms=16, k=4)
        >>> code = sae.encode(torch.randn(5, 8))
        >>> sae.decode(code).shape
        torch.Size([5, 8])
    """

    def __init__(
        self,
        dim: int,
        num_atoms: int = 4096,
        k: int = 32,
        aux_k: int = 512,
        dead_after: int = 10_000_000,
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_atoms:
            msg = f"k={k} atoms per token must lie between 1 and the dictionary size num_atoms={num_atoms}."
            raise ValueError(msg)
        self.k = k
        self.aux_k = aux_k
        self.dead_after = dead_after
        self.dictionary = nn.Parameter(F.normalize(torch.randn(num_atoms, dim), dim=1))
        self.encoder = nn.Parameter(self.dictionary.detach().clone())
        self.longest_silence = 0  # no atom has not fired for more tokens
        self.register_buffer("tokens_since_fired", torch.zeros(num_atoms, dtype=torch.long))
        self.tokens_since_fired: torch.Tensor

    def encode(self, tokens: torch.Tensor) -> SparseCode:
        """Encode tokens ``(n, D)``."""
        with torch.no_grad():
            products = tokens @ self.encoder.T
            atoms = products.topk(self.k, dim=1, sorted=False).indices
        return SparseCode(_Gather.apply(tokens, self.encoder, products, atoms).relu(), atoms)

    def decode(self, code: SparseCode) -> torch.Tensor:
        """Reconstruct tokens ``(n, D)``; only the atoms that fired are read."""
        return _Combine.apply(code.activations, self.dictionary, code.atoms)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Mean squared reconstruction error plus AuxK / 32, and bookkeeping of which atoms fired.

        Args:
            tokens (torch.Tensor): Tokens ``(n, D)``.

        Returns:
            torch.Tensor: Scalar loss.
        """
        code = self.encode(tokens)
        reconstruction = self.decode(code)
        loss = F.mse_loss(reconstruction, tokens)
        seen = len(tokens) * num_processes()
        self.longest_silence += seen
        self.tokens_since_fired = (self.tokens_since_fired + seen).masked_fill(
            any_process(_fired(code, len(self.dictionary))), 0
        )
        if self.longest_silence <= self.dead_after:  # none is dead: a GPU is not waited for to count them
            return loss
        dead = torch.nonzero(self.tokens_since_fired > self.dead_after).squeeze(1)
        if len(dead):
            # The dead atoms learn the residual of the living ones, which is a target and gets no gradient.
            auxiliary = self._dead_code(tokens, dead) @ self.dictionary[dead]
            loss = loss + F.mse_loss(auxiliary, tokens - reconstruction.detach()) / 32
        else:
            self.longest_silence = int(self.tokens_since_fired.max())
        return loss

    def _dead_code(self, tokens: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
        """Activations ``(n, len(dead))`` of dead atoms, all but the ``aux_k`` highest of each token zero.

        So many of the atoms are used that dense products are faster than reading those of each token.
        """
        activations = tokens @ self.encoder[dead].T
        if self.aux_k < len(dead):
            kept = activations.detach().topk(self.aux_k, dim=1, sorted=False).indices
            activations = activations * torch.zeros_like(activations).scatter_(1, kept, 1.0)
        return activations.relu()

    @torch.no_grad()
    def normalize_atoms(self) -> None:
        """Bring the atoms back to unit norm; call it after every optimiser step."""
        self.dictionary.copy_(F.normalize(self.dictionary, dim=1))


def train_sae(
    sae: TopKSAE,
    tokens: list[torch.Tensor],
    epochs: int = 50,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    log: Callable[[dict[str, float]], None] = lambda _: None,
    description: str = "SAE",
) -> torch.Tensor:
    """Train a sparse autoencoder on cached patch tokens.

    In distributed training gradients are all-reduced to their mean, so that all processes end with the same
    autoencoder.

    Args:
        sae (TopKSAE): The autoencoder, on the device to train on.
        tokens (list[torch.Tensor]): Patch tokens ``(N, D)`` of each image, in any precision, on any device.
        epochs (int): Passes over the images. Defaults to 50 (paper).
        batch_size (int): Images per step, over all processes. Defaults to 16 (paper).
        learning_rate (float): Adam's step size. Defaults to 1e-3 (paper).
        log (Callable): Receives ``{"sae_loss": mean over the epoch}`` after every epoch.
        description (str): Name shown beside the progress bar.

    Returns:
        torch.Tensor: Boolean mask ``(C,)`` of the atoms that fire at least once over all tokens.
    """
    device = sae.dictionary.device
    tokens = on_device(tokens, device)
    broadcast(sae.parameters())
    batch_size = max(1, batch_size // num_processes())
    optimizer = torch.optim.Adam(sae.parameters(), lr=learning_rate, betas=(0.5, 0.999), fused=True)
    with tqdm(range(epochs), desc=description, unit="epoch") as progress:
        for _ in progress:
            total = torch.zeros((), device=device)
            for batch in torch.randperm(len(tokens)).split(batch_size):
                loss = sae.loss(gather(tokens, batch, device).flatten(0, 1))
                optimizer.zero_grad()
                loss.backward()
                average_processes(parameter.grad for parameter in sae.parameters())
                optimizer.step()
                sae.normalize_atoms()
                total += loss.detach() * len(batch)
            average_processes([total])
            mean = total.item() / len(tokens)
            progress.set_postfix(loss=f"{mean:.4f}")
            log({"sae_loss": mean})

    alive = torch.zeros(len(sae.dictionary), dtype=torch.bool, device=device)
    with torch.no_grad():
        for batch in torch.arange(len(tokens)).split(batch_size):
            alive |= _fired(sae.encode(gather(tokens, batch, device).flatten(0, 1)), len(alive))
    return any_process(alive)
