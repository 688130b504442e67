# SPDX-License-Identifier: Apache-2.0

"""What more good images give LAKE and cost it, beside PatchCore with its coreset.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.lake_growth
    python -m tests.benchmarks.lake_growth --only grass --images 16 --threads 1
    python -m tests.benchmarks.lake_growth --only grass --images 1000 --methods LAKE

Sets of ``decisions`` (see there) with 40 good images to draw from, 40 unseen good ones and 40 bad ones. More than 40
images are those again with noise: 0.3 of each channel's deviation, so that no image is a copy of another.

Printed: tokens in the banks; what is held while images come, in MiB; seconds of the fit, and as share of the time of
the backbone's pass over as many images; milliseconds from tokens to map and score of a test image, and as share of its
pass; image AUROC in percent. Seconds are those of the processor, mean over sets and draws.

DINOv2-S/14 at 448x448, blocks 5 and 8 of 12 for both; PatchCore keeps 10 % of its tokens. Every image passes the
backbone once; its tokens, 190 MB a set, are kept in ``--cache``.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from sklearn.metrics import roc_auc_score
from torch import nn
from tqdm import tqdm

from anomalib_lake import LAKEModel
from anomalib_spg.quickstart import BACKBONE
from tests.benchmarks.decisions import COUNT, DATASETS, pictures
from tests.benchmarks.lake_accuracy import DEFAULT, GRID, Tokens, backbone, tokens

SIZE = (448, 448)
NOISE = 0.3
LABELS = torch.arange(2 * COUNT) >= COUNT

Image = dict[int, torch.Tensor]  # tokens (1, N, D) by block


def read(name: str, data: Path, cache: Path) -> torch.Tensor:
    """Tokens ``(120, 2, N, D)`` of a set, computed or read from a former run."""
    file = cache / f"{name}.pt"
    if not file.exists():
        model = backbone(data, DEFAULT)
        images = tqdm(pictures(name, data), name)
        torch.save(torch.cat([tokens(model, model.pre_processor.transform(image)[None]) for image in images]), file)
    return torch.load(file, mmap=True, weights_only=True)


def by_block(image: torch.Tensor) -> Image:
    """Single precision, as the backbone gives them."""
    return {block: image[None, column].float() for column, block in enumerate(DEFAULT)}


def draw(stored: torch.Tensor, count: int, seed: int) -> Iterator[Image]:
    """Good images to learn from; from the 41st on with noise."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(COUNT, generator=generator)
    deviation = stored[:COUNT].float().std(dim=(0, 2), keepdim=True)[0]
    for number in range(count):
        image = stored[order[number % COUNT]].float()
        if number >= COUNT:
            image = image + NOISE * deviation * torch.randn(image.shape, generator=generator)
        yield by_block(image)


def lake(stored: torch.Tensor, count: int, seed: int) -> list[float]:
    """Tokens, MiB, seconds of the fit, seconds of a test image, AUROC."""
    torch.manual_seed(seed)
    model = LAKEModel(BACKBONE, pre_trained=False, image_size=SIZE, num_shifts=1)  # tokens alone have no copies
    seconds, held = 0.0, 0
    for image in draw(stored, count, seed):
        start = time.process_time()
        model.store(image, GRID, SIZE)
        seconds += time.process_time() - start
        kept = [*(part for layer in model._stored for part in layer), *model._projected]
        kept += [rows[0] for bank in model._all_banks() for rows in bank._added]
        held = max(held, sum(part.numel() for part in kept))
    start = time.process_time()
    model.fit()
    seconds += time.process_time() - start
    scores, start = [], time.process_time()
    with torch.inference_mode():
        for image in stored[COUNT:]:
            deviation = model.structural_deviation(by_block(image), GRID)
            scores.append(float(model._predict(deviation, None, GRID, SIZE).pred_score))
    each = (time.process_time() - start) / len(scores)
    size = sum(len(bank.tokens) for bank in model._all_banks())
    return [size, held * 4 / 2**20, seconds, each, roc_auc_score(LABELS, scores)]


def patchcore(stored: torch.Tensor, count: int, seed: int, norm: nn.Module) -> list[float]:
    """The same of anomalib's PatchCore, which takes tokens after the final norm, as maps."""
    torch.manual_seed(seed)
    model = PatchcoreModel([f"blocks.{block}" for block in DEFAULT], BACKBONE, pre_trained=False)

    def give(image: Image) -> torch.Tensor:
        model.feature_extractor = Tokens({f"blocks.{b}": norm(x).mT.unflatten(2, GRID) for b, x in image.items()})
        return torch.zeros(1, 1, *SIZE)

    with torch.inference_mode():
        model.train()
        for image in draw(stored, count, seed):
            model(give(image))
        held = sum(part.numel() for part in model.embedding_store)
        start = time.process_time()
        model.subsample_embedding(0.1)
        seconds = time.process_time() - start
        model.eval()
        scores, each = [], 0.0
        for image in stored[COUNT:]:
            batch = give(by_block(image))
            start = time.process_time()
            scores.append(float(model(batch).pred_score))
            each += (time.process_time() - start) / 2 / COUNT
    return [len(model.memory_bank), held * 4 / 2**20, seconds, each, roc_auc_score(LABELS, scores)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("growth_tokens"))
    parser.add_argument("--only", nargs="+", choices=DATASETS, default=("textile-real", "grass", "gravel", "tissue"))
    parser.add_argument("--images", nargs="+", type=int, default=[1, 4, 16, 40])
    parser.add_argument("--methods", nargs="+", choices=["LAKE", "PatchCore"], default=["LAKE", "PatchCore"])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    model = backbone(arguments.data, DEFAULT)
    norm = model.model.backbone.vit.norm
    methods = {"LAKE": lake, "PatchCore": lambda *rest: patchcore(*rest, norm)}
    sets = {name: read(name, arguments.data, arguments.cache) for name in arguments.only}

    def one_pass() -> float:
        """Seconds of the backbone for an image, median of five."""
        times = []
        for _ in range(5):
            start = time.process_time()
            tokens(model, torch.randn(1, 3, *SIZE))
            times.append(time.process_time() - start)
        return sorted(times)[2]

    print("| | images | tokens | MiB | fit s | of their pass | test image ms | of its pass | image AUROC |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, method in methods.items():
        for count in arguments.images if name in arguments.methods else []:
            rows = []
            for stored in sets.values():
                for seed in range(arguments.draws):
                    size, held, fit, each, auroc = method(stored, count, seed)
                    one = one_pass()
                    rows.append([size, held, fit, fit / count / one, 1000 * each, each / one, 100 * auroc])
            size, held, fit, of_fit, each, of_one, auroc = torch.tensor(rows).mean(dim=0).tolist()
            cells = f"{size:.0f} | {held:.0f} | {fit:.2f} | {of_fit:.0%} | {each:.0f} | {of_one:.1%} | {auroc:.1f}"
            print(f"| {name} | {count} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
