# SPDX-License-Identifier: Apache-2.0

"""Synthetic anomalies with known masks, drawn on normal images.

This goes beyond the paper, which learns from a labelled auxiliary dataset only. A drawn anomaly is a shape (where)
filled with a content (what), blended in with a random strength. All draws come from torch's global CPU generator, so
the seed decides them. Images may be on any scale (normalised or not): contents take their levels from the image.
"""

import math

import torch
from anomalib.data.utils.generators.perlin import generate_perlin_noise
from kornia.filters import motion_blur
from torch.nn import functional as F  # noqa: N812
from torchvision.transforms.v2.functional import gaussian_blur

SHAPES = ("blob", "ellipse", "scratch", "speckle", "perlin")
CONTENTS = ("foreign", "paste", "smear", "grain", "tone", "contrast")
# Share of the images' range that is no change.
UNCHANGED = 1e-6
# Least deviation that contents take their levels from, as a share of the images' range: an image of a single colour has
# none of its own.
LEAST_STD = 0.02


class AnomalySynthesizer:
    """Draw synthetic anomalies on a batch of normal images.

    Args:
        probability (float): Share of images that get an anomaly; the others are returned as they are.
            Defaults to 0.5 (ours).
        size (tuple[float, float]): Smallest and largest extent of an anomaly as a share of the image's shorter side,
            drawn log-uniformly. Defaults to ``(0.02, 0.4)`` (ours).
        max_anomalies (int): Maximum number of anomalies on one image. Defaults to 3 (ours).
        strength (tuple[float, float]): Range of the blending weight of the content. Defaults to ``(0.4, 1.0)`` (ours).
        contents (tuple[str, ...]): Kinds of content to choose from: ``"foreign"`` (a piece of another image, stretched
            and turned, or a procedural pattern), ``"paste"`` (a turned piece of the same image), ``"smear"`` (blur
            along a direction), ``"grain"`` (noise, or shuffled pixels), ``"tone"`` (one colour), ``"contrast"`` (the
            same place with other brightness and contrast). Defaults to all.
        shapes (tuple[str, ...]): Kinds of shape to choose from: ``"blob"``, ``"ellipse"``, ``"scratch"``,
            ``"speckle"`` (dots), ``"perlin"`` (many patches). Defaults to all.

    Raises:
        ValueError: If a kind of content is unknown or a range is empty.

    Example:
        >>> images = torch.rand(4, 3, 64, 64)
        >>> drawn, masks = AnomalySynthesizer(probability=1.0)(images)
        >>> drawn.shape, masks.shape, bool(masks.flatten(1).any(dim=1).all())
        (torch.Size([4, 3, 64, 64]), torch.Size([4, 64, 64]), True)
    """

    def __init__(
        self,
        probability: float = 0.5,
        size: tuple[float, float] = (0.02, 0.4),
        max_anomalies: int = 3,
        strength: tuple[float, float] = (0.4, 1.0),
        contents: tuple[str, ...] = CONTENTS,
        shapes: tuple[str, ...] = SHAPES,
    ) -> None:
        for kinds, known in ((contents, CONTENTS), (shapes, SHAPES)):
            if not kinds or not set(kinds) <= set(known):
                msg = f"Unknown or no kinds of anomaly in {kinds}; choose from {known}."
                raise ValueError(msg)
        if not 0 <= probability <= 1 or not 0 < size[0] <= size[1] <= 1 or not 0 < strength[0] <= strength[1] <= 1:
            msg = f"Need probability in [0, 1] and rising ranges in (0, 1]; got {probability}, {size}, {strength}."
            raise ValueError(msg)
        if max_anomalies < 1:
            msg = f"max_anomalies={max_anomalies} must be at least 1."
            raise ValueError(msg)
        self.probability = probability
        self.size = size
        self.max_anomalies = max_anomalies
        self.strength = strength
        self.contents = contents
        self.shapes = shapes

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw on a batch.

        Args:
            images (torch.Tensor): Normal images ``(B, C, H, W)`` on any scale, at least 16 pixels a side. They serve
                each other as foreign texture.

        Returns:
            tuple[torch.Tensor, torch.Tensor]: Images with anomalies ``(B, C, H, W)`` and boolean masks ``(B, H, W)`` of
            what has changed; nothing has where an anomaly is as white as what it is drawn on.
        """
        low, high = images.amin(), images.amax()
        least_std = LEAST_STD * (images.amax(dim=(0, 2, 3)) - images.amin(dim=(0, 2, 3)))  # by channel
        drawn, masks = [], []
        for index, image in enumerate(images):
            mask = torch.zeros(image.shape[-2:], dtype=torch.bool, device=image.device)
            if torch.rand(()) < self.probability:
                other = int(torch.randint(len(images), ()))
                foreign = images[other] if other != index else image.flip(-1)
                for _ in range(torch.randint(1, self.max_anomalies + 1, ())):
                    image, new = self._draw(image, foreign, least_std)  # noqa: PLW2901
                    mask |= new
            drawn.append(image)
            masks.append(mask)
        result = torch.stack(drawn).clamp(low, high)
        # White drawn on white is no anomaly; of uniform images rounding alone remains.
        changed = (result - images).abs().amax(dim=1) > UNCHANGED * torch.maximum(high - low, high.abs())
        return result, torch.stack(masks) & changed

    def _draw(
        self, image: torch.Tensor, foreign: torch.Tensor, least_std: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        height, width = image.shape[-2:]
        mask = _shape(_choose(self.shapes), height, width, self.size).to(image.device)
        content = _content(_choose(self.contents), image, foreign, mask, least_std)
        # A soft edge, so that the outline alone does not give the anomaly away.
        alpha = gaussian_blur(mask.float()[None], [13, 13], [_uniform(0.3, 2.0)] * 2)[0] * _uniform(*self.strength)
        return torch.lerp(image, content, alpha), mask


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * torch.rand(()).item()


def _perlin(height: int, width: int, coarsest: int, finest: int) -> torch.Tensor:
    """anomalib's Perlin noise ``(H, W)`` with 2^coarsest to 2^finest cells a side, as far as the pixels allow."""
    finest = min(finest, int(math.log2(min(height, width))))
    scale = (2 ** torch.randint(min(coarsest, finest), finest + 1, (2,))).tolist()
    return generate_perlin_noise(height, width, scale=(scale[0], scale[1]), device=torch.device("cpu"))


def _choose(options: tuple[str, ...]) -> str:
    return options[torch.randint(len(options), ())]


def _shape(kind: str, height: int, width: int, size: tuple[float, float]) -> torch.Tensor:
    """Boolean mask ``(H, W)`` of one anomaly; never empty."""
    extent = min(height, width) * math.exp(_uniform(math.log(size[0]), math.log(size[1])))
    extent = max(extent, 2.0)
    cy, cx = _uniform(0, height - 1), _uniform(0, width - 1)
    angle = _uniform(0, math.pi)
    y, x = torch.meshgrid(torch.arange(height) - cy, torch.arange(width) - cx, indexing="ij")
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    if kind == "perlin":
        noise = _perlin(height, width, 1, 5)
        near = (along**2 + across**2).sqrt() < 2 * extent
        mask = (noise > _uniform(0, 0.4)) & near
    elif kind == "scratch":
        length, thickness = max(2 * extent, 8.0), _uniform(0.6, 2.5) * max(min(height, width) / 448, 0.5)
        bend = _uniform(-1, 1) / length
        curve = across - bend * (along**2 - (length / 2) ** 2)
        mask = (along.abs() < length / 2) & (curve.abs() < thickness)
    elif kind == "speckle":
        dots = torch.randn(int(torch.randint(3, 12, ())), 2) * extent / 2
        dot = max(extent * 0.08, 1.0)
        points = torch.stack([y, x], dim=-1).view(-1, 2).float()
        mask = torch.cdist(points, dots).amin(dim=1).view(height, width) < dot
    else:
        ratio = _uniform(0.3, 1.0)
        radius = ((along / (extent / 2)) ** 2 + (across / (extent / 2 * ratio)) ** 2).sqrt()
        if kind == "blob":
            theta = torch.atan2(across, along)
            for lobes in (2, 3, 5):
                radius = radius * (1 + _uniform(-0.35, 0.35) * torch.cos(lobes * theta + _uniform(0, 2 * math.pi)))
        mask = radius < 1
    mask[round(cy), round(cx)] = True
    return mask


def _content(
    kind: str, image: torch.Tensor, foreign: torch.Tensor, mask: torch.Tensor, least_std: torch.Tensor
) -> torch.Tensor:
    """What fills the mask, as a whole image ``(C, H, W)``."""
    mean, std = image.mean(dim=(1, 2), keepdim=True), image.std(dim=(1, 2), keepdim=True)
    std = std.maximum(least_std.view(-1, 1, 1))
    if kind == "foreign":
        content = _pattern(image, mean, std) if torch.rand(()) < 0.5 else _piece(foreign, mean, std)
    elif kind == "paste":
        content = _turn(image, zoom=math.exp(_uniform(-0.5, 0.5))) + std * _uniform(-0.5, 0.5)
    elif kind == "smear":
        size = 2 * int(_uniform(2, 20)) + 1
        content = motion_blur(image[None], size, _uniform(0, 360), 0.0, border_type="replicate")[0]
        content = content + std * _uniform(-0.3, 0.3)
    elif kind == "grain":
        content = _shuffle(image, int(_uniform(2, 10))) if torch.rand(()) < 0.5 else _noise(image, mean, std)
    elif kind == "tone":
        colour = 0.3 * torch.randn(len(image), 1, 1).to(image) + _uniform(-3, 3)
        content = (mean + std * colour).expand_as(image)
    else:  # contrast
        local = image[:, mask].mean(dim=1).view(-1, 1, 1)
        content = local + (image - local) * math.exp(_uniform(-1.2, 1.2)) + std * _uniform(-2, 2)
    return content


def _noise(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """Fine to coarse grey noise on the image's own levels."""
    noise = gaussian_blur(torch.randn(1, *image.shape[-2:]), [7, 7], [_uniform(0.1, 1.5)] * 2).to(image)
    return mean + std * (_uniform(-1, 1) + _uniform(0.7, 3) * noise / noise.std())


def _pattern(image: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A procedural texture on the image's own levels: Perlin noise, stripes or a checkerboard."""
    height, width = image.shape[-2:]
    choice = torch.randint(3, ()).item()
    if choice == 0:
        wave = _perlin(height, width, 2, 7)
    else:
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        period, angle = math.exp(_uniform(math.log(4), math.log(48))), _uniform(0, math.pi)
        wave = torch.sin((x * math.cos(angle) + y * math.sin(angle)) * 2 * math.pi / period)
        if choice == 2:
            wave = wave * torch.sin((y * math.cos(angle) - x * math.sin(angle)) * 2 * math.pi / period)
    colour = 1 + 0.5 * torch.randn(len(image), 1, 1)
    return mean + std * (_uniform(-1, 1) + _uniform(1, 3) * (wave * colour).to(image))


def _piece(foreign: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """A turned, stretched foreign image on levels near the image's own; sometimes inverted."""
    piece = _turn(foreign, zoom=math.exp(_uniform(-1.2, 1.2)))
    own_mean, own_std = piece.mean(dim=(1, 2), keepdim=True), piece.std(dim=(1, 2), keepdim=True)
    sign = 1 if torch.rand(()) < 0.8 else -1
    return mean + std * (sign * (piece - own_mean) / (own_std + 1e-6) * _uniform(0.5, 2) + _uniform(-1, 1))


def _turn(image: torch.Tensor, zoom: float) -> torch.Tensor:
    """Rotate, zoom and shift an image; what lies outside is filled by reflection."""
    angle = _uniform(0, 2 * math.pi)
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    theta = torch.tensor([[cos, -sin, _uniform(-1, 1)], [sin, cos, _uniform(-1, 1)]], device=image.device)
    grid = F.affine_grid(theta[None], [1, *image.shape], align_corners=False)
    return F.grid_sample(image[None], grid, padding_mode="reflection", align_corners=False)[0]


def _shuffle(image: torch.Tensor, reach: int) -> torch.Tensor:
    """Swap every pixel for one at most ``reach`` pixels away."""
    height, width = image.shape[-2:]
    dy, dx = torch.randint(-reach, reach + 1, (2, height, width), device="cpu").to(image.device)
    rows = (torch.arange(height, device=image.device)[:, None] + dy).clamp(0, height - 1)
    columns = (torch.arange(width, device=image.device)[None] + dx).clamp(0, width - 1)
    return image[:, rows, columns]
