# SPDX-License-Identifier: Apache-2.0

"""LAKE on round parts that lie in any direction, with rotated copies of its good images in the bank.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.rotations

Four parts (tests/objects.py), images four wide and three high, which the model squeezes to squares: 24 good images, 40
unseen good ones and 40 bad ones. LAKE compares with 1 or 4 of the 24 and places its threshold by 20 others; or with all
of them, its default, and places it by what each scores against the others. Mean over ``--draws`` of the good images
that are compared with. Without rotations images are compared with as they are, or with shifted copies (``--shifts``).
``--objects`` takes objects that lie nearly in place: there rotated copies bring nothing. Every image passes the
backbone once, copies whenever they are needed. Printed are image AUROC by part, the share of good images rejected and
bad ones accepted at the default false-alarm rate, in percent, and the seconds that the fit took.
"""

import argparse
import time
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from anomalib_lake import LAKE, LAKEModel
from anomalib_spg.quickstart import BACKBONE
from tests import objects

PARTS = ("cup", "cat", "motorcycle", "retina")
GOOD, TESTED, HELD_OUT = 24, 40, 20
SIZE = (448, 448)


def rate(
    model: LAKEModel, images: torch.Tensor, tokens: list, shots: int, draw: int, aspect: float
) -> tuple[float, float, float, float]:
    """Image AUROC, good images rejected, bad ones accepted, seconds."""
    drawn = torch.randperm(GOOD, generator=torch.Generator().manual_seed(draw))
    model.forget()
    model.pixel_aspect = aspect
    start = time.perf_counter()
    model.train()(images[drawn[:shots]])
    left_out = model.fit()
    seconds = time.perf_counter() - start
    post_processor = LAKE.configure_post_processor()
    model.eval()
    with torch.inference_mode():
        results = [model.score(*of_image, SIZE) for of_image in tokens]
    scores = torch.cat([result.pred_score for result in results])
    maps = torch.cat([result.anomaly_map[..., ::4, ::4] for result in results])
    held_out = drawn[max(shots, GOOD - HELD_OUT) :]
    post_processor.add_good(left_out.pred_score, None if len(held_out) else left_out.anomaly_map, learned_from=True)
    if len(held_out):
        post_processor.add_good(scores[held_out], maps[held_out])
    post_processor.place_thresholds()
    rejected = post_processor(InferenceBatch(pred_score=scores, anomaly_map=maps)).pred_label.flatten().float()
    good, bad = slice(GOOD, GOOD + TESTED), slice(GOOD + TESTED, None)
    auroc = roc_auc_score([0] * TESTED + [1] * TESTED, scores[GOOD:])
    return 100 * auroc, 100 * float(rejected[good].mean()), 100 * float(1 - rejected[bad].mean()), seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--rotations", nargs="+", type=int, default=[1, 4, 8, 24])
    parser.add_argument("--shots", nargs="+", type=int, default=[1, 4, 24])
    parser.add_argument("--shifts", type=int, default=1, help="num_shifts, for rows without rotated copies")
    parser.add_argument("--objects", action="store_true", help="objects that lie nearly in place")
    arguments = parser.parse_args()
    transform = LAKE.configure_pre_processor(SIZE, BACKBONE).transform
    weights = arguments.data / "dinov2_vits14.safetensors"
    figures: dict[tuple[int, int], list[torch.Tensor]] = {}  # by shots and rotations, of each part
    names = objects.CATEGORIES if arguments.objects else PARTS
    for name in names:
        take = objects.take if arguments.objects else objects.take_round
        taken = [
            torch.from_numpy(x).permute(2, 0, 1) / 255 for x in objects.take_all(take, name, GOOD + TESTED, TESTED)
        ]
        aspect = taken[0].shape[-1] / taken[0].shape[-2]
        images, tokens = torch.stack([transform(image) for image in taken]), []
        for rotations in arguments.rotations:
            torch.manual_seed(0)
            copies = {"num_rotations": rotations, "num_shifts": arguments.shifts}
            model = LAKEModel(BACKBONE, weights=weights, image_size=SIZE, **copies)
            with torch.inference_mode():
                tokens = tokens or [model.tokens(image) for image in tqdm(images.split(1), name)]
            for shots in arguments.shots:
                by_draw = [rate(model, images, tokens, shots, draw, aspect) for draw in range(arguments.draws)]
                figures.setdefault((shots, rotations), []).append(torch.tensor(by_draw).mean(dim=0))
    print(f"| shots | num_rotations | {' | '.join(names)} | image AUROC | good rejected | bad accepted | fit, s |")
    print(f"|---|---|{'---|' * (len(names) + 4)}")
    for (shots, rotations), by_part in sorted(figures.items()):
        table = torch.stack(by_part)
        mean = table.mean(dim=0).tolist()
        cells = [f"{value:.1f}" for value in (*table[:, 0].tolist(), *mean)]
        print(f"| {shots} | {rotations} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
