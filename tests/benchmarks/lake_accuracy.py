# SPDX-License-Identifier: Apache-2.0

"""How good LAKE is, beside PatchCore and AnomalyDINO on the very same tokens, and what its choices do.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.lake_accuracy methods
    python -m tests.benchmarks.lake_accuracy layers
    python -m tests.benchmarks.lake_accuracy neurons
    python -m tests.benchmarks.lake_accuracy choices
    python -m tests.benchmarks.lake_accuracy contamination

Prints image AUROC (and pixel AUROC after a slash), mean over draws of the normal images, for

- textile: the quickstart's 40 good training images to draw from, 60 good and 60 locally defective test images;
- brick, grass, gravel: photographs with drawn defects (tests/textures.py), 16 to draw from, 24 good and 24 bad.

DINOv2-S/14 at 448x448. Every image passes the backbone once; its tokens are kept in ``--cache`` for the next table.
"""

import argparse
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import torch
from anomalib.data.utils import read_image
from anomalib.models.image.anomaly_dino.torch_model import AnomalyDINOModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from sklearn.metrics import roc_auc_score
from torch import nn
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

from anomalib_lake import LAKE, LAKEModel
from anomalib_lake.neurons import Selection, SensitiveNeurons
from anomalib_spg.components.anomaly_map import AnomalyMapGenerator
from anomalib_spg.quickstart import BACKBONE
from tests.textures import CATEGORIES, make_mvtec

BLOCKS = [2, 3, 4, 5, 6, 7, 8, 9, 11]
DEFAULT = (4, 7)
SCALES = (1, 3)
GRID = (32, 32)
SOURCES = ("textile", *CATEGORIES)
to_pixels = AnomalyMapGenerator(14, sigma=4)


class Tokens(nn.Module):
    """Stands in for a feature extractor: its images are numbers of images whose tokens are there already."""

    def __init__(self, tokens: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.tokens = tokens

    def forward(self, numbers: torch.Tensor) -> dict[str, torch.Tensor]:
        """Look the tokens up; ``numbers`` is ``(B, 1, 448, 448)``."""
        index = numbers[:, 0, 0, 0].long()
        return {name: tokens[index].float() for name, tokens in self.tokens.items()}


class Remembering(LAKEModel):
    """Passes no image through the backbone twice, shifted copies neither; tokens are kept in half precision."""

    seen: dict[tuple, torch.Tensor] = {}  # noqa: RUF012  # of all models

    def tokens(self, images: torch.Tensor) -> tuple[dict[int, torch.Tensor], tuple[int, int]]:
        """As LAKE's own."""
        keys = [(*self.layers, hashlib.sha256(image.numpy()).hexdigest()) for image in images]
        for key, image in zip(keys, images, strict=True):
            if key not in self.seen:
                tokens, _ = super().tokens(image[None])
                self.seen[key] = torch.cat(list(tokens.values())).half()
        stored = torch.stack([self.seen[key] for key in keys], dim=1).float()
        return dict(zip(self.backbone.layers, stored, strict=True)), GRID


class Source:
    """Tokens, labels and masks of one source of images; the normal ones also as they enter the backbone."""

    def __init__(self, stored: dict[str, torch.Tensor], vit: nn.Module, images: torch.Tensor) -> None:
        self.train, self.test = stored["train"], stored["test"]  # (images, blocks, N, D)
        self.labels, self.masks = stored["labels"], stored["masks"]
        self.vit, self.images = vit, images
        self.norm = vit.norm

    def draw(self, shots: int, draw: int) -> torch.Tensor:
        """Numbers of the normal images of a draw."""
        return torch.randperm(len(self.train), generator=torch.Generator().manual_seed(draw))[:shots]

    def rate(self, scores: torch.Tensor, maps: torch.Tensor) -> tuple[float, float]:
        """Image AUROC, and pixel AUROC on every fourth row and column where there are masks."""
        pixel = float("nan")
        if self.masks.any():
            pixel = roc_auc_score(self.masks[:, ::4, ::4].flatten(), maps[:, 0, ::4, ::4].flatten())
        return roc_auc_score(self.labels, scores), pixel


def read(model: LAKE, root: Path, limit: int | None = None) -> dict[str, torch.Tensor]:
    """Raw tokens of all blocks, labels and masks of one category in MVTec AD's layout; each image passes once."""
    train, good, bad = sorted((root / "train/good").iterdir()), [], []
    for folder in sorted((root / "test").iterdir()):
        (good if folder.name == "good" else bad).extend(sorted(folder.iterdir()))
    good, bad = good[:limit], bad[:limit]
    masks = torch.zeros(len(good) + len(bad), 448, 448, dtype=torch.bool)
    for number, path in enumerate(bad, start=len(good)):
        for mask in (root / "ground_truth" / path.parent.name).glob(f"{path.stem}*"):
            masks[number] = resize(read_image(mask, as_tensor=True)[:1], [448, 448])[0] > 0.5
    stored = {"labels": torch.tensor([0] * len(good) + [1] * len(bad)), "masks": masks}
    for key, paths in (("train", train), ("test", good + bad)):
        images = (model.pre_processor.transform(read_image(path, as_tensor=True))[None] for path in paths)
        stored[key] = torch.stack([
            tokens(model, image)[0] for image in tqdm(images, f"{root.name}, {key}", len(paths))
        ])
    return stored


def normal_images(model: LAKE, root: Path) -> torch.Tensor:
    """The training images of a category in MVTec AD's layout."""
    paths = sorted((root / "train/good").iterdir())
    return torch.stack([model.pre_processor.transform(read_image(path, as_tensor=True)) for path in paths])


def tokens(model: LAKE, images: torch.Tensor) -> torch.Tensor:
    """Raw tokens ``(B, blocks, N, D)`` in half precision."""
    with torch.inference_mode():
        return torch.stack(list(model.model.tokens(images)[0].values()), dim=1).half()


def backbone(data: Path, blocks: Sequence[int] = BLOCKS) -> LAKE:
    """The real DINOv2-S/14, giving raw tokens of some blocks."""
    weights = data / "dinov2_vits14.safetensors"
    model = LAKE(BACKBONE, layers=blocks, weights=weights, image_size=448, visualizer=False).eval()
    model.model.backbone.load_weights()
    return model


def collect(data: Path, cache: Path) -> dict[str, Source]:
    """Pass every image through the backbone once, or read what a former run kept."""
    model = backbone(data)
    make_mvtec(cache / "textures")
    sources = {}
    for name in SOURCES:
        file = cache / f"{name}.pt"
        root, limit = (data / "textile", 60) if name == "textile" else (cache / "textures" / name, None)
        if not file.exists():
            torch.save(read(model, root, limit), file)
        stored = torch.load(file, mmap=True, weights_only=True)
        sources[name] = Source(stored, model.model.backbone.vit, normal_images(model, root))
    return sources


def lake(
    source: Source,
    shots: int,
    draw: int,
    blocks: tuple[int, ...] = DEFAULT,
    scales: tuple[int, ...] = SCALES,
    size: int | None = 5504,
    scoring: dict | None = None,
    further: Sequence[torch.Tensor] = (),
    **options,
) -> tuple[float, float]:
    """LAKE on its normal images, and on tokens of the others.

    ``scoring`` has those of :class:`LAKEModel` that turn distances into scores, ``options`` those of
    :class:`SensitiveNeurons`; ``further`` are tokens of images that it takes for normal ones, too.
    """
    torch.manual_seed(draw)
    model = Remembering(BACKBONE, layers=blocks, scales=scales, bank_size=size, pre_trained=False, **(scoring or {}))
    model.backbone.vit = source.vit
    model.neurons = nn.ModuleList(SensitiveNeurons(**options) for _ in blocks)
    with torch.no_grad():
        model.train()(source.images[source.draw(shots, draw)])
    for image in further:
        model.store({block: image[None, BLOCKS.index(block)].float() for block in blocks}, GRID, (448, 448))
    model.fit()
    model.eval()
    with torch.inference_mode():
        by_image = ({block: image[None, BLOCKS.index(block)].float() for block in blocks} for image in source.test)
        results = [
            model._predict(model.structural_deviation(tokens, GRID), None, GRID, (448, 448)) for tokens in by_image
        ]
    scores = torch.cat([result.pred_score for result in results])
    return source.rate(scores, torch.cat([result.anomaly_map for result in results]))


def peer(
    source: Source, model: nn.Module, attribute: str, drawn: torch.Tensor, blocks: tuple[int, ...], ratio: float | None
) -> tuple[float, float]:
    """PatchCore or AnomalyDINO with its feature extractor replaced by tokens computed before."""

    def tokens(stored: torch.Tensor) -> Tokens:
        by_name = {}
        for block in blocks:  # both models take tokens after the final norm, PatchCore as maps
            normed = torch.stack([source.norm(image.float()) for image in stored[:, BLOCKS.index(block)]])
            by_name[f"blocks.{block}"] = normed if attribute == "feature_encoder" else normed.mT.unflatten(2, GRID)
        return Tokens(by_name)

    def numbers(count: torch.Tensor) -> torch.Tensor:
        return count.float()[:, None, None, None].expand(-1, 1, 448, 448)

    with torch.inference_mode():
        setattr(model, attribute, tokens(source.train))
        model.train()(numbers(drawn))
        if attribute == "feature_encoder":
            model.fit()
        elif ratio is not None:
            model.subsample_embedding(ratio)
        else:
            model.memory_bank = torch.vstack(model.embedding_store)
        setattr(model, attribute, tokens(source.test))
        model.eval()
        results = [model(numbers(torch.tensor([number]))) for number in range(len(source.test))]
    scores = torch.cat([result.pred_score.flatten() for result in results])
    return source.rate(scores, torch.cat([result.anomaly_map for result in results]))


def patchcore(
    source: Source, shots: int, draw: int, ratio: float | None, blocks: tuple[int, ...] = DEFAULT
) -> tuple[float, float]:
    """anomalib's PatchCore."""
    torch.manual_seed(draw)
    model = PatchcoreModel([f"blocks.{block}" for block in blocks], BACKBONE, pre_trained=False)
    return peer(source, model, "feature_extractor", source.draw(shots, draw), blocks, ratio)


def anomaly_dino(source: Source, shots: int, draw: int) -> tuple[float, float]:
    """anomalib's AnomalyDINO, which reads the last block."""
    from unittest.mock import patch

    with patch("anomalib.models.image.anomaly_dino.torch_model.TimmFeatureExtractor") as extractor:
        extractor.return_value = nn.Module()
        extractor.return_value.patch_size = 14
        model = AnomalyDINOModel(encoder_name="vit_small_patch14_dinov2")
    return peer(source, model, "feature_encoder", source.draw(shots, draw), (11,), None)


def main() -> None:  # noqa: C901  # a branch for each table
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["methods", "layers", "neurons", "choices", "contamination"])
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("lake_tokens"))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--shifts", type=int, default=2, help="LAKE's num_shifts; tables of before it had 1")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    sources = collect(arguments.data, arguments.cache)

    def row(title: str, rate: Callable[[Source, int], tuple[float, float]]) -> None:
        cells = []
        for source in sources.values():
            rates = torch.tensor([rate(source, draw) for draw in range(arguments.draws)])
            image, pixel = rates.mean(dim=0).tolist()
            cells.append(f"{image:.3f}" if pixel != pixel else f"{image:.3f} / {pixel:.3f}")  # noqa: PLR0124
        print(f"| {title} | {' | '.join(cells)} |", flush=True)

    def few(shots: int, **options) -> Callable[[Source, int], tuple[float, float]]:
        options = {"scoring": {"num_shifts": arguments.shifts}, **options}
        return lambda source, draw: lake(source, shots, draw, **options)

    print(f"| | {' | '.join(sources)} |\n|---{'|---' * len(sources)}|")
    if arguments.table == "methods":
        for shots in (1, 2, 4, 8):
            row(f"LAKE, {shots} shots", few(shots))
        for shots in (1, 4):
            row(f"PatchCore, 10 % coreset, {shots} shots", lambda s, d, n=shots: patchcore(s, n, d, 0.1))
            row(f"PatchCore, full bank, {shots} shots", lambda s, d, n=shots: patchcore(s, n, d, None))
            row(
                f"PatchCore, full bank, blocks (5, 8), {shots} shots",
                lambda s, d, n=shots: patchcore(s, n, d, None, (5, 8)),
            )
            row(f"AnomalyDINO, {shots} shots", lambda s, d, n=shots: anomaly_dino(s, n, d))
    elif arguments.table == "layers":
        for selection in get_args(Selection):
            row(f"blocks {DEFAULT}, {selection}", few(4, selection=selection))
        for blocks in [(4,), (5,), (6,), (7,), (8,), (9,), (4, 8), (6, 7)]:
            for selection in ("variance", "all", "random"):
                row(f"blocks {blocks}, {selection}", few(4, blocks=blocks, selection=selection))
    elif arguments.table == "neurons":
        for count in (10, 25, 50, 100, 200):
            for selection in ("variance", "random"):
                row(f"{count} neurons, {selection}", few(4, count=count, selection=selection))
        row("all 384", few(4, selection="all"))
    elif arguments.table == "choices":
        for normalization in ("after", "before", "none"):
            row(f"unit length: {normalization}", few(4, normalization=normalization))
        for scales in ((1,), (3,), (1, 3), (1, 5), (1, 3, 5)):
            row(f"scales {scales}", few(4, scales=scales))
        for size in (None, 8192, 5504, 4096):
            row(f"16 shots, bank of {size or 'all 16384'}", few(16, size=size))
    else:

        def contaminated(source: Source, draw: int, defects: int) -> tuple[float, float]:
            # defective test images that are then left out of the test
            taken = source.labels.nonzero().flatten()[draw * defects : (draw + 1) * defects]
            rest = torch.ones(len(source.labels), dtype=torch.bool)
            rest[source.labels.nonzero().flatten()[: arguments.draws]] = False
            stored = {"train": source.train, "test": source.test[rest], "labels": source.labels[rest]}
            kept = Source({**stored, "masks": source.masks[rest]}, source.vit, source.images)
            return lake(kept, 8, draw, size=None, further=source.test[taken], scoring={"num_shifts": 1})

        row("8 normal images", lambda s, d: contaminated(s, d, 0))
        row("8 normal images and 1 defective one", lambda s, d: contaminated(s, d, 1))


if __name__ == "__main__":
    main()
