# SPDX-License-Identifier: Apache-2.0

"""Sensitive neurons: the channels of a layer that vary most over normal patch tokens."""

from typing import Literal, get_args

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn
from torch.nn import functional as F  # noqa: N812

Selection = Literal["variance", "random", "lowest", "pca", "all"]
Normalization = Literal["after", "before", "none"]


class SensitiveNeurons(DynamicBufferMixin, nn.Module):
    """Choice of channels of one layer, and the projection of patch tokens onto them.

    Args:
        count (int): Neurons to keep, K. Defaults to 100 (paper).
        selection (str): ``"variance"`` keeps the channels of largest variance (paper). The controls: ``"random"``
            channels, those of ``"lowest"`` variance, the K principal components of the tokens (``"pca"``), or ``"all"``
            channels, regardless of ``count``.
        normalization (str): Bring tokens to unit length ``"after"`` the selection, ``"before"`` it, or not at all
            (``"none"``). Defaults to ``"after"`` (ours).

    Attributes:
        indices (torch.Tensor): Chosen channels ``(K,)``, the most sensitive first; empty for ``"pca"``.
        variances (torch.Tensor): Variance of every channel over the normal patch tokens ``(D,)``.
        components (torch.Tensor): Principal directions ``(D, K)``; empty unless ``"pca"``.
        mean (torch.Tensor): Mean token ``(D,)``, the origin of the principal directions; empty unless ``"pca"``.

    Raises:
        ValueError: If ``selection`` or ``normalization`` is unknown, or ``count`` is not positive.

    Example:
        >>> tokens = torch.tensor([[0.0, 5.0, 1.0], [0.0, -5.0, 2.0]])
        >>> neurons = SensitiveNeurons(count=2)
        >>> neurons.select(tokens)
        >>> neurons.indices.tolist(), neurons.variances.tolist()
        ([1, 2], [0.0, 50.0, 0.5])
        >>> neurons(torch.tensor([[9.0, 3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def __init__(
        self,
        count: int = 100,
        selection: Selection = "variance",
        normalization: Normalization = "after",
    ) -> None:
        super().__init__()
        if count < 1:
            msg = f"num_neurons={count} must be at least 1."
            raise ValueError(msg)
        for name, value, known in (
            ("selection", selection, get_args(Selection)),
            ("normalization", normalization, get_args(Normalization)),
        ):
            if value not in known:
                msg = f"{name}='{value}' is unknown; choose one of {', '.join(known)}."
                raise ValueError(msg)
        if count == 1 and selection != "all" and normalization == "after":
            msg = "num_neurons=1 with normalization='after' leaves only a sign of each patch. Give at least 2."
            raise ValueError(msg)
        self.count = count
        self.selection = selection
        self.normalization = normalization
        self.register_buffer("indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("variances", torch.empty(0))
        self.register_buffer("components", torch.empty(0))
        self.register_buffer("mean", torch.empty(0))
        self.indices: torch.Tensor
        self.variances: torch.Tensor
        self.components: torch.Tensor
        self.mean: torch.Tensor

    def select(self, tokens: torch.Tensor, generator: torch.Generator | None = None) -> None:
        """Choose the neurons from the normal patch tokens.

        Args:
            tokens (torch.Tensor): Normal patch tokens ``(M, D)``.
            generator (torch.Generator | None): Draws the ``"random"`` channels, on the CPU.

        Raises:
            ValueError: If there are fewer channels than neurons wanted, or nothing varies.
        """
        dim = tokens.shape[1]
        if self.selection != "all" and self.count > dim:
            msg = f"num_neurons={self.count} exceeds the {dim} channels of this backbone's patch tokens."
            raise ValueError(msg)
        if self.normalization == "before":
            tokens = F.normalize(tokens, dim=-1)
        variances = tokens.var(dim=0)
        # Rounding alone makes equal tokens vary a little.
        if not variances.isfinite().all() or variances.amax() <= 1e-9 * tokens.square().mean():
            msg = (
                "The patch tokens of the normal images do not vary, so that nothing can be learned from them. Are all "
                "images of one colour, or a single patch in size? Give images of good parts."
            )
            raise ValueError(msg)
        self.variances = variances
        order = variances.argsort(descending=True, stable=True)
        if self.selection == "variance":
            self.indices = order[: self.count]
        elif self.selection == "lowest":
            self.indices = order.flip(0)[: self.count]
        elif self.selection == "random":
            self.indices = torch.randperm(dim, generator=generator)[: self.count].to(tokens.device)
        elif self.selection == "all":
            self.indices = order
        else:
            self.mean = tokens.mean(dim=0)
            centered = tokens - self.mean
            _, directions = torch.linalg.eigh(centered.T @ centered)
            self.components = directions.flip(1)[:, : self.count].contiguous()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Project tokens onto the chosen neurons and bring them to unit length.

        Args:
            tokens (torch.Tensor): Patch tokens ``(..., D)``.

        Returns:
            torch.Tensor: Projected tokens ``(..., K)``.
        """
        return self.normalize(self.project(tokens))

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keep the chosen neurons, after bringing tokens to unit length if that comes ``"before"``.

        Args:
            tokens (torch.Tensor): Patch tokens ``(..., D)``.

        Returns:
            torch.Tensor: Projected tokens ``(..., K)``.
        """
        if self.normalization == "before":
            tokens = F.normalize(tokens, dim=-1)
        return (tokens - self.mean) @ self.components if self.selection == "pca" else tokens[..., self.indices]

    def normalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Bring projected tokens to unit length if that comes ``"after"`` the selection.

        Args:
            tokens (torch.Tensor): Projected tokens ``(..., K)``.

        Returns:
            torch.Tensor: Tokens ``(..., K)``.
        """
        return F.normalize(tokens, dim=-1) if self.normalization == "after" else tokens
