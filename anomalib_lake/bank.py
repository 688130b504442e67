# SPDX-License-Identifier: Apache-2.0

"""Normality bank: normal patch tokens of one layer, and the distance of a patch to the nearest of them."""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from anomalib.models.components import DynamicBufferMixin
from einops import rearrange
from torch import nn
from torch.nn import functional as F  # noqa: N812
from tqdm import tqdm

from anomalib_spg.components.own_image import TABLE, kept_patches

# One normal patch in a hundred exceeds a deviation of 1. The score is a maximum over patches, so the tail of the
# distances counts; divided by their mean, the scale with the longer tail would dominate the other.
QUANTILE = 0.99
# Most distances that a CPU computes at a time: 4 MiB, which stay in its cache.
CACHED = 2**20
# Bank tokens that an export compares at a time.
CHUNK = 512
# Bank tokens of which only the nearest is looked at first, where several are asked for.
GROUP = 16
# Farthest tokens that k-center greedy looks at in one go.
AHEAD = 256


class NormalityBank(DynamicBufferMixin, nn.Module):
    """Normal patch tokens and the distance scale among them.

    Distances are Euclidean. They are divided by the 99 % quantile of the normal patches' leave-one-image-out distances,
    so that 1 means the same for every product, backbone, layer and scale.

    However many images come, no more than twice ``size`` tokens are kept. Whenever there are more, k-center greedy,
    PatchCore's coreset, reduces them to ``size``. It leaves no token farther than a radius from those it keeps; from
    then on a token within that radius is not kept, since the bank explains it as well as it does those left out. Where
    there is room for all tokens, all are kept.

    Args:
        size (int | None): Maximum number of tokens. ``None`` keeps all.
        num_neighbors (int): Nearest tokens whose distances are averaged.

    Attributes:
        tokens (torch.Tensor): Kept tokens ``(M, K)``.
        image_indices (torch.Tensor): Index of the normal image each of them is from ``(M,)``.
        patch_indices (torch.Tensor): Index of the patch in that image ``(M,)``.
        distance_scale (torch.Tensor): The 99 % quantile of the leave-one-image-out distances, a scalar.
        radius (float): While images are added, the distance up to which a token is not kept; 0 while all are.

    Example:
        >>> bank = NormalityBank()
        >>> _ = bank.fit(torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 2.0], [1.0, 2.0]]]), grid=(1, 2))
        >>> bank.distance_scale
        tensor(2.)
        >>> bank(torch.tensor([[[0.0, 1.0], [1.0, 6.0]]]))
        tensor([[0.5000, 2.0000]])
    """

    def __init__(self, size: int | None = None, num_neighbors: int = 1) -> None:
        super().__init__()
        if size is not None and size < 1:
            msg = f"bank_size={size} must be at least 1, or None to keep every token."
            raise ValueError(msg)
        if num_neighbors < 1:
            msg = f"num_neighbors={num_neighbors} must be at least 1, which takes the distance to the nearest token."
            raise ValueError(msg)
        self.size = size
        self.num_neighbors = num_neighbors
        self.register_buffer("tokens", torch.empty(0))
        self.register_buffer("image_indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("patch_indices", torch.empty(0, dtype=torch.long))
        self.register_buffer("distance_scale", torch.ones(()))
        self.tokens: torch.Tensor
        self.image_indices: torch.Tensor
        self.patch_indices: torch.Tensor
        self.distance_scale: torch.Tensor
        self.forget()

    def forget(self) -> None:
        """Forget the tokens that were added since the last fit."""
        self.radius = 0.0
        self._added: list[tuple[torch.Tensor, ...]] = []  # tokens, their images, their patches

    @property
    def num_added(self) -> int:
        """Tokens that were added since the last fit and are kept."""
        return sum(len(rows[0]) for rows in self._added)

    def add(self, tokens: torch.Tensor, numbers: Sequence[int], grid: tuple[int, int], stride: int = 1) -> None:
        """Take up normal images, one after the other, before :meth:`fit`.

        Args:
            tokens (torch.Tensor): Projected patch tokens of the normal images ``(I, N, K)``.
            numbers (Sequence[int]): Their numbers among the normal images.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Keep only the tokens of every ``stride``-th row and column.
        """
        kept = kept_patches(grid, stride, tokens.device)
        for number, image in zip(numbers, tokens[:, kept], strict=True):
            self.add_image(image, kept, number)

    def add_image(self, tokens: torch.Tensor, patches: torch.Tensor, number: int) -> None:
        """Take up tokens of one normal image.

        Args:
            tokens (torch.Tensor): Projected tokens ``(M, K)``.
            patches (torch.Tensor): The patches of the image that they show ``(M,)``.
            number (int): Its number among the normal images.
        """
        worth = self._is_worth_keeping(tokens)
        self._added.append((tokens[worth], torch.full_like(patches, number)[worth], patches[worth]))
        if self.size is not None and self.num_added > 2 * self.size:
            self._reduce()

    def fit(
        self,
        tokens: torch.Tensor,
        grid: tuple[int, int],
        stride: int = 1,
        numbers: Sequence[int] | None = None,
        copies: Sequence[tuple[torch.Tensor, torch.Tensor]] | None = None,
        most: int | None = None,
    ) -> None:
        """Fill the bank with the images added before and some more, whose distances to the others are the scale.

        Args:
            tokens (torch.Tensor): Projected patch tokens of further normal images ``(I, N, K)``.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): Keep only the tokens of every ``stride``-th row and column.
            numbers (Sequence[int] | None): Their numbers among the normal images. ``None`` counts from 0.
            copies (Sequence[tuple[torch.Tensor, torch.Tensor]] | None): Of each of them the tokens ``(M, K)`` that its
                copies add, and the patches ``(M,)`` that these show. ``None`` where there are no copies.
            most (int | None): Keep no more tokens than this, even where there is room. ``None`` fills the bank.

        Raises:
            ValueError: If every normal patch has an exact copy in another image, so that the distances vanish.
        """
        self._reduce()
        kept = kept_patches(grid, stride, tokens.device)
        images = [(image, kept) for image in tokens[:, kept]]
        if copies is not None:
            images = [
                (torch.cat([image, copied]), torch.cat([patches, shown]))
                for (image, patches), (copied, shown) in zip(images, copies, strict=True)
            ]
        distances = self._leave_one_out(tokens, grid, kept, [rows for rows, _ in images])
        self.distance_scale = distances.quantile(QUANTILE)
        if not self.distance_scale > 2e-3 * tokens.norm(dim=-1).mean():  # what rounding alone gives
            msg = "The normal images are copies of each other, or all of one colour. Give images that differ."
            raise ValueError(msg)
        for number, (rows, patches) in zip(range(len(tokens)) if numbers is None else numbers, images, strict=True):
            self.add_image(rows, patches, number)
        self._reduce(most)
        self.tokens, self.image_indices, self.patch_indices = (
            torch.cat(values) for values in zip(*self._added, strict=True)
        )
        self.forget()

    def _is_worth_keeping(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which of the tokens ``(M, K)`` are farther than the radius from those kept; while there is room, all."""
        if self.radius == 0:
            return torch.ones_like(tokens[:, 0], dtype=torch.bool)
        return nearest(tokens, torch.cat([rows[0] for rows in self._added])) > self.radius

    def _reduce(self, most: int | None = None) -> None:
        """Keep a coreset if there are more tokens than the bank may have, or than so many."""
        size = min((limit for limit in (self.size, most) if limit is not None), default=self.num_added)
        if self.num_added <= size:
            return
        rows = [torch.cat(values) for values in zip(*self._added, strict=True)]
        chosen, self.radius = k_center_greedy(rows[0], size)
        self._added = [tuple(values[chosen] for values in rows)]

    def _leave_one_out(
        self, tokens: torch.Tensor, grid: tuple[int, int], kept: torch.Tensor, images: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Distance of images to those added before and what the others give the bank; of one alone, to its quarters."""
        others = [rows[0] for rows in self._added]
        if len(images) > 1 or others:
            bank = [image[self._is_worth_keeping(image)] for image in images]
            return torch.stack([
                nearest(image, torch.cat([*others, *bank[:index], *bank[index + 1 :]]), self.num_neighbors)
                for index, image in enumerate(tokens)
            ])
        return self._between_quarters(tokens[0], grid, kept)[None]

    def _between_quarters(self, tokens: torch.Tensor, grid: tuple[int, int], kept: torch.Tensor) -> torch.Tensor:
        """Distance of an image's tokens ``(N, K)`` to those that are kept of its other quarters."""
        numbers = torch.arange(len(tokens), device=tokens.device)
        quarter = numbers // grid[1] * 2 // grid[0] * 2 + numbers % grid[1] * 2 // grid[1]
        distances = torch.zeros_like(tokens[:, 0])
        for part in quarter.unique():
            elsewhere = tokens[kept[quarter[kept] != part]]
            if len(elsewhere):
                distances[quarter == part] = nearest(tokens[quarter == part], elsewhere, self.num_neighbors)
        return distances

    def leave_out(self, tokens: torch.Tensor, number: int, grid: tuple[int, int], stride: int = 1) -> torch.Tensor:
        """Compute the structural deviation of an image that the bank holds, as of a new one.

        It is compared with the other images only, a single one with its other quarters. That is corrected by what one
        image less raises the deviation, see :func:`leave_one_out_correction`.

        Args:
            tokens (torch.Tensor): Projected patch tokens of the image ``(1, N, K)``.
            number (int): Its number among the normal images.
            grid (tuple[int, int]): Rows and columns of patches, ``N = rows * columns``.
            stride (int): As it was taken up with.

        Returns:
            torch.Tensor: Deviation of each patch ``(1, N)``.
        """
        others = self.tokens[self.image_indices != number]
        if len(others):
            distances = nearest(tokens, others, self.num_neighbors)
        else:
            distances = self._between_quarters(tokens[0], grid, kept_patches(grid, stride, tokens.device))[None]
        images = len(self.image_indices.unique())
        return distances / self.distance_scale * leave_one_out_correction(images)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the structural deviation.

        Args:
            tokens (torch.Tensor): Projected patch tokens ``(B, N, K)``.

        Returns:
            torch.Tensor: Distance to the nearest bank tokens, divided by the distance scale ``(B, N)``.
        """
        if torch.compiler.is_compiling() or tokens.device.type != "cpu":
            distances = nearest(tokens, self.tokens, self.num_neighbors)
        else:  # image by image, so that the table of distances stays in the cache
            distances = torch.stack([nearest(image, self.tokens, self.num_neighbors) for image in tokens])
        return distances / self.distance_scale


def stride_of(scale: int) -> int:
    """Rows and columns from one kept window to the next: windows that overlap by half or more are nearly the same.

    Args:
        scale (int): Side of the windows in patches.

    Returns:
        int: 1 for single patches, 2 for windows of 3.
    """
    return scale // 2 + 1


def reference_images(count: int) -> list[int]:
    """Indices of the reference images, whose distances to the others are the scale: at most 8, spread over all.

    Args:
        count (int): Number of normal images.

    Returns:
        list[int]: Indices.

    Example:
        >>> reference_images(4), reference_images(15)
        ([0, 1, 2, 3], [0, 2, 4, 6, 8, 10, 12, 14])
    """
    return sorted({round(number) for number in torch.linspace(0, count - 1, 8).tolist()})


def leave_one_out_correction(images: int) -> float:
    r"""What leave-one-out deviations from the bank are multiplied with to estimate those of new good images.

    A bank with one image less has fewer neighbours to offer. Measured on twelve small datasets, the logarithm of the
    highest deviation of an image is too high by about :math:`0.09 \ln(k / (k - 1))` with :math:`k` images. Of several
    tokens that are alike a bank that is thinned holds one, which may be the image's own; what that adds, about 0.02, is
    left, so that rather fewer good parts are rejected than named. The quarters of a single image say little about other
    images; with 0.05 new good parts exceed the threshold at the named rate on the average of seven datasets.

    Args:
        images (int): Normal images.

    Returns:
        float: Factor below 1.

    Example:
        >>> round(leave_one_out_correction(1), 3), round(leave_one_out_correction(4), 3)
        (0.951, 0.974)
    """
    return math.exp(-0.05) if images == 1 else ((images - 1) / images) ** 0.09


def k_center_greedy(tokens: torch.Tensor, size: int) -> tuple[torch.Tensor, float]:
    """PatchCore's coreset: the token farthest from those chosen, again and again, beginning with the first.

    Of the few farthest tokens many are chosen before any other could be, so their distances to all are one product of
    matrices; one by one they take five times as long.

    Args:
        tokens (torch.Tensor): Tokens ``(M, K)``.
        size (int): How many to choose, at most M.

    Returns:
        tuple[torch.Tensor, float]: Numbers of the chosen tokens ``(size,)``, and the radius: the largest distance of
        any other token to the nearest chosen one.

    Example:
        >>> chosen, radius = k_center_greedy(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), size=3)
        >>> chosen.tolist(), radius
        ([0, 3, 2], 1.0)
    """
    lengths = tokens.square().sum(dim=1)
    squares = torch.full_like(lengths, float("inf"))  # of the distance to the nearest chosen token
    chosen = torch.empty(0, dtype=torch.long, device=tokens.device)
    new = torch.zeros(1, dtype=torch.long, device=tokens.device)
    with tqdm(total=size, desc="coreset of the normal patches", unit="patch", delay=3) as progress:
        while True:
            others = torch.addmm(lengths[new], tokens, tokens[new].T, alpha=-2).amin(dim=1)
            squares = torch.minimum(squares, (lengths + others).clamp(min=0))
            squares[new] = -1  # never again
            chosen = torch.cat([chosen, new])
            progress.update(len(new))
            if len(chosen) == size:
                return chosen, float(squares.amax().clamp(min=0).sqrt())
            farthest, rows = squares.topk(min(AHEAD, len(squares)))
            among = torch.cdist(tokens[rows], tokens[rows]).square().cpu()
            farthest = farthest.cpu()  # a GPU would be waited for at each of them
            least = farthest[-1].clamp(min=0)  # no other token is farther
            picked: list[int] = []
            while len(picked) < size - len(chosen) and farthest.amax() >= least:
                picked.append(int(farthest.argmax()))
                farthest = torch.minimum(farthest, among[picked[-1]])
                farthest[picked[-1]] = -1
            new = rows[picked]


def nearest(tokens: torch.Tensor, bank: torch.Tensor, num_neighbors: int = 1) -> torch.Tensor:
    """Euclidean distance to the nearest tokens of a bank.

    Args:
        tokens (torch.Tensor): Tokens ``(..., N, K)``.
        bank (torch.Tensor): Bank ``(M, K)``.
        num_neighbors (int): Nearest tokens whose distances are averaged; all, where there are fewer.

    Returns:
        torch.Tensor: Distances ``(..., N)``.

    Example:
        >>> bank = torch.tensor([[0.0], [1.0], [5.0]])
        >>> nearest(torch.tensor([[2.0]]), bank), nearest(torch.tensor([[2.0]]), bank, num_neighbors=2)
        (tensor([1.]), tensor([1.5000]))
    """
    # |t - b|^2 = |t|^2 - 2 (t.b - |b|^2 / 2): the nearest b has the largest bracket. It is one product of (t, 1) and
    # (b, -|b|^2 / 2): a bias would do the same, but OpenVINO computes it in half precision.
    with_one = torch.cat([tokens, torch.ones_like(tokens[..., :1])], dim=-1)
    with_length = torch.cat([bank, bank.square().sum(dim=1, keepdim=True) / -2], dim=1)
    if num_neighbors == 1 and torch.compiler.is_compiling():  # OpenVINO takes parts of the bank a sixth faster
        brackets = reduce(torch.maximum, [_highest(with_one @ part.T, 1) for part in with_length.split(CHUNK)])
    else:
        at_a_time = CACHED if tokens.device.type == "cpu" else TABLE // tokens[..., 0, 0].numel()
        parts = with_one.split(max(1, at_a_time // len(bank)), dim=-2)
        brackets = torch.cat([_highest(part @ with_length.T, num_neighbors) for part in parts], dim=-2)
    squares = tokens.square().sum(dim=-1, keepdim=True) - 2 * brackets
    return squares.clamp(min=0).sqrt().mean(dim=-1)


def _highest(table: torch.Tensor, count: int) -> torch.Tensor:
    """Highest values of each row of a table ``(..., M)``: ``(..., count)``, or all ``M`` where there are fewer."""
    if count == 1:
        return table.amax(dim=-1, keepdim=True)
    columns = table.shape[-1] // GROUP * GROUP
    if columns <= count * GROUP:
        return table.topk(min(count, table.shape[-1]), dim=-1).values
    # They lie in the groups that have the highest maxima: a maximum is found much faster than the highest few.
    groups = table[..., :columns].unflatten(-1, (GROUP, -1))
    best = groups.amax(dim=-2, keepdim=True).topk(count, dim=-1).indices
    among = groups.gather(-1, best.expand(*groups.shape[:-1], -1)).flatten(-2)
    return torch.cat([among, table[..., columns:]], dim=-1).topk(count, dim=-1).values


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
