# SPDX-License-Identifier: Apache-2.0

"""Normality bank: normal patch tokens of one layer, and the distance of a patch to the nearest of them."""

import torch
from anomalib.models.components import DynamicBufferMixin, KCenterGreedy
from einops import rearrange
from torch import nn
from torch.nn import functional as F  # noqa: N812

# One normal patch in a hundred exceeds a deviation of 1. The score is a maximum over patches, so the tail of the
# distances counts; divided by their mean, the scale with the longer tail would dominate the other.
QUANTILE = 0.99
# Bank tokens compared at a time: large enough for the matrix product, small enough for the cache.
CHUNK = 512


class NormalityBank(DynamicBufferMixin, nn.Module):
    """Normal patch tokens and the distance scale among them.

    Distances are Euclidean. They are divided by the 99 % quantile of the normal patches' leave-one-image-out distances,
    so that 1 means the same for every product, backbone, layer and scale.

    Args:
        size (int | None): Maximum number of tokens; anomalib's k-center greedy reduces more to a coreset. ``None``
            keeps all.

    Attributes:
        tokens (torch.Tensor): Kept tokens ``(M, K)``.
        image_indices (torch.Tensor): Index of the normal image each of them is from ``(M,)``.
        patch_indices (torch.Tensor): Index of the patch in that image ``(M,)``.
        distance_scale (torch.Tensor): The 99 % quantile of the leave-one-image-out distances, a scalar.

    Example:
        >>> bank = NormalityBank()
        >>> _ = bank.fit(torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 2.0]]]), grid=(1, 2))
        >>> bank.distance_scale
        tensor(2.)
        >>> bank(torch.tensor([[[0.0, 1.0], [1.0, 6.0]]]))
        tensor([[0.5000, 2.0000]])
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        if size is not None and size < 1:
            msg = f"bank_size={size} must be at least 1, or None to keep every token."
            raise ValueError(msg)
        self.size = size
        self.register_buffer("tokens", torch.empty(0))
        self.register_buffer("image_indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("patch_indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("distance_scale", torch.ones(()))
        self.tokens: torch.Tensor
        self.image_indices: torch.Tensor
        self.patch_indices: torch.Tensor
        self.distance_scale: torch.Tensor

    def fit(self, tokens: torch.Tensor, grid: tuple[int, int], stride: int = 1) -> torch.Tensor:
        """Fill the bank.

        Args:
            tokens (torch.Tensor): Projected patch tokens of the normal images ``(I, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Keep only the tokens of every ``stride``-th row and column.

        Returns:
            torch.Tensor: Deviation of each patch of the images in :func:`left_out_images` from the other images
            ``(J, N)``; of a single image, from its other quarters.

        Raises:
            ValueError: If every normal patch has an exact copy in another image, so that the distances vanish.
        """
        images = len(tokens)
        kept = kept_patches(grid, stride, tokens.device)
        distances = self._leave_one_out(tokens, grid, kept)
        self.distance_scale = distances.quantile(QUANTILE)
        if not self.distance_scale > 2e-3 * tokens.norm(dim=-1).mean():  # what rounding alone gives
            msg = "The normal images are copies of each other, or all of one colour. Give images that differ."
            raise ValueError(msg)
        self.tokens = tokens[:, kept].flatten(0, 1).contiguous()
        self.image_indices = torch.arange(images, device=tokens.device).repeat_interleave(len(kept))
        self.patch_indices = kept.repeat(images)
        if self.size is not None and self.size < len(self.tokens):
            # Half a token more: the sampler rounds the product down.
            sampler = KCenterGreedy(self.tokens, sampling_ratio=(self.size + 0.5) / len(self.tokens))
            coreset = torch.tensor(sampler.select_coreset_idxs(), device=tokens.device)
            self.tokens, self.image_indices, self.patch_indices = (
                values[coreset] for values in (self.tokens, self.image_indices, self.patch_indices)
            )
        return distances / self.distance_scale

    @staticmethod
    def _leave_one_out(tokens: torch.Tensor, grid: tuple[int, int], kept: torch.Tensor) -> torch.Tensor:
        """Distance of patches to the kept ones of the other images; of a single image, to those of its other quarters.

        At most 8 images, evenly spread, are held out in turn: more hardly change a quantile of thousands of patches.
        """
        images, patches = tokens.shape[:2]
        bank = tokens[:, kept]
        if images > 1:
            return torch.stack([
                nearest(tokens[index], torch.cat([bank[:index], bank[index + 1 :]]).flatten(0, 1))
                for index in left_out_images(images)
            ])
        numbers = torch.arange(patches, device=tokens.device)
        quarter = numbers // grid[1] * 2 // grid[0] * 2 + numbers % grid[1] * 2 // grid[1]
        distances = torch.zeros_like(tokens[..., 0])
        for part in quarter.unique():
            others = bank[0, quarter[kept] != part]
            if len(others):
                distances[0, quarter == part] = nearest(tokens[0, quarter == part], others)
        return distances

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the structural deviation.

        Args:
            tokens (torch.Tensor): Projected patch tokens ``(B, N, K)``.

        Returns:
            torch.Tensor: Distance to the nearest bank token, divided by the distance scale ``(B, N)``.
        """
        if torch.compiler.is_compiling():
            distances = nearest(tokens, self.tokens)
        else:  # image by image, so that the table of distances stays in the cache
            distances = torch.stack([nearest(image, self.tokens) for image in tokens])
        return distances / self.distance_scale


def kept_patches(grid: tuple[int, int], stride: int, device: torch.device | None = None) -> torch.Tensor:
    """Numbers of the patches in every ``stride``-th row and column.

    Args:
        grid (tuple[int, int]): Rows and columns of patches.
        stride (int): 1 keeps all.
        device (torch.device | None): Where the numbers are needed.

    Returns:
        torch.Tensor: Numbers, row by row.

    Example:
        >>> kept_patches((3, 4), stride=2).tolist()
        [0, 2, 8, 10]
    """
    numbers = torch.arange(grid[0] * grid[1], device=device)
    return numbers[(numbers // grid[1] % stride == 0) & (numbers % grid[1] % stride == 0)]


def stride_of(scale: int) -> int:
    """Rows and columns from one kept window to the next: windows that overlap by half or more are nearly the same.

    Args:
        scale (int): Side of the windows in patches.

    Returns:
        int: 1 for single patches, 2 for windows of 3.
    """
    return scale // 2 + 1


def left_out_images(count: int) -> list[int]:
    """Indices of the normal images that are compared with the others: at most 8, spread over all.

    Args:
        count (int): Number of normal images.

    Returns:
        list[int]: Indices.

    Example:
        >>> left_out_images(4), left_out_images(15)
        ([0, 1, 2, 3], [0, 2, 4, 6, 8, 10, 12, 14])
    """
    return sorted({round(number) for number in torch.linspace(0, count - 1, 8).tolist()})


def nearest(tokens: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Euclidean distance to the nearest token of a bank.

    Args:
        tokens (torch.Tensor): Tokens ``(..., K)``.
        bank (torch.Tensor): Bank ``(M, K)``.

    Returns:
        torch.Tensor: Distances ``(...)``.
    """
    # |t - b|^2 = |t|^2 - 2 (t.b - |b|^2 / 2): the nearest b has the largest bracket. It is one product of (t, 1) and
    # (b, -|b|^2 / 2): a bias would do the same, but OpenVINO computes it in half precision.
    queries = tokens.flatten(0, -2)
    with_one = torch.cat([queries, torch.ones_like(queries[:, :1])], dim=1)
    bank = torch.cat([bank, bank.square().sum(dim=1, keepdim=True) / -2], dim=1)
    brackets = [(with_one @ chunk.T).amax(dim=1) for chunk in bank.split(CHUNK)]
    squares = queries.square().sum(dim=1) - 2 * torch.stack(brackets).amax(dim=0)
    return squares.clamp(min=0).sqrt().view(tokens.shape[:-1])


def average_neighbors(tokens: torch.Tensor, grid: tuple[int, int], scale: int) -> torch.Tensor:
    """Average each patch token with its neighbours.

    Args:
        tokens (torch.Tensor): Patch tokens ``(B, N, D)``.
        grid (tuple[int, int]): Rows and columns of patches.
        scale (int): Side of the window in patches, odd; 1 leaves the tokens as they are.

    Returns:
        torch.Tensor: Averaged tokens ``(B, N, D)``; windows are cut at the image's edge.

    Example:
        >>> average_neighbors(torch.tensor([[[0.0], [3.0], [6.0]]]), grid=(1, 3), scale=3).flatten().tolist()
        [1.5, 3.0, 4.5]
    """
    if scale == 1:
        return tokens
    maps = rearrange(tokens, "b (h w) d -> b d h w", h=grid[0])
    maps = F.avg_pool2d(maps, scale, stride=1, padding=scale // 2, count_include_pad=False)
    return rearrange(maps, "b d h w -> b (h w) d")
