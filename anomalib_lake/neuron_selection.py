# SPDX-License-Identifier: Apache-2.0

"""LAKE's choice of neurons for anomalib's own models with a memory bank."""

from typing import Any

import numpy as np
import torch
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_spg.components.module_list import ModuleList

from .neurons import Selection, SensitiveNeurons


class SelectSensitiveNeurons(Callback):
    """Restrict PatchCore or AnomalyDINO to the sensitive neurons of their backbone.

    Before the bank is built, and before any coreset, the neurons of each layer are chosen from the stored patch tokens
    of the normal images. The bank and every query keep only these. AnomalyDINO's tokens are then brought to unit length
    again. The choice is saved in checkpoints, which need the callback to be loaded, and in exported models.

    ``anomalib export --ckpt_path`` builds its model without callbacks. Export the trained model by ``Engine.export``
    instead, or load the checkpoint's state after :meth:`attach`.

    Args:
        num_neurons (int): Sensitive neurons per layer, K. Defaults to 100 (paper).
        selection (Literal["variance", "random", "lowest", "pca", "all"]): Rule that chooses them: variance (paper), or
            a control.

    Raises:
        ValueError: If ``num_neurons`` is not positive, or ``selection`` is unknown.

    Example:
        From the command line it is ``--trainer.callbacks+=anomalib_lake.SelectSensitiveNeurons``; in Python

        >>> from anomalib.engine import Engine
        >>> from anomalib_lake import SelectSensitiveNeurons
        >>> engine = Engine(callbacks=[SelectSensitiveNeurons(num_neurons=50)])

        A model without a trainer:

        >>> from anomalib.models import Patchcore
        >>> model = Patchcore("resnet18", ["layer1", "layer2"], pre_trained=False)
        >>> SelectSensitiveNeurons(num_neurons=50).attach(model)
        >>> _ = model.model.train()(torch.rand(1, 3, 64, 64))
        >>> model.fit()
        >>> model.model.memory_bank.shape
        torch.Size([25, 100])
    """

    def __init__(self, num_neurons: int = 100, selection: Selection = "variance") -> None:
        SensitiveNeurons(num_neurons, selection)  # bad arguments fail here, not in the middle of a run
        self.num_neurons = num_neurons
        self.selection = selection

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Attach the selection before a checkpoint is loaded or a bank is built.

        Raises:
            TypeError: If the model is neither PatchCore nor AnomalyDINO.
            ValueError: If the model has a bank of all channels already.
        """
        del trainer, stage
        self.attach(pl_module)

    def attach(self, model: LightningModule) -> None:
        """Attach the selection to a model; one that already has it keeps its own.

        Args:
            model (LightningModule): PatchCore or AnomalyDINO, not fitted yet.

        Raises:
            TypeError: If the model is neither PatchCore nor AnomalyDINO.
            ValueError: If the model has a bank of all channels already.
        """
        inner: Any = getattr(model, "model", None)
        if isinstance(inner, _SensitiveBank):
            return
        if type(inner) not in _SENSITIVE:
            msg = f"SelectSensitiveNeurons works with Patchcore and AnomalyDINO, not with {type(model).__name__}."
            raise TypeError(msg)
        if inner.memory_bank.numel() > 0:
            msg = f"This {type(model).__name__} has a bank of all channels already. Fit a new one with the callback."
            raise ValueError(msg)
        # The class is swapped, not the model rebuilt: these models do not keep their constructor's arguments.
        inner.__class__ = _SENSITIVE[type(inner)]
        inner.make_neurons(self.num_neurons, self.selection)


class _SensitiveBank(nn.Module):
    """What both models share: sensitive neurons of each layer.

    Attributes:
        neurons (ModuleList): A :class:`SensitiveNeurons` for each layer.
        widths (list[int]): Channels of each layer.
    """

    neurons: "ModuleList[SensitiveNeurons]"
    widths: list[int]
    memory_bank: torch.Tensor
    embedding_store: list[torch.Tensor]

    def restrict(self, tokens: torch.Tensor) -> torch.Tensor:
        """Keep the chosen neurons of tokens ``(..., sum of widths)``."""
        layers = tokens.split(self.widths, dim=-1)
        return torch.cat([neurons(layer) for neurons, layer in zip(self.neurons, layers, strict=True)], dim=-1)

    def choose(self) -> None:
        """Choose the neurons from the stored tokens, and restrict the tokens to them."""
        if not self.embedding_store:
            return  # anomalib's own error follows
        tokens = torch.vstack(self.embedding_store)
        for neurons, layer in zip(self.neurons, tokens.split(self.widths, dim=-1), strict=True):
            neurons.select(layer.float())
        self.neurons.to(tokens)
        self.embedding_store = [self.restrict(tokens)]


class SensitivePatchcoreModel(_SensitiveBank, PatchcoreModel):
    """PatchCore on sensitive neurons."""

    def make_neurons(self, count: int, selection: Selection) -> None:
        """Prepare the choice of ``count`` neurons of each layer."""
        self.widths = list(self.feature_extractor.out_dims)
        self.neurons = ModuleList(SensitiveNeurons(count, selection, "none") for _ in self.widths)
        self.neurons.to(self.memory_bank)

    def reshape_embedding(self, embedding: torch.Tensor) -> torch.Tensor:  # type: ignore[override]  # static there
        """Reshape maps ``(B, D, H, W)`` to tokens ``(B * H * W, D)``, of the chosen neurons outside training."""
        tokens = super().reshape_embedding(embedding)
        return tokens if self.training else self.restrict(tokens)

    def subsample_embedding(self, sampling_ratio: float) -> None:  # type: ignore[override]  # one argument less
        """Choose the neurons, then the coreset."""
        self.choose()
        super().subsample_embedding(sampling_ratio)


class SensitiveAnomalyDINOModel(_SensitiveBank, AnomalyDINOModel):
    """AnomalyDINO on sensitive neurons."""

    def make_neurons(self, count: int, selection: Selection) -> None:
        """Prepare the choice of ``count`` neurons."""
        self.widths = list(self.feature_encoder.out_dims)
        self.neurons = ModuleList([SensitiveNeurons(count, selection, "after")])
        self.neurons.to(self.memory_bank)

    def extract_features(self, image_tensor: torch.Tensor) -> torch.Tensor:
        """Extract tokens ``(B, N, D)``, of the chosen neurons outside training."""
        tokens = super().extract_features(image_tensor)
        if self.training:
            return tokens
        if self.masking:
            self._all_channels = tokens
        # unit length comes first because the stored tokens, by which the neurons were chosen, have it
        return self.restrict(F.normalize(tokens, dim=-1))

    def compute_background_masks(  # type: ignore[override]  # static there
        self,
        batch_features: np.ndarray,
        grid_size: tuple[int, int],
    ) -> np.ndarray:
        """Separate foreground ``(B, N)`` from background by all channels, as without the selection."""
        if not self.training:
            batch_features = self._all_channels.detach().cpu().numpy()
        return super().compute_background_masks(batch_features, grid_size)

    def fit(self) -> None:
        """Choose the neurons, then build the bank."""
        self.choose()
        super().fit()


_SENSITIVE: dict[type[nn.Module], type[_SensitiveBank]] = {
    PatchcoreModel: SensitivePatchcoreModel,
    AnomalyDINOModel: SensitiveAnomalyDINOModel,
}
