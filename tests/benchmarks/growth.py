# SPDX-License-Identifier: Apache-2.0

"""How time and memory grow: a table with the exponent of each curve, and a picture of them.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.growth
    python -m tests.benchmarks.growth --only atoms shots --picture growth.png

- images: 100 to 100,000 on disk, of 8x8 tokens of 64 channels, so that they fit: seconds to store them, seconds of an
  epoch of the dictionary, memory held.
- resolution: 224 to 1,008 pixels: seconds of the bare backbone's blocks, of SPG and of LAKE with 4 shots, one image.
- atoms: 512 to 16,384: seconds of a step of the dictionary (16 images of 448x448) and of the guides (8 images).
- shots: 1 to 1,000: seconds of LAKE's fit from tokens, milliseconds of a test image beside the backbone, memory held.
- processes: 1, 2 and 4 on this machine, which have its threads among them: seconds of both stages of SPG.

Exponents are the slopes of straight lines through the logarithms: 1 is linear, 0 does not grow. Tokens are random but
for the shots; no time but theirs depends on values. Shots are the good images of a set of ``decisions``, with noise
from the 41st on. Seconds are the shortest of three where they are below two.
"""

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import LAKEModel
from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import Guides, train_guides
from anomalib_spg.quickstart import BACKBONE
from anomalib_spg.sae import TopKSAE, train_sae
from anomalib_spg.token_store import TokenStore
from tests.benchmarks import lake_growth
from tests.benchmarks.training import DIM, GRID, PATCHES, memory, seconds

Rows = Iterator[tuple[int, dict[str, float]]]  # how much of it, and what was measured, by name and unit
TITLES = {
    "images": "images on disk",
    "resolution": "pixels a side",
    "atoms": "atoms",
    "shots": "good images of LAKE",
    "processes": "processes",
}


def shortest(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the shortest of three if they are few."""
    times: list[float] = []
    while len(times) < 3 and sum(times) < 2:
        times.append(seconds(run))
    return min(times)


def images(arguments: argparse.Namespace) -> Rows:
    """Memory is what cannot be dropped: pages of files can."""
    tokens = Tokens([torch.randn(100, 64, 64)], [torch.randn(100, 64)], (8, 8))
    batch = (tokens, torch.zeros(100, 32, 32, dtype=torch.bool), [False] * 100)
    for count in (100, 1_000, 10_000, 100_000):
        before = memory("RssAnon", "RssShmem")
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            store = TokenStore(folder)
            storing = seconds(lambda add=store.add, batches=count // 100: [add(*batch) for _ in range(batches)])
            sae = TopKSAE(64, 256, k=8)
            epoch = shortest(lambda sae=sae, store=store: train_sae(sae, store.patches[0], epochs=1))
            held = memory("RssAnon", "RssShmem") - before
            store.clear()
        yield count, {"storing, s": storing, "epoch of the dictionary, s": epoch, "memory held, GiB": max(held, 1e-3)}


def resolution(arguments: argparse.Namespace) -> Rows:
    """Whole passes, image to map and score."""
    del arguments
    for size in (224, 336, 448, 672, 1008):
        image = torch.randn(1, 3, size, size)
        spg = SPGModel(BACKBONE, layers=[6], pre_trained=False, image_size=(size, size)).eval()
        atoms = F.normalize(torch.randn(64, DIM), dim=1)
        spg.guides[0].set(atoms, torch.arange(64), torch.rand(4, 64))
        lake = LAKEModel(BACKBONE, pre_trained=False, image_size=(size, size))
        with torch.inference_mode():
            lake.train()
            for _ in range(4):
                lake(torch.randn(1, 3, size, size))
            lake.fit()
            lake.eval()
            times = {
                "LAKE's blocks, s": shortest(lambda: lake.backbone(image)),  # noqa: B023  # called at once
                "SPG, s": shortest(lambda: spg(image)),  # noqa: B023
                "LAKE, 4 shots, s": shortest(lambda: lake(image)),  # noqa: B023
            }
        yield size, times


def atoms(arguments: argparse.Namespace) -> Rows:
    """One epoch is one step, and for the dictionary a pass to see which atoms fire."""
    del arguments
    tokens, masks = [torch.randn(PATCHES, DIM).half() for _ in range(16)], list(torch.zeros(8, 448, 448))
    masks[0][:50, :50] = 1
    store = TokenStore()
    store.add(Tokens([torch.stack(tokens[:8])], [torch.randn(8, DIM)], GRID), torch.stack(masks), [True] + [False] * 7)
    for count in (512, 1024, 2048, 4096, 8192, 16384):
        sae = TopKSAE(DIM, count)
        dictionary, alive = F.normalize(torch.randn(count, DIM), dim=1), torch.ones(count, dtype=torch.bool)
        settings = GuideSettings(num_atoms=count, guide_epochs=1)
        yield (
            count,
            {
                "step of the dictionary, s": shortest(lambda: train_sae(sae, tokens, epochs=1)),  # noqa: B023
                "step of the guides, s": shortest(
                    lambda: train_guides(Guides(DIM), dictionary, alive, store, 0, 14, settings)  # noqa: B023
                ),
            },
        )


def shots(arguments: argparse.Namespace) -> Rows:
    """Tokens of the set's images are kept in ``--cache``."""
    stored = lake_growth.read("grass", arguments.data, arguments.cache)
    for count in (1, 4, 16, 40, 100, 300, 1000):
        _, held, fit, each, _ = lake_growth.lake(stored, count, seed=0)
        yield count, {"fit, s": fit, "a test image, ms": 1000 * each, "memory held, MiB": held}


def share(rank: int, world: int, folder: str, threads: int) -> None:
    """One of the processes that learn together, on its share of 32 images."""
    torch.set_num_threads(max(1, threads // world))
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=world)
    model = SPGModel(BACKBONE, layers=[6], pre_trained=False, image_size=(448, 448))
    count = 32 // world
    masks = torch.zeros(count, 448, 448)
    masks[0, :50, :50] = 1
    tokens = Tokens([torch.randn(count, PATCHES, DIM)], [torch.randn(count, DIM)], GRID)
    model.store.add(tokens, masks, [True] + [False] * (count - 1))
    model.fit(GuideSettings(num_atoms=1024, sae_epochs=4, guide_epochs=4))
    if rank == 0:
        Path(folder, "seconds").write_text(f"{model.seconds['sae']} {model.seconds['guides']}", encoding="utf-8")


def processes(arguments: argparse.Namespace) -> Rows:
    """Four epochs of each stage on 32 images."""
    del arguments
    for world in (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(share, (world, folder, torch.get_num_threads()), nprocs=world)
            dictionary, guides = map(float, Path(folder, "seconds").read_text(encoding="utf-8").split())
        yield world, {"dictionary, s": dictionary, "guides, s": guides}


def exponent(amounts: list[int], values: list[float]) -> float:
    """Slope of the straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(amounts), np.log(values), 1)[0])


def draw(axes: Axes, title: str, amounts: list[int], curves: dict[str, list[float]]) -> None:
    """One curve for each quantity, with its exponent, on logarithmic axes."""
    for (name, values), marker in zip(curves.items(), "os^", strict=False):
        axes.plot(amounts, values, marker=marker, markersize=4, label=f"{name}: n^{exponent(amounts, values):.2f}")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set_xticks(amounts, [f"{amount:,}" for amount in amounts], fontsize=7, rotation=30)
    axes.minorticks_off()
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=7, loc="upper left", frameon=False)


def main() -> None:
    """Print the table, and draw."""
    measures = {function.__name__: function for function in (images, resolution, atoms, shots, processes)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=measures, default=list(measures))
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("growth_tokens"), help="tokens of the set for the shots")
    parser.add_argument("--folder", type=Path, help="a disk with 2 GB free; the system's temporary folder by default")
    parser.add_argument("--picture", type=Path, default=Path("growth.png"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    arguments.cache.mkdir(parents=True, exist_ok=True)

    columns = min(3, len(arguments.only))
    rows = math.ceil(len(arguments.only) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(4 * columns, 3.3 * rows), squeeze=False, layout="constrained")
    panels = list(grid.flat)
    for axes, name in zip(panels, arguments.only, strict=False):
        amounts: list[int] = []
        curves: dict[str, list[float]] = {}
        for amount, values in measures[name](arguments):
            amounts.append(amount)
            for curve, value in values.items():
                curves.setdefault(curve, []).append(value)
        print(f"\n| {TITLES[name]} | {' | '.join(f'{amount:,}' for amount in amounts)} | exponent |")
        print("|---" * (len(amounts) + 2) + "|")
        for curve, numbers in curves.items():
            print(
                f"| {curve} | {' | '.join(f'{n:.3g}' for n in numbers)} | {exponent(amounts, numbers):.2f} |",
                flush=True,
            )
        draw(axes, TITLES[name], amounts, curves)
    for axes in panels[len(arguments.only) :]:
        axes.axis("off")
    figure.savefig(arguments.picture, dpi=110, facecolor="white")


if __name__ == "__main__":
    main()
