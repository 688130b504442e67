# SPDX-License-Identifier: Apache-2.0

"""Accept or reject: what the decisions of LAKE, SPG and the peers are worth that rest on a few good parts alone.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.decisions methods
    python -m tests.benchmarks.decisions rules
    python -m tests.benchmarks.decisions rates
    python -m tests.benchmarks.decisions banks --draws 2
    python -m tests.benchmarks.decisions neighbors --draws 2
    python -m tests.benchmarks.decisions methods --only cup cat rocket motorcycle retina variants
    python -m tests.benchmarks.decisions places --draws 2 --only plate wires tray coins

Seven datasets of 40 good images to draw from, 40 unseen good and 40 bad ones, always the same, and ten more where
``--only`` names them:

- textile-real: the quickstart's simulated textile images, nominal and locally defective;
- brick, grass, gravel, tissue, moon, textile: crops of 200 pixels a side with drawn defects (tests/textures.py);
- with ``--only``: cup, cat, rocket, motorcycle, retina, variants: objects nearly in place (tests/objects.py);
- with ``--only``: plate, wires, tray, coins: the same with missing, swapped and wrong pieces (tests/pieces.py).

A threshold from good parts can hold for parts of the same distribution only. So here, other than in tests/textures.py,
all crops are exchangeable: those to draw from, the unseen ones and those that defects are drawn on all come from random
places of the whole photograph (of textile: of a random one of 16 images). Hence they overlap.

``n`` good images are all a user has. LAKE compares with all, and each of them against the others sets its threshold;
with fewer in the bank, as the peers, the others set it, too. SPG learns from anomalies drawn on three quarters of them,
or on all below 8; its views, three of each image, are drawn once for all draws. Thresholds are those of the
post-processors. ``banks`` gives LAKE fewer of them to compare with, ``neighbors`` averages distances to several of its
tokens, ``places`` compares patches wherever they lie, too. All methods see the same draws: LAKE five, SPG and the peers
the first two (``--slow-draws``).

Printed: share of the unseen good images that are rejected, mean and worst dataset; share of the bad ones that are
accepted; F1, the best F1 that any threshold reaches on the very same scores, the false alarms it takes there, and the
gap to it; share of a good part's pixels that are in its mask, of every fourth row and column; image AUROC. In percent,
mean over datasets and draws ± standard deviation over the datasets' means.

DINOv2-S/14 at 448x448. Every image passes the backbone once; its tokens, some GB, are kept in ``--cache``, predictions
below it, in a folder named by the source code of both models. ``--only`` takes some of the datasets, ``--methods`` some
of the methods.
"""

import argparse
import copy
import hashlib
import math
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils import read_image
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from anomalib.models.image.super_add import SuperADDPostProcessor
from anomalib.post_processing import PostProcessor
from sklearn.metrics import precision_recall_curve, roc_auc_score
from torchvision.transforms.v2.functional import resize
from tqdm import tqdm

import anomalib_lake
import anomalib_spg
from anomalib_lake import LAKE
from anomalib_lake.torch_model import joined
from anomalib_spg import SPG
from anomalib_spg.components.held_out import choose
from anomalib_spg.components.normal_images import AUTO
from anomalib_spg.components.post_processor import FALSE_ALARM_RATE, GoodPartsPostProcessor
from anomalib_spg.components.raw_scores import RawScorePostProcessor
from anomalib_spg.components.threshold import logit
from anomalib_spg.lightning_model import FEWEST, OWN_IMAGES
from anomalib_spg.quickstart import BACKBONE
from anomalib_spg.synthesis import AnomalySynthesizer
from tests import objects, pieces
from tests.benchmarks import cross_dataset, lake_accuracy
from tests.benchmarks.lake_accuracy import BLOCKS, DEFAULT, GRID, Remembering, backbone, tokens
from tests.textures import DEFECTS, draw_defect, photo

METHODS = ("LAKE", "SPG", "PatchCore", "AnomalyDINO")
DATASETS = ("textile-real", "brick", "grass", "gravel", "tissue", "moon", "textile")
COUNT = 40  # images to draw from, unseen good ones, and bad ones
SIZE = 200
VIEWS = 3
EARLY = BLOCKS[: BLOCKS.index(max(DEFAULT)) + 1]  # what LAKE and SPG read
SHOTS = 4


def crop(category: str, rng: np.random.Generator) -> np.ndarray:
    """A crop ``(SIZE, SIZE, 3)`` of a random place of the whole photograph."""
    whole, top, left = photo(category), 0, 0
    height, width = whole.shape[:2]
    if category == "textile":  # no crop runs over the seams
        height = width = 250
        top, left = (int(tile) * 250 for tile in rng.integers(0, 4, 2))
    top, left = top + int(rng.integers(0, height - SIZE + 1)), left + int(rng.integers(0, width - SIZE + 1))
    return whole[top : top + SIZE, left : left + SIZE]


def pictures(name: str, data: Path) -> list[torch.Tensor]:
    """Images ``(3, H, W)`` in [0, 1]: 40 to draw from, 40 unseen good ones, 40 bad ones."""
    if name == "textile-real":
        folders = (data / "textile" / folder for folder in ("train/good", "test/good", "test/defect"))
        return [read_image(path, as_tensor=True) for folder in folders for path in sorted(folder.iterdir())[:COUNT]]
    if name in objects.CATEGORIES:
        images = objects.take_all(objects.take, name, 2 * COUNT, COUNT)
    elif name in pieces.CATEGORIES:
        images = pieces.take_all(name, 2 * COUNT, COUNT)
    else:
        rng = np.random.default_rng([0, *name.encode()])
        images = [crop(name, rng) for _ in range(3 * COUNT)]
        images[2 * COUNT :] = [
            draw_defect(image, DEFECTS[index % len(DEFECTS)], rng)[0] for index, image in enumerate(images[2 * COUNT :])
        ]
    return [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in images]


def prepare(name: str, data: Path) -> torch.Tensor:
    """Raw tokens of all images."""
    model = backbone(data)
    images = [model.pre_processor.transform(image)[None] for image in pictures(name, data)]
    return torch.cat([tokens(model, image) for image in tqdm(images, f"{name}, images")])


def prepare_drawn(name: str, data: Path, images_tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Raw tokens of anomalies drawn on the first 40 images, and of SPG's views of them."""
    early = backbone(data, EARLY)
    transform = early.pre_processor.transform
    torch.manual_seed(0)
    images = pictures(name, data)
    batch = torch.stack([transform(image) for image in images[:COUNT]])
    views, masks = zip(*(AnomalySynthesizer()(batch) for _ in range(VIEWS)), strict=True)
    perlin = PerlinAnomalyGenerator(probability=1.0, blend_factor=(0.01, 0.2))  # as SyntheticAnomalyDataset has it
    drawn, perlin_masks = zip(*(perlin(image) for image in images[:COUNT]), strict=True)
    stored = {
        "drawn_masks": torch.cat(masks),
        "perlin_masks": torch.cat([resize(mask, [448, 448]) > 0.5 for mask in perlin_masks]),
        "perlin": torch.cat([
            tokens(early, transform((image.clamp(0, 1) * 255).round() / 255)[None])
            for image in tqdm(drawn, f"{name}, drawn")
        ]),
    }
    block = EARLY.index(cross_dataset.BLOCK)
    stored["drawn"] = images_tokens[:COUNT, [block]].repeat(VIEWS, 1, 1, 1)
    changed = stored["drawn_masks"].flatten(1).any(dim=1).nonzero().flatten()  # the others are the images themselves
    for index in tqdm(changed.tolist(), f"{name}, views"):
        stored["drawn"][index] = tokens(early, views[index // COUNT][index % COUNT][None])[:, [block]][0]
    return stored


class Parts(cross_dataset.Category):
    """A dataset's tokens; rated by nothing, so that scores and maps come back."""

    def __init__(
        self,
        images: torch.Tensor,
        vit: torch.nn.Module,
        normal: torch.Tensor,
        anomalies: Callable[[], dict[str, torch.Tensor]],
    ) -> None:
        shown = {
            "train": images[:COUNT],
            "test": images,  # all of them: those left over set the threshold, the unseen ones test it
            "labels": torch.arange(3 * COUNT) >= 2 * COUNT,
            "masks": torch.zeros(0),
            "drawn": torch.zeros(0),
            "drawn_masks": torch.zeros(0),
        }
        super().__init__(shown, vit, normal)
        self.anomalies = anomalies  # what :func:`prepare_drawn` gave

    def rate(self, scores: torch.Tensor, maps: torch.Tensor) -> InferenceBatch:  # type: ignore[override]  # noqa: PLR6301
        """Scores, and every fourth row and column of the maps."""
        return InferenceBatch(pred_score=scores.float(), anomaly_map=maps[..., ::4, ::4].float().contiguous())


Predictions = dict[str, InferenceBatch]  # of all images, of "own" ones that are learned from, of "perlin" anomalies


def lake(parts: Parts, shots: int, draw: int, perlin: bool = False, **arguments: float) -> Predictions:
    """LAKE's own predictions of all images, or of anomalib's drawn anomalies; "own": of normal images by the others."""
    torch.manual_seed(draw)
    model = Remembering(BACKBONE, pre_trained=False, **arguments)
    model.backbone.vit = parts.vit
    with torch.no_grad():
        model.train()(parts.images[parts.draw(shots, draw)])
    own, images = model.fit(), parts.anomalies()["perlin"] if perlin else parts.test
    model.eval()
    by_block = ({block: image[None, BLOCKS.index(block)].float() for block in DEFAULT} for image in images)
    found = joined([model.score(tokens, GRID, (448, 448)) for tokens in by_block])
    results = {"own": own, "perlin" if perlin else "images": found}
    return {key: parts.rate(result.pred_score, result.anomaly_map) for key, result in results.items()}


def lake_perlin(parts: Parts, shots: int, draw: int) -> Predictions:
    """Of anomalib's drawn anomalies."""
    return lake(parts, shots, draw, perlin=True)


def lake_3(parts: Parts, shots: int, draw: int) -> Predictions:
    """With the three nearest tokens of the bank."""
    return lake(parts, shots, draw, num_neighbors=3)


def lake_10(parts: Parts, shots: int, draw: int) -> Predictions:
    """With the ten nearest."""
    return lake(parts, shots, draw, num_neighbors=10)


def lake_anywhere(parts: Parts, shots: int, draw: int) -> Predictions:
    """Wherever patches lie."""
    return lake(parts, shots, draw, place_weight=0.0)


def split(count: int, draw: int) -> tuple[list[int], list[int]]:
    """Which of a draw's images SPG learns from, and which it holds out; below 8 none."""
    everything = list(range(count))
    if count < FEWEST:
        return everything, []
    torch.manual_seed(draw)
    held_out = choose(everything, count // 4)
    return sorted(set(everything) - set(held_out)), held_out


def spg(parts: Parts, count: int, draw: int) -> Predictions:
    """SPG's own predictions, guides learned from anomalies drawn on a draw's images."""
    learned = parts.draw(count, draw)[split(count, draw)[0]]
    views = (learned + COUNT * torch.arange(VIEWS)[:, None]).flatten()
    few = copy.copy(parts)
    anomalies = parts.anomalies()
    drawn = anomalies["drawn"][views]
    few.drawn = drawn.expand(-1, len(BLOCKS), -1, -1)  # block 6, wherever it is looked for
    few.drawn_masks = anomalies["drawn_masks"][views]
    return {"images": cross_dataset.test(cross_dataset.learn([few], draw, drawn=True), parts)}


def patchcore(parts: Parts, shots: int, draw: int) -> Predictions:
    """PatchCore's predictions."""
    return {"images": lake_accuracy.patchcore(parts, shots, draw, None, (5, 8))}


def anomaly_dino(parts: Parts, shots: int, draw: int) -> Predictions:
    """AnomalyDINO's predictions."""
    return {"images": lake_accuracy.anomaly_dino(parts, shots, draw)}


Method = Callable[[Parts, int, int], Predictions]


class Experiment:
    """Tokens and predictions, kept in a folder, and the post-processors that decide about them."""

    def __init__(self, data: Path, cache: Path) -> None:
        self.data, self.cache = data, cache
        files = sorted(
            file for package in (anomalib_spg, anomalib_lake) for file in Path(package.__path__[0]).rglob("*.py")
        )
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        self.folder = cache / f"predictions-{digest[:12]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    @lru_cache(maxsize=1)  # noqa: B019
    def parts(self, name: str) -> Parts:
        """A dataset's tokens, computed or read from a former run."""
        file, drawn = self.cache / f"{name}.pt", self.cache / f"{name}-drawn.pt"
        if not file.exists():
            torch.save(prepare(name, self.data), file)
        images = torch.load(file, mmap=True, weights_only=True)

        def anomalies() -> dict[str, torch.Tensor]:
            if not drawn.exists():
                torch.save(prepare_drawn(name, self.data, images), drawn)
            return torch.load(drawn, mmap=True, weights_only=True)

        model = backbone(self.data)
        normal = torch.stack([model.pre_processor.transform(image) for image in pictures(name, self.data)[:COUNT]])
        Remembering.seen.clear()
        return Parts(images, model.model.backbone.vit, normal, anomalies)

    def predict(self, method: Method, name: str, count: int, draw: int) -> Predictions:
        """A method's predictions, computed or read from a former run."""
        file = self.folder / f"{name}-{method.__name__}-{count}-{draw}.pt"
        if not file.exists():
            predictions = method(self.parts(name), count, draw)
            torch.save({key: (x.pred_score, x.anomaly_map) for key, x in predictions.items()}, file)
        stored = torch.load(file, weights_only=True)
        return {key: InferenceBatch(pred_score=scores, anomaly_map=maps) for key, (scores, maps) in stored.items()}

    def good_parts(
        self,
        method: Method,
        name: str,
        good: int,
        draw: int,
        rate: float | None = None,
        shots: int = SHOTS,
    ) -> tuple[GoodPartsPostProcessor, InferenceBatch]:
        """The thresholds that so many good images give, and the predictions they decide about."""
        order = self.parts(name).draw(good, draw)
        if method is spg:
            predictions = self.predict(spg, name, good, draw)
            learned, held_out = (some(predictions["images"], order[part]) for part in split(good, draw))
            post_processor = SPG.configure_post_processor(rate)
            # As SPG.fit does: those it learned from help, corrected, where few are held out.
            scores, maps = (torch.sigmoid(logit(x) + OWN_IMAGES) for x in (learned.pred_score, learned.anomaly_map))
            post_processor.add_good(scores, None if good >= FEWEST else maps, learned_from=True)
            if good >= FEWEST:
                post_processor.add_good(held_out.pred_score, held_out.anomaly_map)
        else:
            predictions = self.predict(method, name, min(shots, good), draw)
            left_over = some(predictions["images"], order[shots:])
            post_processor = RawScorePostProcessor(false_alarm_rate=rate)
            if method in {lake, lake_3, lake_10, lake_anywhere}:
                post_processor, own = LAKE.configure_post_processor(rate), predictions["own"]
                maps = own.anomaly_map if len(own.pred_score) > good - shots else None
                post_processor.add_good(own.pred_score, maps, learned_from=True)
            if good > shots:
                post_processor.add_good(left_over.pred_score, left_over.anomaly_map)
        post_processor.place_thresholds()
        return post_processor, predictions["images"]


def some(predictions: InferenceBatch, indices: torch.Tensor | slice) -> InferenceBatch:
    """Predictions of some images."""
    return InferenceBatch(pred_score=predictions.pred_score[indices], anomaly_map=predictions.anomaly_map[indices])


def validated(
    post_processor: PostProcessor, good: InferenceBatch, bad: InferenceBatch, masks: torch.Tensor
) -> PostProcessor:
    """A post-processor of anomalib after validation on good and bad images."""
    masks = torch.cat([torch.zeros(len(good.pred_score), *masks.shape[1:], dtype=torch.bool), masks])
    batch = ImageBatch(
        image=torch.zeros(len(masks), 3, *masks.shape[1:]),
        gt_label=masks.flatten(1).any(dim=1),
        gt_mask=masks,
        pred_score=torch.cat([good.pred_score, bad.pred_score]),
        anomaly_map=torch.cat([good.anomaly_map, bad.anomaly_map])[:, 0],
    )
    post_processor.on_validation_batch_end(None, None, batch)
    post_processor.on_validation_epoch_end(None, None)
    return post_processor


def placed(threshold: float) -> PostProcessor:
    """A post-processor with a threshold on the logit scale, which anomalib takes for pixels, too."""
    post_processor = PostProcessor()
    post_processor._image_threshold.fill_(1 / (1 + math.exp(-threshold)))
    for name in ("image", "pixel"):
        getattr(post_processor, f"{name}_min").fill_(0)
        getattr(post_processor, f"{name}_max").fill_(1)
    return post_processor


def worth(post_processor: PostProcessor, predictions: InferenceBatch) -> list[float]:
    """False alarms, misses, F1, the best F1, the false alarms there, the gap, flagged pixels of good parts, AUROC."""
    tested = some(predictions, slice(COUNT, None))
    result = post_processor(tested)
    rejected = result.pred_label.flatten().bool().numpy()
    bad = np.arange(2 * COUNT) >= COUNT
    hits, alarms = int((rejected & bad).sum()), int((rejected & ~bad).sum())
    f1 = 2 * hits / (COUNT + hits + alarms)
    scores = tested.pred_score.numpy()
    precision, recall, thresholds = precision_recall_curve(bad, scores)
    by_threshold = (2 * precision * recall / np.maximum(precision + recall, 1e-9))[:-1]  # the last one rejects nothing
    best, there = float(by_threshold.max()), float((scores[~bad] >= thresholds[by_threshold.argmax()]).mean())
    pixels = float(result.pred_mask[:COUNT].float().mean())
    return [alarms / COUNT, 1 - hits / COUNT, f1, best, there, best - f1, pixels, float(roc_auc_score(bad, scores))]


Row = Callable[..., None]
FEW_AND_MANY = (8, 30)


def methods(experiment: Experiment, row: Row) -> None:
    """Each method with its own post-processor."""

    def rate(method: Method, good: int, shots: int) -> Callable[[str, int], list[float]]:
        return lambda name, draw: worth(*experiment.good_parts(method, name, good, draw, shots=shots))

    for good in (1, 4, *FEW_AND_MANY):
        row("LAKE", good, rate(lake, good, AUTO))
    for good in FEW_AND_MANY:
        row("LAKE, 4 in the bank", good, rate(lake, good, SHOTS))
    for good in (4, *FEW_AND_MANY):
        row("SPG", good, rate(spg, good, 0), slow=True)
    for title, method in (("PatchCore", patchcore), ("AnomalyDINO", anomaly_dino)):
        for good in FEW_AND_MANY:
            row(f"{title}, 4 in the bank", good, rate(method, good, SHOTS), slow=True)
        row(f"{title}, 15 in the bank", 30, rate(method, 30, 15), slow=True)


def rules(experiment: Experiment, row: Row) -> None:
    """LAKE with other rules that place a threshold by the images left over."""

    def rate(rule: Callable[[Predictions, Parts, torch.Tensor], PostProcessor], good: int) -> Callable:
        def by_rule(name: str, draw: int) -> list[float]:
            predictions, parts = experiment.predict(lake, name, SHOTS, draw), experiment.parts(name)
            predictions |= experiment.predict(lake_perlin, name, SHOTS, draw)
            return worth(rule(predictions, parts, parts.draw(good, draw)), predictions["images"])

        return by_rule

    def drawn(predictions: Predictions, parts: Parts, good: torch.Tensor, bad: torch.Tensor) -> PostProcessor:
        masks = parts.anomalies()["perlin_masks"][bad][:, ::4, ::4]
        return validated(PostProcessor(), some(predictions["images"], good), some(predictions["perlin"], bad), masks)

    def config(predictions: Predictions, parts: Parts, order: torch.Tensor) -> PostProcessor:
        tested = order[len(order) - len(order) // 5 :]  # a fifth, and anomalies on half of them, both rounded down
        return drawn(predictions, parts, tested[len(tested) // 2 :], tested[: len(tested) // 2])

    def on_all(predictions: Predictions, parts: Parts, order: torch.Tensor) -> PostProcessor:
        return drawn(predictions, parts, order[SHOTS:], order[SHOTS:])

    def logits(predictions: Predictions, order: torch.Tensor) -> torch.Tensor:
        return logit(predictions["images"].pred_score[order[SHOTS:]].double())

    def deviations(predictions: Predictions, _: Parts, order: torch.Tensor) -> PostProcessor:
        known = logits(predictions, order)
        return placed(float(known.mean() + 3 * known.std(correction=0)))

    def percentile(predictions: Predictions, parts: Parts, order: torch.Tensor) -> PostProcessor:
        masks = parts.anomalies()["perlin_masks"][:0, ::4, ::4]
        images = predictions["images"]
        return validated(SuperADDPostProcessor(), some(images, order[SHOTS:]), some(images, order[:0]), masks)

    def conformal(predictions: Predictions, _: Parts, order: torch.Tensor) -> PostProcessor:
        known = logits(predictions, order).sort().values
        rank = math.ceil((len(known) + 1) * (1 - FALSE_ALARM_RATE) - 1e-9)
        return placed(float(known[min(rank, len(known)) - 1]))

    for good in FEW_AND_MANY:
        row("ours", good, lambda name, draw, n=good: worth(*experiment.good_parts(lake, name, n, draw)))
        row("anomalib's F1, anomalies on half of a fifth (former config)", good, rate(config, good))
        row("anomalib's F1, anomalies on all that are left over", good, rate(on_all, good))
        row("mean + 3 standard deviations", good, rate(deviations, good))
        row("95 % percentile (SuperADD)", good, rate(percentile, good))
        row("conformal alone, or the highest score", good, rate(conformal, good))


def rates(experiment: Experiment, row: Row) -> None:
    """LAKE with other false-alarm rates."""
    for good in FEW_AND_MANY:
        for rate in (0.01, 0.02, 0.05, 0.08, 0.1):
            row(
                f"{rate:.0%}",
                good,
                lambda name, draw, n=good, rate=rate: worth(*experiment.good_parts(lake, name, n, draw, rate)),
            )


def banks(experiment: Experiment, row: Row) -> None:
    """LAKE with fewer of the good images in its bank, and more left over."""
    for good in (8, 16, 30, 40):
        for shots in sorted({4, min(good // 2, 16), min(good, AUTO)}):
            row(
                f"{shots} in the bank",
                good,
                lambda name, draw, n=good, k=shots: worth(*experiment.good_parts(lake, name, n, draw, shots=k)),
            )


def neighbors(experiment: Experiment, row: Row) -> None:
    """LAKE with several nearest tokens of the bank."""
    for good, shots in ((8, 4), (30, 4), (30, 15)):
        for count, method in ((1, lake), (3, lake_3), (10, lake_10)):
            row(
                f"num_neighbors {count}, {shots} in the bank",
                good,
                lambda name, draw, n=good, k=shots, m=method: worth(*experiment.good_parts(m, name, n, draw, shots=k)),
            )


def places(experiment: Experiment, row: Row) -> None:
    """LAKE as it is, and without the places of patches."""
    for good in (2, 4, *FEW_AND_MANY):
        for title, method in (("LAKE", lake), ("place_weight 0", lake_anywhere)):
            row(
                title,
                good,
                lambda name, draw, n=good, m=method: worth(*experiment.good_parts(m, name, n, draw, shots=AUTO)),
            )


TABLES = {table.__name__: table for table in (methods, rules, rates, banks, neighbors, places)}


def main() -> None:
    """Print the table asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES))
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("decisions_tokens"))
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--slow-draws", type=int, default=2, help="draws for SPG and the peers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="rows of the first table")
    parser.add_argument(
        "--only", nargs="+", choices=(*DATASETS, *objects.CATEGORIES, *pieces.CATEGORIES), default=DATASETS
    )
    arguments = parser.parse_args()
    experiment = Experiment(arguments.data, arguments.cache)
    figures: dict[tuple[str, int], list[torch.Tensor]] = {}  # by row, of each dataset
    for name in arguments.only:  # one after the other, so that the tokens of one are open at a time

        def row(
            title: str, good: int, rate: Callable[[str, int], list[float]], slow: bool = False, name: str = name
        ) -> None:
            if arguments.table == "methods" and title.split(",", 1)[0] not in arguments.methods:
                return
            draws = min(arguments.draws, arguments.slow_draws) if slow else arguments.draws
            by_draw = torch.tensor([rate(name, draw) for draw in range(draws)])
            figures.setdefault((title, good), []).append(100 * by_draw.mean(dim=0))

        TABLES[arguments.table](experiment, row)
    columns = ["false alarms", "worst", "misses", "F1", "best F1", "false alarms there", "gap", "pixels", "AUROC"]
    print(f"`python -m tests.benchmarks.decisions {arguments.table}`:\n")
    print(f"| | good images | {' | '.join(columns)} |\n|---|---{'|---' * len(columns)}|")
    for (title, good), by_dataset in figures.items():
        table = torch.stack(by_dataset)
        spreads = table.std(dim=0) if len(table) > 1 else torch.zeros(table.shape[1])
        digits = [1, 1, 1, 1, 1, 1, 2, 1]
        cells = [f"{m:.{d}f} ± {s:.{d}f}" for m, s, d in zip(table.mean(dim=0), spreads, digits, strict=True)]
        worst = int(table[:, 0].argmax())
        cells.insert(1, f"{table[worst, 0]:.1f} ({arguments.only[worst]})")
        print(f"| {title} | {good} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
