# SPDX-License-Identifier: Apache-2.0

"""Frozen vision transformer that turns images into patch tokens.

Any timm ViT with a token for every patch serves; hybrids with convolutions, BEiT and XCiT do not. The four published
ones are ``vit_large_patch16_dinov3.lvd1689m`` (default), ``vit_large_patch14_dinov2.lvd142m``,
``vit_large_patch14_clip_quickgelu_336.openai`` and ``vit_large_patch16_siglip_384.webli``.
"""

import hashlib
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import timm
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

logger = logging.getLogger(__name__)

DEFAULT_BACKBONE = "vit_large_patch16_dinov3.lvd1689m"


def default_image_size(name: str) -> tuple[int, int]:
    """Image size of the published results: 518 for CLIP, 448 for all others."""
    return (518, 518) if "_clip_" in name else (448, 448)


class _NoDraws(TorchFunctionMode):
    """Leaves out the random numbers that weights begin with, where those of a file replace them all.

    To draw them for a ViT-L takes longer than to read its file.
    """

    DRAWS: ClassVar = {
        *(getattr(torch.Tensor, name) for name in ("uniform_", "normal_", "erfinv_")),
        *(getattr(nn.init, name) for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_")),
    }

    def __torch_function__(  # noqa: PLW3201
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        """Call all other functions."""
        del types
        given = kwargs or {}
        if func in self.DRAWS:
            return args[0] if args else given["tensor"]
        return func(*args, **given)


def is_clip(name: str) -> bool:
    """Whether a timm name is that of a CLIP vision tower that shares a space with a text tower.

    Args:
        name (str): timm model name.

    Returns:
        bool: ``False`` also for CLIP towers fine-tuned for classification, whose head is a classifier.

    Example:
        >>> is_clip("vit_large_patch14_clip_quickgelu_336.openai"), is_clip("vit_base_patch16_clip_224.openai_ft_in1k")
        (True, False)
    """
    return "_clip_" in name.split(".", maxsplit=1)[0] and "_ft_" not in name


class Tokens(NamedTuple):
    """Output of a backbone for a batch of images; one list entry per layer.

    Attributes:
        patches (list[torch.Tensor]): Patch tokens after the final norm (and the visual projection for CLIP), or the raw
            output of the blocks with ``norm=False``, each ``(B, N, D)`` with ``N = h * w`` in row-major order.
        pooled (list[torch.Tensor]): One token per image, each ``(B, D)``: the attention-pooled token where the ViT
            has attention pooling (SigLIP), else the class token, else the mean of the patch tokens. Empty with
            ``norm=False``.
        grid (tuple[int, int]): Rows and columns ``(h, w)`` of patches.
    """

    patches: list[torch.Tensor]
    pooled: list[torch.Tensor]
    grid: tuple[int, int]


class Backbone(nn.Module):
    """Frozen timm ViT giving patch tokens of chosen layers.

    The weights are fetched when they are first needed (a forward pass, or saving), not when the module is built,
    so that restoring a checkpoint never touches the hub.

    Args:
        name (str): timm model name. Defaults to DINOv3-L/16 (paper).
        layers (Sequence[int] | None): 0-based block indices, negative ones count from the end. ``None`` is the last
            block (paper).
        pre_trained (bool): Load weights; ``False`` keeps the random initialisation.
        weights (str | Path | None): Local weights file (safetensors or a PyTorch state dict, in timm's naming) used
            instead of timm's hub. A position grid of another size is resized.
        image_size (tuple[int, int] | None): Height and width the position grid is laid out for. Other sizes work
            too, at the cost of resampling the grid in every forward pass. ``None`` is the size the weights were
            trained with.
        norm (bool): Give tokens after the final norm (and projection). ``False`` gives the raw output of the blocks.

    Attributes:
        has_weights (bool): Whether the weights have been fetched or restored.

    Raises:
        ValueError: If the name is not a timm model, has no patch tokens, or lacks a layer.

    Example:
        >>> backbone = Backbone("vit_tiny_patch16_224", layers=[5, -1], pre_trained=False)
        >>> tokens = backbone(torch.zeros(2, 3, 64, 96))
        >>> tokens.grid, [patches.shape for patches in tokens.patches]
        ((4, 6), [torch.Size([2, 24, 192]), torch.Size([2, 24, 192])])
    """

    vit: Any  # timm's ViTs share no class

    def __init__(
        self,
        name: str = DEFAULT_BACKBONE,
        layers: Sequence[int] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        image_size: tuple[int, int] | None = None,
        norm: bool = True,
    ) -> None:
        super().__init__()
        config = pretrained_config(name)
        if weights is not None and not Path(weights).is_file():
            msg = (
                f"No weights file at '{weights}'. Give a safetensors or PyTorch file in timm's naming for '{name}'; a "
                "fitted checkpoint has its own, so leave weights out (null) where one is loaded."
            )
            raise ValueError(msg)
        self.name = name
        self.weights = weights
        self.norm = norm
        # CLIP's tokens live in the joint space of its visual projection, which timm calls the head. Everywhere else,
        # and in CLIP towers fine-tuned for classification, the head is a classifier and left out.
        self.project = is_clip(name)
        self.vit_arguments: dict[str, Any] = {"dynamic_img_size": True}
        if not self.project:
            self.vit_arguments["num_classes"] = 0
        self.patch_size, _ = _patch_size_and_depth(name)
        if image_size is not None:
            if any(-side % self.patch_size >= side for side in image_size):  # more to pad than there is to reflect
                msg = (
                    f"image_size={tuple(image_size)} is too small for patches of {self.patch_size} pixels of '{name}'."
                )
                raise ValueError(msg)
            self.vit_arguments["img_size"] = tuple(-(-size // self.patch_size) * self.patch_size for size in image_size)
        with _NoDraws() if pre_trained else nullcontext():
            self.vit = timm.create_model(name, pretrained=False, **self.vit_arguments)
        self.vit.requires_grad_(requires_grad=False)
        self.vit.eval()

        self.embed_dim: int = self.vit.num_classes if self.project and norm else self.vit.num_features
        size = self.vit.patch_embed.img_size if image_size is None else image_size
        self.image_size: tuple[int, int] = (size[0], size[1])
        self.mean: tuple[float, ...] = tuple(config["mean"])
        self.std: tuple[float, ...] = tuple(config["std"])
        depth = len(self.vit.blocks)
        wanted = [depth - 1] if layers is None else list(layers)
        outside = [layer for layer in wanted if not -depth <= layer < depth]
        if outside or not wanted:
            msg = f"Backbone '{name}' has blocks 0 to {depth - 1}; layers={wanted} asks for {outside or 'none'}."
            raise ValueError(msg)
        self.layers: list[int] = sorted({layer % depth for layer in wanted})

        self.has_weights = not pre_trained
        self.register_state_dict_pre_hook(_fetch_weights)
        self.register_load_state_dict_pre_hook(_mark_loaded)

    def load_weights(self) -> None:
        """Load the weights unless they are loaded. Called automatically when they are first needed.

        Raises:
            ValueError: If the local file does not fit; the message names missing and unexpected keys.
            RuntimeError: If the hub cannot be reached; the message says how to use a local file.
        """
        if self.has_weights:
            return
        if self.weights is not None:
            self.load_state(read_weights(self.weights), self.weights)
        else:
            try:
                with _NoDraws():
                    source = timm.create_model(self.name, pretrained=True, **self.vit_arguments)
            except Exception as exception:
                msg = (
                    f"Could not get the weights of '{self.name}' from timm's hub ({type(exception).__name__}: "
                    f"{exception}). Without internet, copy its model.safetensors here and pass weights=<path> "
                    "(--model.weights on the command line)."
                )
                raise RuntimeError(msg) from exception
            self.vit.load_state_dict(source.state_dict())
        self.has_weights = True

    def fingerprint(self) -> str:
        """Digest of some values of every parameter, by which other weights are told apart.

        Returns:
            str: Hexadecimal digits.
        """
        self.load_weights()
        values = torch.cat([parameter.detach().flatten()[:64].float().cpu() for parameter in self.vit.parameters()])
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]

    def load_state(self, state: dict[str, Any], source: str | Path) -> None:
        """Load weights strictly; timm's own loader ignores missing keys where the head is left out.

        Args:
            state (dict[str, Any]): State dict in timm's naming, or one timm converts to it (OpenCLIP, DINOv2).
            source (str | Path): Where it comes from, for the message.

        Raises:
            ValueError: If it does not fit, or holds values that are not finite; the message names the keys.
        """
        try:
            # timm's converter of a model family: original names to timm's, position grids to the model's size.
            convert = getattr(sys.modules[type(self.vit).__module__], "checkpoint_filter_fn", None)
            state = convert(state, self.vit) if convert else state
            if not self.project:
                state = {key: value for key, value in state.items() if not key.startswith("head.")}
            self.vit.load_state_dict(state)
        except Exception as exception:
            msg = f"Weights file '{source}' does not fit backbone '{self.name}': {exception}"
            raise ValueError(msg) from exception
        broken = [name for name, tensor in self.vit.state_dict().items() if not tensor.isfinite().all()]
        if broken:
            msg = (
                f"Weights file '{source}' holds values that are not finite in {len(broken)} tensors, the first is "
                f"'{broken[0]}'. Get the file again."
            )
            raise ValueError(msg)
        self.has_weights = True

    def __getstate__(self) -> dict[str, Any]:
        """Include the weights when pickling (export to torch, spawned workers)."""
        self.load_weights()
        return self.__dict__.copy()

    def train(self, mode: bool = True) -> "Backbone":
        """Stay in evaluation mode: the backbone is frozen."""
        del mode
        return super().train(mode=False)

    def forward(self, images: torch.Tensor) -> Tokens:
        """Compute tokens; images that are no multiple of the patch size are padded by reflection at bottom and right.

        Args:
            images (torch.Tensor): Normalised images ``(B, 3, H, W)``, or grey ones ``(B, 1, H, W)``.

        Returns:
            Tokens: Patch tokens and pooled token per layer, in the precision of the weights also under autocast, and
            the patch grid ``(ceil(H / p), ceil(W / p))``.
        """
        if not torch.compiler.is_compiling():
            self.load_weights()
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        height, width = images.shape[-2:]
        bottom, right = -height % self.patch_size, -width % self.patch_size
        if bottom or right:
            images = F.pad(images, (0, right, 0, bottom), mode="reflect")
        grid = ((height + bottom) // self.patch_size, (width + right) // self.patch_size)

        with torch.no_grad():
            intermediates = self.vit.forward_intermediates(
                images,
                indices=self.layers,
                return_prefix_tokens=self.vit.num_prefix_tokens > 0,
                norm=self.norm,
                stop_early=True,  # skip the blocks after the last one asked for
                output_fmt="NLC",
                intermediates_only=True,
            )
            patches, pooled = [], []
            for intermediate in intermediates:
                patch, prefix = intermediate if self.vit.num_prefix_tokens else (intermediate, None)
                if not self.norm:
                    patches.append(patch)
                    continue
                if getattr(self.vit, "attn_pool", None) is not None:
                    pool = self.vit.attn_pool(patch)
                elif getattr(self.vit, "cls_token", None) is not None and prefix is not None:
                    pool = prefix[:, 0]
                else:
                    pool = patch.mean(dim=1)
                patches.append(self.vit.head(patch) if self.project else patch)
                pooled.append(self.vit.head(pool) if self.project else pool)
        dtype = next(self.vit.parameters()).dtype  # autocast may have left tokens in half precision
        return Tokens([tokens.to(dtype) for tokens in patches], [tokens.to(dtype) for tokens in pooled], grid)

    def embed(self, patches: torch.Tensor) -> torch.Tensor:
        """Apply final norm (and CLIP's visual projection) to raw tokens.

        Args:
            patches (torch.Tensor): Tokens ``(B, N, D)`` from ``norm=False``.

        Returns:
            torch.Tensor: Tokens as ``norm=True`` gives them.
        """
        patches = self.vit.norm(patches)
        return self.vit.head(patches) if self.project else patches


def read_weights(path: str | Path) -> dict[str, Any]:
    """Read a weights file without running any code in it.

    Args:
        path (str | Path): Safetensors or PyTorch state dict.

    Returns:
        dict[str, Any]: State dict.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        return timm.models.load_state_dict(str(path), weights_only=True)
    except Exception as exception:
        msg = f"Cannot read weights file '{path}': {exception} Give a safetensors file or a PyTorch state dict."
        raise ValueError(msg) from exception


def pretrained_config(name: str) -> dict[str, Any]:
    """Get timm's description of a model's weights (mean, std, input size) without building it.

    Args:
        name (str): timm model name.

    Returns:
        dict[str, Any]: timm's pretrained configuration.

    Raises:
        ValueError: If timm has no such model; the message suggests close names.

    Example:
        >>> pretrained_config("vit_large_patch16_siglip_384.webli")["mean"]
        (0.5, 0.5, 0.5)
    """
    if not timm.models.is_model(name):
        from difflib import get_close_matches

        close = get_close_matches(name, [*timm.list_models("*vit*"), *timm.list_pretrained("*vit*")])
        msg = f"timm has no model '{name}'." + (f" Did you mean one of {close}?" if close else "")
        raise ValueError(msg)
    config = timm.get_pretrained_cfg(name)
    if config is None:
        msg = (
            f"timm knows '{name}' but no weights under that tag. See timm.list_pretrained('{name.partition('.')[0]}*')."
        )
        raise ValueError(msg)
    return config.to_dict()


def num_blocks(name: str) -> int:
    """Get the depth of a timm ViT without allocating its weights.

    Args:
        name (str): timm model name.

    Returns:
        int: Number of blocks.

    Raises:
        ValueError: If there is no such model, or it is no ViT with patch tokens.

    Example:
        >>> num_blocks("vit_large_patch16_dinov3.lvd1689m")
        24
    """
    return _patch_size_and_depth(name)[1]


def warn_of_other_timm(recorded: str | None, source: str | Path) -> None:
    """Say when what was learned elsewhere is used with a timm that may compute other tokens.

    Args:
        recorded (str | None): Version of timm that was learned with, if that is known.
        source (str | Path): Where it is recorded, for the message.

    Example:
        >>> warn_of_other_timm(timm.__version__, "guides.safetensors")
    """
    if recorded is not None and recorded.split(".")[:2] != timm.__version__.split(".")[:2]:
        logger.warning(
            "'%s' was learned with timm %s, this is timm %s. If that computes other tokens, scores change: look at "
            "images you know, or install timm %s.",
            source,
            recorded,
            timm.__version__,
            recorded,
        )


@cache
def _patch_size_and_depth(name: str) -> tuple[int, int]:
    """Those of a timm ViT, whose weights are not allocated; refuse what gives no token for each patch of any image."""
    pretrained_config(name)
    try:
        with torch.device("meta"), torch.no_grad():
            model: Any = timm.create_model(name, pretrained=False, dynamic_img_size=True).eval()
            height, width = (count * size for count, size in zip((2, 3), model.patch_embed.patch_size, strict=True))
            tokens = model.forward_intermediates(
                torch.empty(1, 3, height, width), indices=[0], output_fmt="NLC", intermediates_only=True
            )[0]
        fits = hasattr(model, "blocks") and hasattr(model, "num_prefix_tokens") and tokens.shape[1] == 6
    except (
        AssertionError,
        AttributeError,
        RuntimeError,
        TypeError,
        ValueError,
    ):  # each architecture fails in its own way
        fits = False
    if not fits:
        msg = (
            f"'{name}' is not a vision transformer with a token for every patch. Choose one of "
            "timm.list_models('vit_*_patch*')."
        )
        raise ValueError(msg)
    return model.patch_embed.patch_size[0], len(model.blocks)


def _fetch_weights(module: Backbone, *_: Any) -> None:
    """Fetch the weights before saving. Not a lambda, because hooks are pickled with the module."""
    module.load_weights()


def _mark_loaded(module: Backbone, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Do not fetch the weights if a checkpoint brings them."""
    if any(key.startswith(f"{prefix}vit.") for key in state_dict):
        module.has_weights = True
