# SPDX-License-Identifier: Apache-2.0

"""What ten good images of a new kind bring to a fitted LAKE.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.lake_extension

LAKE is fitted on 4 good images of the quickstart's textile (``--fitted``), and 28 set the threshold, those it is fitted
on by what each scores against the others. Then the textile changes: it is turned by 90 degrees, or darker. Ten good
images of the changed textile are taken in, as ``--model.extend`` does. Good and bad images of both kinds, which neither
fit nor threshold have seen, are decided on before and after. Each passes the backbone once.
"""

import argparse
import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from anomalib.data.utils import read_image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from anomalib_lake import LAKE, LAKEModel
from anomalib_lake.extension import Extension
from anomalib_spg.components.post_processor import GoodPartsPostProcessor
from anomalib_spg.quickstart import BACKBONE

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "unchanged": lambda image: image,
    "turned": lambda image: image.rot90(1, (-2, -1)),
    "darker": lambda image: functional.adjust_brightness(image, 0.6),
}
TAKEN = 10
SIZE = (448, 448)
Tokens = list[tuple[dict[int, torch.Tensor], tuple[int, int]]]


class Textile:
    """Images of the quickstart, changed, and their tokens."""

    def __init__(self, folder: Path, model: LAKEModel) -> None:
        self.folder, self.model = folder, model
        self.transform = LAKE.configure_pre_processor(SIZE, BACKBONE).transform

    def images(self, kind: str, numbers: Sequence[int], change: str = "unchanged") -> torch.Tensor:
        """Normalised images ``(B, 3, H, W)``."""
        paths = sorted((self.folder / kind).iterdir())
        return torch.stack([self.transform(CHANGES[change](read_image(paths[n], as_tensor=True))) for n in numbers])

    @torch.inference_mode()
    def tokens(self, kind: str, numbers: Sequence[int], change: str = "unchanged") -> Tokens:
        """What the backbone gives for them."""
        images = self.images(kind, numbers, change).split(1)
        return [self.model.tokens(image) for image in tqdm(images, f"{kind}, {change}")]


@torch.inference_mode()
def scores(model: LAKEModel, tokens: Tokens) -> torch.Tensor:
    """Raw scores."""
    model.eval()
    found = [model._predict(model.structural_deviation(own, grid), None, grid, SIZE) for own, grid in tokens]
    return torch.cat([result.pred_score for result in found]) if found else torch.empty(0)


def threshold(held_out: torch.Tensor, learned: torch.Tensor | None = None) -> float:
    """Threshold at the default false-alarm rate."""
    post_processor = GoodPartsPostProcessor(prior=LAKE.prior)
    post_processor.add_good(held_out)
    if learned is not None:
        post_processor.add_good(learned, learned_from=True)
    post_processor.place_thresholds()
    return float(post_processor.image_threshold)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("quickstart"))
    parser.add_argument("--images", type=int, default=40, help="tested good and bad images of each kind")
    parser.add_argument("--fitted", type=int, default=4, help="good images it is fitted on, at most 28")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = LAKEModel(BACKBONE, weights=arguments.quickstart / "dinov2_vits14.safetensors", image_size=SIZE)
    textile = Textile(arguments.quickstart / "textile", model)
    drawn = torch.randperm(40).tolist()
    model.train()(textile.images("train/good", drawn[: arguments.fitted]))
    learned = model.fit().pred_score
    others = drawn[arguments.fitted : 28]
    held_out = textile.tokens("train/good", others) if others else []
    tested = range(TAKEN, TAKEN + arguments.images)
    kinds = {c: [textile.tokens(f"test/{kind}", tested, c) for kind in ("good", "defect")] for c in CHANGES}
    before = threshold(scores(model, held_out), learned)
    print("| textile | good parts rejected | bad parts accepted | image AUROC |\n|---|---|---|---|")
    for change in list(CHANGES)[1:]:
        larger = copy.deepcopy(model)
        extension = Extension(larger, first=arguments.fitted)
        extension.add(textile.images("test/good", range(TAKEN), change))
        new = extension.left_out().pred_score
        extension.finish()
        again = scores(larger, held_out)
        with_new, without = threshold(torch.cat([again, new]), learned), threshold(again, learned)
        rules = {
            f"and {TAKEN} {change} ones": with_new,
            "the same, threshold without them": without,
            "the same, threshold as before": before,
        }
        for shown in ("unchanged", change):
            for own, limits in ((model, {f"{arguments.fitted} images": before}), (larger, rules)):
                good, bad = (scores(own, tokens) for tokens in kinds[shown])
                auroc = roc_auc_score([0] * len(good) + [1] * len(bad), torch.cat([good, bad]))
                for name, limit in limits.items():
                    rates = f"{float((good > limit).float().mean()):.1%} | {float((bad <= limit).float().mean()):.1%}"
                    print(f"| {shown}, {name} | {rates} | {auroc:.3f} |", flush=True)


if __name__ == "__main__":
    main()
