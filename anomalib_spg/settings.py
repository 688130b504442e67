# SPDX-License-Identifier: Apache-2.0

"""What determines the guides, given tokens and masks."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class GuideSettings:
    """Settings of the two stages. A guides file records them.

    Args:
        dictionary (bool): Write the guides in a dictionary's atoms (paper). ``False`` learns free vectors and no
            dictionary: the control. Defaults to ``True``.
        num_atoms (int): Dictionary size C. Defaults to 4096 (paper).
        k (int): Atoms per token. Defaults to 32 (paper).
        sae_epochs (int): Epochs of stage 1. Defaults to 50 (paper).
        guide_epochs (int): Epochs of stage 2. Defaults to 15 (paper).
        guide_top_k (int | None): Atoms per guide; ``None`` leaves it to the L1 penalty (paper). Defaults to ``None``.
        sparsity (float): Weight of the guides' mean L1 norm. Defaults to 1e-3 (paper).
        ema_decay (float): Decay of the guides' moving average, in [0, 1). 0 keeps the last step. Defaults to 0.999
            (paper).
        ema_warmup (bool): Let the decay rise as ``(1 + t) / (10 + t)`` up to ``ema_decay``, so that few steps are
            enough (ours). ``False`` is the published behaviour, whose average starts at the first step's guides and
            still weighs them 71 % after 345 steps.

    Raises:
        ValueError: If a value is out of range; the message names it.

    Example:
        >>> GuideSettings(num_atoms=64, k=8).k
        8
        >>> GuideSettings(num_atoms=64, k=65)
        Traceback (most recent call last):
        ValueError: k=65 atoms per token must lie between 1 and num_atoms=64.
    """

    dictionary: bool = True
    num_atoms: int = 4096
    k: int = 32
    sae_epochs: int = 50
    guide_epochs: int = 15
    guide_top_k: int | None = None
    sparsity: float = 1e-3
    ema_decay: float = 0.999
    ema_warmup: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if not 1 <= self.k <= self.num_atoms:
            msg = f"k={self.k} atoms per token must lie between 1 and num_atoms={self.num_atoms}."
            raise ValueError(msg)
        if self.guide_top_k is not None and not 1 <= self.guide_top_k <= self.num_atoms:
            msg = f"guide_top_k={self.guide_top_k} must lie between 1 and num_atoms={self.num_atoms}."
            raise ValueError(msg)
        if self.guide_top_k is not None and not self.dictionary:
            msg = f"guide_top_k={self.guide_top_k} chooses atoms, and dictionary=False has none. Leave one of them out."
            raise ValueError(msg)
        for name in ("sae_epochs", "guide_epochs"):
            if getattr(self, name) < 1:
                msg = f"{name}={getattr(self, name)} must be at least 1."
                raise ValueError(msg)
        if not 0 <= self.ema_decay < 1:
            msg = f"ema_decay={self.ema_decay} must lie in [0, 1); 0 keeps the guides of the last step."
            raise ValueError(msg)
        if not 0 <= self.sparsity < math.inf:
            msg = f"sparsity={self.sparsity} must be a number, and not negative."
            raise ValueError(msg)
