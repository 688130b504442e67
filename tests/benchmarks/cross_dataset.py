# SPDX-License-Identifier: Apache-2.0

"""From one small dataset to another: SPG, its controls, LAKE and the peers on the very same tokens and images.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.cross_dataset methods
    python -m tests.benchmarks.cross_dataset choices
    python -m tests.benchmarks.cross_dataset published
    python -m tests.benchmarks.cross_dataset lake
    python -m tests.benchmarks.cross_dataset neighbors
    python -m tests.benchmarks.cross_dataset shifts
    python -m tests.benchmarks.cross_dataset rarity
    python -m tests.benchmarks.cross_dataset atoms

Photographs of brick, grass and gravel in MVTec AD's layout, and textile, tissue and moon in VisA's, all with drawn
defects (tests/textures.py): 16 normal training images, 24 good and 24 bad test images of each. Each dataset is the
other one's auxiliary data. Prints image AUROC / AP and pixel AUROC / AUPRO in percent, mean and standard deviation over
seeds.

DINOv2-S/14 at 448x448. Every image passes the backbone once; its tokens are kept in ``--cache``. Pixel metrics read
every fourth row and column. The pooled token, which no map and no score here depends on, is the mean of the patches.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from anomalib.metrics.aupro import _AUPRO as AUPRO
from sklearn.metrics import average_precision_score, roc_auc_score
from tqdm import tqdm

from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.quickstart import BACKBONE
from anomalib_spg.synthesis import AnomalySynthesizer
from anomalib_spg.token_store import TokenStore
from tests.benchmarks.lake_accuracy import (
    BLOCKS,
    GRID,
    Source,
    anomaly_dino,
    backbone,
    lake,
    normal_images,
    patchcore,
    read,
    tokens,
)
from tests.textures import CATEGORIES, VISA_CATEGORIES, make_mvtec, make_visa

BLOCK = 6
VIEWS = 4
SMALL = {"num_atoms": 1024, "sae_epochs": 6, "ema_warmup": True}  # the quickstart's settings

Rates = tuple[float, float, float, float]


class Category(Source):
    """A category's tokens, rated by four metrics."""

    def __init__(self, stored: dict[str, torch.Tensor], vit: torch.nn.Module, images: torch.Tensor) -> None:
        super().__init__(stored, vit, images)
        self.drawn, self.drawn_masks = stored["drawn"], stored["drawn_masks"]  # views of the training images

    def rate(self, scores: torch.Tensor, maps: torch.Tensor) -> Rates:  # type: ignore[override]
        """Image AUROC, image AP, pixel AUROC, pixel AUPRO."""
        masks, pixels = self.masks[:, ::4, ::4], maps[:, 0, ::4, ::4].contiguous()
        return (
            roc_auc_score(self.labels, scores),
            average_precision_score(self.labels, scores),
            roc_auc_score(masks.flatten(), pixels.flatten()),
            AUPRO()(pixels, masks).item(),
        )


def collect(data: Path, cache: Path) -> dict[str, dict[str, Category]]:
    """Both datasets' tokens, computed or read from a former run."""
    model = backbone(data)
    transform = model.pre_processor.transform
    roots = {
        "mvtec": (make_mvtec(cache / "mvtec"), CATEGORIES),
        "visa": (make_visa(cache / "visa") / "visa_pytorch", VISA_CATEGORIES),
    }
    datasets: dict[str, dict[str, Category]] = {}
    for dataset, (root, categories) in roots.items():
        datasets[dataset] = {}
        for category in categories:
            file = cache / f"{category}.pt"
            if not file.exists():
                stored = read(model, root / category)
                torch.manual_seed(0)
                paths = sorted((root / category / "train/good").iterdir())
                images = torch.stack([transform(read_image(path, as_tensor=True)) for path in paths])
                views = [AnomalySynthesizer()(images) for _ in range(VIEWS)]
                stored["drawn_masks"] = torch.cat([masks > 0 for _, masks in views])
                drawn = torch.cat([images for images, _ in views]).split(1)
                stored["drawn"] = torch.cat([tokens(model, image) for image in tqdm(drawn, f"{category}, drawn")])
                torch.save(stored, file)
            stored = torch.load(file, mmap=True, weights_only=True)
            images = normal_images(model, root / category)
            datasets[dataset][category] = Category(stored, model.model.backbone.vit, images)
    return datasets


def learn(
    categories: list[Category], seed: int, blocks: Sequence[int] = (BLOCK,), drawn: bool = False, **options
) -> SPGModel:
    """SPG's own training, on labelled test images or on anomalies drawn on training images."""
    torch.manual_seed(seed)
    model = SPGModel(BACKBONE, layers=blocks, pre_trained=False, image_size=(448, 448))
    model.store = TokenStore(memory_limit=64)
    for category in categories:
        images, masks = (category.drawn, category.drawn_masks) if drawn else (category.test, category.masks)
        stored = stored_tokens(model, category, images)
        model.store.add(stored, masks, masks.flatten(1).any(dim=1).tolist())
    model.fit(GuideSettings(**{**SMALL, **options}))
    return model


def stored_tokens(model: SPGModel, category: Category, images: torch.Tensor) -> Tokens:
    """Tokens of the model's blocks as the backbone gives them, from raw ones ``(B, blocks, N, D)``."""
    patches = [
        torch.stack([category.norm(image.float()) for image in images[:, BLOCKS.index(block)]])
        for block in model.backbone.layers
    ]
    return Tokens(patches, [tokens.mean(dim=1) for tokens in patches], GRID)


def test(model: SPGModel, category: Category, **options) -> Rates:
    """SPG's own maps and scores."""
    for name, value in {"image_score": "max", "own_weight": 0.0, **options}.items():
        setattr(model, name, value)
    results = [model._predict(stored_tokens(model, category, image[None]), (448, 448)) for image in category.test]
    return category.rate(torch.cat([r.pred_score for r in results]), torch.cat([r.anomaly_map for r in results]))


def main() -> None:  # noqa: C901  # a line for each row
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "table", choices=["methods", "choices", "published", "lake", "neighbors", "shifts", "rarity", "atoms"]
    )
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("cross_dataset_tokens"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shifts", type=int, default=2, help="LAKE's num_shifts; tables of before it had 1")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    datasets = collect(arguments.data, arguments.cache)
    names = [name for categories in datasets.values() for name in categories]
    print(f"| | {' | '.join(names)} | mean |\n|---{'|---' * (len(names) + 1)}|", flush=True)

    def row(title: str, rate: Callable[[int], dict[str, Rates]]) -> None:
        results = [rate(seed) for seed in range(arguments.seeds)]
        rates = 100 * torch.tensor([[result[name] for name in names] for result in results])  # seed, category, metric
        rates = torch.cat([rates, rates.mean(dim=1, keepdim=True)], dim=1)
        means = rates.mean(dim=0)
        spreads = rates.std(dim=0) if len(rates) > 1 else torch.zeros_like(means)
        cells = [
            f"{mean[0]:.1f} ± {spread[0]:.1f} / {mean[1]:.1f}, {mean[2]:.1f} / {mean[3]:.1f} ± {spread[3]:.1f}"
            for mean, spread in zip(means, spreads, strict=True)
        ]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)

    @lru_cache(maxsize=2 * arguments.seeds)
    def learned(dataset: str, seed: int, **settings) -> SPGModel:
        return learn([*datasets[dataset].values()], seed, **settings)

    def spg(drawn: bool = False, own: bool = False, options: dict | None = None, **settings) -> Callable:
        """Guides from the other dataset, or from each category's own training images."""

        def rate(seed: int) -> dict[str, Rates]:
            rates = {}
            for target, other in (("mvtec", "visa"), ("visa", "mvtec")):
                model = None if own else learned(other, seed, drawn=drawn, **settings)
                for name, category in datasets[target].items():
                    fitted = model or learn([category], seed, drawn=True, **settings)
                    rates[name] = test(fitted, category, **(options or {}))
            return rates

        return rate

    def each(method: Callable[[Category, int], Rates]) -> Callable:
        def rate(seed: int) -> dict[str, Rates]:
            return {
                name: method(category, seed)
                for categories in datasets.values()
                for name, category in categories.items()
            }

        return rate

    def few(shots: int, **options) -> Callable:
        options["scoring"] = {"num_shifts": arguments.shifts, **options.get("scoring", {})}
        return each(lambda c, s: lake(c, shots, s, **options))

    if arguments.table == "methods":
        row("SPG, labelled auxiliary data", spg())
        row("no dictionary: free vectors, same data", spg(dictionary=False))
        row("SPG, anomalies drawn on the auxiliary data's good images", spg(drawn=True))
        row("SPG, anomalies drawn on 16 good images of the target", spg(own=True))
        for shots in (1, 4):
            row(f"LAKE, {shots} shots", few(shots))
        for shots in (1, 4):
            row(f"AnomalyDINO, {shots} shots", each(lambda c, s, n=shots: anomaly_dino(c, n, s)))
            row(f"PatchCore, full bank, {shots} shots", each(lambda c, s, n=shots: patchcore(c, n, s, None)))
    elif arguments.table == "neighbors":
        for shots, weight, counts in (
            (1, 0.3, (1, 3, 10)),
            (1, 0.5, (1, 10)),
            (4, 0.3, (1, 3, 10)),
            (4, 0.5, (1, 10)),
            (16, 0.3, (1, 3, 10)),
        ):
            for count in counts:
                scoring = {"num_neighbors": count, "own_weight": weight}
                row(f"{shots} shots, num_neighbors {count}, own_weight {weight}", few(shots, scoring=scoring))
    elif arguments.table == "shifts":
        for shots in (2, 4, 8, 16):
            for count in (1, 2):
                row(f"{shots} shots, num_shifts {count}", few(shots, scoring={"num_shifts": count}))
    elif arguments.table == "lake":
        for shots in (1, 4):
            row(f"default, {shots} shots", few(shots))
            for weight, top in ((0, 1), (0, 3), (0.3, 1), (0.2, 3), (0.5, 3)):
                scoring = {"own_weight": weight, "top_patches": top}
                row(f"own image {weight}, top {top}, {shots} shots", few(shots, scoring=scoring))
            for title, options in (
                ("unit length before", {"normalization": "before"}),
                ("all channels", {"selection": "all"}),
                ("principal components", {"selection": "pca", "normalization": "none"}),
            ):
                row(f"{title}, {shots} shots", few(shots, **options))
    elif arguments.table == "rarity":
        for weight in (0.0, 2.0, 4.0, 8.0, 12.0):
            row(f"own_weight {weight:g}", spg(options={"own_weight": weight}))
        row("free vectors, own_weight 8", spg(dictionary=False, options={"own_weight": 8.0}))
    elif arguments.table == "atoms":
        for atoms in (128, 256, 384, 512, 768, 1024, 2048):
            for weight in (0.0, 8.0):
                row(f"{atoms} atoms, own_weight {weight:g}", spg(num_atoms=atoms, options={"own_weight": weight}))
    elif arguments.table == "published":
        for block in (BLOCK, 11):
            row(
                f"block {block}, published settings",
                spg(blocks=(block,), num_atoms=4096, sae_epochs=50, ema_warmup=False),
            )
    else:
        row(f"block {BLOCK}, quickstart's settings", spg())
        for share in (0.001, 0.003, 0.01):
            row(f"image score: top {share}", spg(options={"image_score": "top", "top_fraction": share}))
        row("image score: lse", spg(options={"image_score": "lse"}))
        for blocks in ((4,), (5,), (7,), (8,), (11,), (6, 8), (4, 6, 8)):
            row(f"blocks {blocks}", spg(blocks=blocks))
        row("published average (no warm-up)", spg(ema_warmup=False))
        row("no average", spg(ema_decay=0.0))
        for epochs in (1, 25):
            row(f"{epochs} epochs of the dictionary", spg(sae_epochs=epochs))
        for epochs in (5, 60):
            row(f"{epochs} epochs of the guides", spg(guide_epochs=epochs))
        row("4096 atoms", spg(num_atoms=4096))
        for k in (8, 128):
            row(f"k = {k}", spg(k=k))
        row("64 atoms per guide", spg(guide_top_k=64))


if __name__ == "__main__":
    main()
