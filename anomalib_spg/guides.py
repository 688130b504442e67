# SPDX-License-Identifier: Apache-2.0

"""Stage 2: the four sparse guides, and the file they are saved in."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.models.components import DynamicBufferMixin
from einops import rearrange
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from .components.anomaly_map import to_pixels
from .components.files import load_tensors, save_tensors
from .components.hub import local_file
from .distributed import average_processes, broadcast, num_processes
from .losses import dice_loss, focal_loss
from .settings import GuideSettings
from .token_store import TokenStore, gather, on_device

logger = logging.getLogger(__name__)

GUIDE_NAMES = ("global_normal", "global_anomaly", "local_normal", "local_anomaly")
BUFFERS = ("atoms", "atom_indices", "coefficients", "vectors")
FILE_FORMAT = "anomalib_spg.guides"
FILE_VERSION = "1"


class Guides(DynamicBufferMixin):
    """Four guide vectors, each a sparse non-negative combination of dictionary atoms.

    Rows are, in this order, ``global_normal``, ``global_anomaly`` (compared with the pooled token), ``local_normal``
    and ``local_anomaly`` (compared with the patch tokens).

    Args:
        dim (int): Token dimension ``D``.

    Attributes:
        atoms (torch.Tensor): Atoms in use ``(n, D)``, unit norm.
        atom_indices (torch.Tensor): Their rows in the dictionary they come from ``(n,)``.
        coefficients (torch.Tensor): Non-negative coefficients ``(4, n)``.
        vectors (torch.Tensor): ``coefficients @ atoms`` ``(4, D)``.

    Example:
        >>> guides = Guides(dim=2)
        >>> guides.set(torch.eye(2), torch.arange(2), torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]]))
        >>> guides.local_probability(torch.tensor([[[0.0, 1.0], [1.0, 1.0]]]), temperature=1.0)
        tensor([[0.7311, 0.5000]])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("atoms", torch.empty(0, dim))
        self.register_buffer("atom_indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("coefficients", torch.empty(4, 0))
        self.register_buffer("vectors", torch.zeros(4, dim))
        self.atoms: torch.Tensor
        self.atom_indices: torch.Tensor
        self.coefficients: torch.Tensor
        self.vectors: torch.Tensor

    def set(self, atoms: torch.Tensor, atom_indices: torch.Tensor, coefficients: torch.Tensor) -> None:
        """Set learned guides, keeping only the atoms that some guide uses.

        Args:
            atoms (torch.Tensor): Unit-norm atoms ``(n, D)``.
            atom_indices (torch.Tensor): Their dictionary rows ``(n,)``.
            coefficients (torch.Tensor): Coefficients ``(4, n)``; negative ones count as zero.
        """
        coefficients = coefficients.relu()
        used = coefficients.any(dim=0)
        self.atoms = atoms[used]
        self.atom_indices = atom_indices[used]
        self.coefficients = coefficients[:, used]
        self.vectors = self.coefficients @ self.atoms

    def local_strengths(self) -> torch.Tensor:
        r"""What each atom adds to the difference of the cosines, for a patch equal to the atom.

        Returns:
            torch.Tensor: :math:`w_c = a_c / \lVert g_a \rVert - n_c / \lVert g_n \rVert` from the coefficients of the
            anomaly and the normal guide ``(n,)``: positive ones push to anomaly, negative ones to normal.
        """
        return _strengths(self.coefficients[2:], self.vectors[2:])

    def global_strengths(self) -> torch.Tensor:
        """The same for the guides of the pooled token ``(n,)``."""
        return _strengths(self.coefficients[:2], self.vectors[:2])

    def local_probability(self, patches: torch.Tensor, temperature: float) -> torch.Tensor:
        """Probability of each patch being anomalous.

        The softmax over two cosines is a sigmoid of their difference, so one product per patch is enough. With
        ``p_normal = 1 - p_anomaly`` the published map ``(p_anomaly + 1 - p_normal) / 2`` is ``p_anomaly`` itself.

        Args:
            patches (torch.Tensor): Patch tokens ``(..., D)``.
            temperature (float): Softmax temperature.

        Returns:
            torch.Tensor: Probabilities ``(...)`` in ``[0, 1]``.
        """
        return torch.sigmoid(self.local_logit(patches, temperature))

    def local_logit(self, patches: torch.Tensor, temperature: float) -> torch.Tensor:
        """Logit of that probability ``(...)``."""
        return anomaly_logit(patches, self.vectors[2], self.vectors[3], temperature)

    def global_probability(self, pooled: torch.Tensor, temperature: float) -> torch.Tensor:
        """Probability of each image being anomalous by its pooled token ``(..., D)``."""
        return torch.sigmoid(anomaly_logit(pooled, self.vectors[0], self.vectors[1], temperature))


def _strengths(coefficients: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    normal, anomaly = coefficients / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
    return anomaly - normal


def anomaly_logit(
    tokens: torch.Tensor,
    normal: torch.Tensor,
    anomaly: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Logit of the softmax over the cosines to the normal and the anomaly guide, anomalous class.

    Args:
        tokens (torch.Tensor): Tokens ``(..., D)``.
        normal (torch.Tensor): Normal guide ``(D,)``.
        anomaly (torch.Tensor): Anomaly guide ``(D,)``.
        temperature (float): Softmax temperature.

    Returns:
        torch.Tensor: Logits ``(...)``.
    """
    direction = (F.normalize(anomaly, dim=-1) - F.normalize(normal, dim=-1)) / temperature
    return (tokens @ direction) / tokens.norm(dim=-1).clamp(min=1e-8)


class _Coefficients(nn.Module):
    """The learnable coefficients."""

    def __init__(self, num_atoms: int, top_k: int | None, start: torch.Tensor | None = None) -> None:
        super().__init__()
        self.raw = nn.Parameter(0.1 + 0.01 * torch.randn(4, num_atoms) if start is None else start.clone())
        self.top_k = top_k

    def forward(self) -> torch.Tensor:
        coefficients = self.raw.relu()
        if self.top_k is None:
            return coefficients
        kept = torch.zeros_like(coefficients)
        kept.scatter_(1, coefficients.topk(self.top_k, dim=1).indices, 1.0)
        # Straight-through: the value is the truncated one, the gradient that of the full one.
        return coefficients + (coefficients * kept - coefficients).detach()


class _FreeVectors(nn.Module):
    """The control: guides that are unconstrained vectors.

    They start as close together as the sparse ones do: coordinates of about 0.1 along the mean token, plus N(0, 0.01²).
    """

    def __init__(self, mean: torch.Tensor) -> None:
        super().__init__()
        start = 0.1 * len(mean) ** 0.5 * F.normalize(mean, dim=0)
        self.raw = nn.Parameter(start + 0.01 * torch.randn(4, len(mean), device=mean.device))

    def forward(self) -> torch.Tensor:
        return self.raw


def train_guides(
    guides: Guides,
    dictionary: torch.Tensor | None,
    alive: torch.Tensor | None,
    store: TokenStore,
    layer: int,
    patch_size: int,
    settings: GuideSettings,
    temperature: float = 0.07,
    batch_size: int = 8,
    learning_rate: float = 1e-2,
    log: Callable[[dict[str, float]], None] = lambda _: None,
    description: str = "guides",
    learn_on: bool = False,
) -> None:
    """Learn the four guides on stored tokens and masks.

    In distributed training gradients are all-reduced to their mean, so that all processes end with the same guides.

    Args:
        guides (Guides): Receives the result.
        dictionary (torch.Tensor | None): Unit-norm atoms ``(C, D)``, on the device to train on. ``None`` learns free
            vectors instead, without sparsity: the control that shows what the dictionary brings (ours).
        alive (torch.Tensor | None): Boolean mask ``(C,)`` of the atoms that may be used.
        store (TokenStore): Tokens, masks and labels of the training images.
        layer (int): Which of the stored layers to learn from.
        patch_size (int): Side of a patch in pixels.
        settings (GuideSettings): Epochs, sparsity and moving average.
        temperature (float): Softmax temperature of the local guides. Defaults to 0.07 (paper).
        batch_size (int): Images per step, over all processes. Defaults to 8 (paper).
        learning_rate (float): Adam's step size. Defaults to 1e-2 (paper).
        log (Callable): Receives the mean losses after every epoch.
        description (str): Name shown beside the progress bar.
        learn_on (bool): Start from what the guides are, over their atoms, in the place of a dictionary: weights move,
            and an atom that a guide does not use stays out of it (ours). Defaults to ``False``.

    Raises:
        ValueError: If no atom is alive, ``guide_top_k`` exceeds the living atoms, or ``sparsity`` leaves no atom.
    """
    device = guides.vectors.device
    patches, pooled, masks = (on_device(x, device) for x in (store.patches[layer], store.pooled[layer], store.masks))
    sparsity, top_k = settings.sparsity, settings.guide_top_k
    if learn_on:
        atoms, atom_indices = guides.atoms.float(), guides.atom_indices
        _check_top_k(top_k, len(atoms), "atoms of the guides")
        coefficients: _Coefficients | _FreeVectors = _Coefficients(len(atoms), top_k, guides.coefficients.float())
    elif dictionary is None or alive is None:
        atoms = torch.eye(guides.vectors.shape[1], device=device)
        mean = torch.stack([tokens.float().mean(dim=0) for tokens in patches]).mean(dim=0)
        coefficients = _FreeVectors(mean.to(device))
        sparsity = 0.0
    else:
        atom_indices = torch.nonzero(alive).squeeze(1)
        if not len(atom_indices):
            msg = "No atom of the dictionary fires on the training images; train the autoencoder longer (sae_epochs)."
            raise ValueError(msg)
        _check_top_k(top_k, len(atom_indices), "atoms that fire on the images")
        atoms = dictionary.detach()[atom_indices]
        coefficients = _Coefficients(len(atoms), top_k).to(device)
    broadcast(coefficients.parameters())
    batch_size = max(1, batch_size // num_processes())

    # The moving average of the coefficients. torch's AveragedModel would make a GPU wait for its counter in every step.
    step, averaged = 0, coefficients.raw.detach().clone()
    optimizer = torch.optim.Adam(coefficients.parameters(), lr=learning_rate, betas=(0.5, 0.999))
    targets = torch.tensor(store.labels, dtype=torch.long, device=device)
    size = (masks[0].shape[0], masks[0].shape[1])

    with tqdm(range(settings.guide_epochs), desc=description, unit="epoch") as progress:
        for _ in progress:
            totals = torch.zeros(3, device=device)
            order = torch.randperm(len(patches))
            ordered = targets[order.to(device)]
            for batch, target in zip(order.split(batch_size), ordered.split(batch_size), strict=True):
                x, cls, mask = (gather(tensors, batch, device) for tensors in (patches, pooled, masks))
                weights = coefficients()
                vectors = weights @ atoms
                cosines = F.normalize(cls, dim=1) @ F.normalize(vectors[:2], dim=1).T
                detection = F.cross_entropy(cosines, target)
                local = torch.sigmoid(anomaly_logit(x, vectors[2], vectors[3], temperature))
                p_anomaly = to_pixels(rearrange(local, "b (h w) -> b h w", h=store.grid[0]), patch_size, size)
                segmentation = focal_loss(p_anomaly, mask) + dice_loss(p_anomaly, mask)
                l1 = sparsity * weights.sum(dim=1).mean()
                optimizer.zero_grad()
                (detection + segmentation + l1).backward()
                average_processes(parameter.grad for parameter in coefficients.parameters())
                optimizer.step()
                decay = min(settings.ema_decay, (1 + step) / (10 + step)) if settings.ema_warmup else settings.ema_decay
                decay = decay if step else 0.0  # the average begins with the first
                averaged = torch.lerp(coefficients.raw.detach(), averaged, decay)
                step += 1
                totals += torch.stack([detection, segmentation, l1]).detach() * len(batch)
            average_processes([totals])
            losses = dict(zip(("detection_loss", "segmentation_loss", "sparsity_loss"), totals.tolist(), strict=True))
            losses = {name: value / len(patches) for name, value in losses.items()}
            progress.set_postfix(loss=f"{sum(losses.values()):.4f}")
            log(losses)

    with torch.no_grad():
        coefficients.raw.copy_(averaged)
        learned = coefficients()
        if dictionary is None and not learn_on:  # each guide is its own atom
            guides.set(F.normalize(learned, dim=1), torch.arange(4, device=device), torch.diag(learned.norm(dim=1)))
            return
        guides.set(atoms, atom_indices, learned)
    empty = [name for name, row in zip(GUIDE_NAMES, guides.coefficients, strict=True) if not row.any()]
    if not guides.coefficients[2:].any():
        msg = (
            f"The guides of {description} have no atom left, so that every patch would get the same score. Lower "
            f"sparsity={settings.sparsity}."
        )
        raise ValueError(msg)
    if empty:
        logger.warning(
            "%s: %s without any atom. Lower sparsity=%s.", description, " and ".join(empty), settings.sparsity
        )
    counts = ", ".join(
        f"{name} {int(n)}" for name, n in zip(GUIDE_NAMES, (guides.coefficients > 0).sum(1), strict=True)
    )
    logger.info("%s: atoms in use of %d alive: %s.", description, len(atom_indices), counts)


def _check_top_k(top_k: int | None, count: int, what: str) -> None:
    if top_k is not None and not 1 <= top_k <= count:
        msg = f"guide_top_k={top_k} must lie between 1 and the {count} {what}."
        raise ValueError(msg)


def save_guides(path: str | Path, guides: Sequence[Guides], metadata: dict[str, Any]) -> Path:
    """Write guides to a safetensors file atomically.

    Args:
        path (str | Path): File to write; folders are created.
        guides (Sequence[Guides]): One set per layer.
        metadata (dict[str, Any]): Plain data stored beside them; see :meth:`SPGModel.metadata`.

    Returns:
        Path: The file.

    Raises:
        OSError: If it cannot be written; an existing file is left unchanged.
    """
    path = Path(path)
    tensors = {
        f"{layer}.{name}": tensor for layer, guide in enumerate(guides) for name, tensor in guide.named_buffers()
    }
    header = {"format": FILE_FORMAT, "version": FILE_VERSION, **{k: json.dumps(v) for k, v in metadata.items()}}
    try:
        save_tensors(path, tensors, header)
    except OSError as exception:
        msg = f"Could not save the guides to '{path}': {exception.strerror or exception}. Make room."
        raise OSError(msg) from exception
    return path


def read_guides(path: str | Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a guides file, and check that it is whole.

    Args:
        path (str | Path): File written by :func:`save_guides`, or its address on the hub, see :func:`local_file`.

    Returns:
        tuple[dict[str, torch.Tensor], dict[str, Any]]: Tensors named ``"<layer number>.<buffer>"``, and the metadata.

    Raises:
        ValueError: If there is no such file, it is unreadable, it is not a guides file, or its contents contradict each
            other.
        RuntimeError: If the hub could not be asked for it.
    """
    try:
        tensors, header = load_tensors(local_file(path))
    except OSError as exception:
        msg = (
            f"Cannot read the guides file '{path}': {exception}. It is the .safetensors file that training SPG leaves."
        )
        raise ValueError(msg) from exception
    if header.pop("format", None) != FILE_FORMAT:
        msg = (
            f"'{path}' is a safetensors file but holds no SPG guides. Pass model weights as weights=, not guides_file=."
        )
        raise ValueError(msg)
    version = header.pop("version", None)
    if version != FILE_VERSION:
        msg = f"'{path}' has guides format {version}, this version reads {FILE_VERSION}. Update anomalib-spg-lake."
        raise ValueError(msg)
    try:
        metadata = {key: json.loads(value) for key, value in header.items()}
    except ValueError as exception:
        fault: str | None = f"its header is no JSON ({exception})"
    else:
        fault = guides_fault(tensors) or _metadata_fault(metadata, len(tensors) // len(BUFFERS))
        if fault is None and not tensors["0.atoms"].numel():
            fault = "it holds no atoms"
    if fault:
        msg = f"The guides file '{path}' is damaged: {fault}. Copy it again, or train SPG again."
        raise ValueError(msg)
    return tensors, metadata


def learned_images(metadata: Mapping[str, Any]) -> frozenset[str]:
    """Digests of the good images that guides were learned from.

    Args:
        metadata (Mapping[str, Any]): Metadata of a guides file.

    Returns:
        frozenset[str]: See :func:`.normal_images.short_digest`; none where they are not recorded.

    Example:
        >>> sorted(learned_images({"trained_on": {"digests": ["0a1b2c3d"]}})), sorted(learned_images({}))
        (['0a1b2c3d'], [])
    """
    trained_on = metadata.get("trained_on")
    digests = trained_on.get("digests") if isinstance(trained_on, dict) else None
    return frozenset(map(str, digests)) if isinstance(digests, list) else frozenset()


def guides_fault(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Find out whether tensors of guides contradict each other.

    Args:
        tensors (Mapping[str, torch.Tensor]): Tensors named ``"<layer number>.<buffer>"``.

    Returns:
        str | None: What is wrong with the first that is, ``None`` if nothing is. Guides that have not been learned yet
        are in order.

    Example:
        >>> guides_fault({f"0.{name}": tensor for name, tensor in Guides(dim=2).named_buffers()}) is None
        True
    """
    layers = range(max(1, len(tensors) // len(BUFFERS)))
    expected = {f"{layer}.{name}" for layer in layers for name in BUFFERS}
    if set(tensors) != expected:
        return f"its tensors are {sorted(tensors)} instead of {sorted(expected)}"
    faults = (_layer_fault(*(tensors[f"{layer}.{name}"] for name in BUFFERS)) for layer in layers)
    return next((f"in layer {layer}, {fault}" for layer, fault in enumerate(faults) if fault), None)


def _layer_fault(
    atoms: torch.Tensor, indices: torch.Tensor, coefficients: torch.Tensor, vectors: torch.Tensor
) -> str | None:
    shapes = [tuple(tensor.shape) for tensor in (atoms, indices, coefficients, vectors)]
    count, dim = len(indices) if indices.ndim else 0, vectors.shape[-1] if vectors.ndim else 0
    if shapes != [(count, dim), (count,), (4, count), (4, dim)]:
        return f"the shapes {dict(zip(BUFFERS, shapes, strict=True))} do not fit together"
    if not dim:
        return "the vectors have no width"
    if indices.is_floating_point() or not all(x.is_floating_point() for x in (atoms, coefficients, vectors)):
        return "a tensor has the wrong type"
    atoms, coefficients, vectors = (tensor.float() for tensor in (atoms, coefficients, vectors))
    apart = (coefficients @ atoms - vectors).abs().max()
    faults = {
        "there are numbers that are not finite": any(not x.isfinite().all() for x in (atoms, coefficients, vectors)),
        "there are negative coefficients or atom indices": (coefficients < 0).any() or (indices < 0).any(),
        "the vectors are not the sums of their atoms": apart > 1e-2 * vectors.abs().max(),  # coarse, for half precision
        "there are atoms that have not length 1": ((atoms.norm(dim=1) - 1).abs() > 1e-2).any(),
        "both guides of the patches are zero, so that every patch would get the same score": count > 0
        and not vectors[2:].any(),
    }
    return next((fault for fault, found in faults.items() if found), None)


def _metadata_fault(metadata: dict[str, Any], layers: int) -> str | None:
    """What is wrong with the metadata of guides for some layers; a value that is missing is not."""

    def are_integers(values: Any, lowest: int, count: int) -> bool:  # noqa: ANN401  # whatever a file holds
        return (
            isinstance(values, list)
            and len(values) == count
            and all(type(value) is int and value >= lowest for value in values)
        )

    temperature, versions = metadata.get("temperature", 1.0), metadata.get("versions", {})
    sound = {
        "backbone": isinstance(metadata.get("backbone", ""), str),
        "layers": "layers" not in metadata or are_integers(metadata["layers"], 0, layers),
        "image_size": "image_size" not in metadata or are_integers(metadata["image_size"], 1, 2),
        "temperature": type(temperature) in {int, float} and 0 < temperature < math.inf,
        "settings": isinstance(metadata.get("settings", {}), dict),
        "versions": isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values()),
    }
    return next((f"its header says {name}={metadata[name]!r}" for name, fits in sound.items() if not fits), None)
