# SPDX-License-Identifier: Apache-2.0

"""What training SPG costs, and how that grows.

    python -m anomalib_spg.quickstart
    python -m tests.benchmarks.training stages
    python -m tests.benchmarks.training products
    python -m tests.benchmarks.training scale --folder <a disk with 30 GB free>
    python -m tests.benchmarks.training processes
    python -m tests.benchmarks.training published --device cuda --precision bf16
    python -m tests.benchmarks.training products --device cuda --dim 1024 --grid 28 --epochs 20

- stages: seconds in backbone, dictionary and guides, and the memory they add at its peak, as images, resolution and
  atoms grow.
- products: a training step over a bare loop of the two matrix products of its formulas, interleaved, median of runs.
- scale: 10 and 100 times the images, in memory and on disk.
- processes: guides learned by one and by two processes, rated on textures never seen.
- published: the whole at the published scale: 2,162 images of 448x448, DINOv3-L/16 with random weights, 4,096 atoms, 50
  and 15 epochs. Shares are those of the rate of a large product in single precision (bf16 of the backbone: in that).

DINOv2-S/14 but for the last. Tables without accuracy use random tokens where the backbone's time is not what they show.
The dictionary's time depends on values by the atoms that die: in ``published`` tokens lie near a subspace.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode

from anomalib_spg import GuideSettings, SPGModel
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import Guides, train_guides
from anomalib_spg.quickstart import BACKBONE
from anomalib_spg.sae import TopKSAE, train_sae
from anomalib_spg.token_store import GIB, TokenStore

DIM, PATCHES, GRID = 384, 1024, (32, 32)
IMAGES = 2162  # of the auxiliary dataset, VisA (paper)


def memory(*fields: str) -> float:
    """Sum of fields of Linux' /proc/self/status, in GiB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return sum(int(status[field].split()[0]) for field in fields) * 1024 / GIB


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of a call, the accelerator's queue included."""
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def stages(arguments: argparse.Namespace) -> None:
    """A process for each row, so that memory is that row's alone."""
    print("| images | resolution | atoms | backbone s | dictionary s/epoch | guides s/epoch | peak memory GiB |")
    print("|---|---|---|---|---|---|---|")
    for images, size, atoms in ((32, 448, 1024), (64, 448, 1024), (32, 224, 1024), (32, 448, 4096)):
        command = [sys.executable, "-m", "tests.benchmarks.training", "stage", "--data", str(arguments.data)]
        command += ["--images", str(images), "--size", str(size), "--atoms", str(atoms)]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip(), flush=True)


def stage(arguments: argparse.Namespace) -> None:
    """One row: two epochs of each stage, so that the first one's warming up counts half."""
    model = SPGModel(
        BACKBONE,
        layers=[6],
        weights=arguments.data / "dinov2_vits14.safetensors",
        image_size=(arguments.size, arguments.size),
    ).to(arguments.device)
    model.train()
    model.backbone(torch.zeros(1, 3, arguments.size, arguments.size, device=arguments.device))  # reads the weights
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # forgets the peak
    before = memory("VmHWM")
    masks = torch.zeros(8, arguments.size, arguments.size)
    masks[:4, :50, :50] = 1
    for _ in range(arguments.images // 8):
        model(torch.randn(8, 3, arguments.size, arguments.size, device=arguments.device), masks)
    model.fit(GuideSettings(num_atoms=arguments.atoms, sae_epochs=2, guide_epochs=2))
    spent = model.seconds
    print(
        f"| {arguments.images} | {arguments.size} | {arguments.atoms} | {spent['backbone']:.1f} | "
        f"{spent['sae'] / 2:.1f} | {spent['guides'] / 2:.1f} | {memory('VmHWM') - before:.2f} |"
    )


def products(arguments: argparse.Namespace) -> None:
    """Steps of 16 images for the dictionary, 8 for the guides, over the products their formulas hold."""
    print("| stage | atoms | bare products over step | quartiles |\n|---|---|---|---|")
    device, dim, grid, epochs = arguments.device, arguments.dim, (arguments.grid, arguments.grid), arguments.epochs
    patches, side = grid[0] * grid[1], 14 * grid[0]
    for atoms in (1024, 4096):
        tokens = [torch.randn(patches, dim, device=device).half() for _ in range(16)]
        sae = TopKSAE(dim, atoms).to(device)
        x, encoder = torch.cat(tokens).float(), torch.randn(atoms, dim, device=device)
        code = torch.randn(len(x), atoms, device=device)
        compare(
            f"dictionary | {atoms}",
            lambda sae=sae, tokens=tokens: train_sae(sae, tokens, epochs=epochs),
            # pre-activations, and the encoder's gradient; train_sae encodes once more to see which atoms fire
            lambda x=x, encoder=encoder, code=code: (
                [(x @ encoder.T, code.T @ x) for _ in range(epochs)] and x @ encoder.T
            ),
            arguments.runs,
        )
    for atoms in (1024, 4096):
        tokens, masks = [torch.randn(patches, dim).half() for _ in range(8)], list(torch.zeros(8, side, side))
        masks[0][:50, :50] = 1
        dictionary, labels = F.normalize(torch.randn(atoms, dim, device=device)), [True] + [False] * 7
        alive, store = torch.ones(atoms, dtype=torch.bool, device=device), TokenStore()
        store.add(Tokens([torch.stack(tokens)], [torch.randn(8, dim)], grid), torch.stack(masks), labels)
        settings = GuideSettings(num_atoms=atoms, guide_epochs=epochs)
        x = torch.stack(tokens).to(device, torch.float32)
        weights, directions = torch.randn(4, atoms, device=device), torch.randn(dim, device=device)
        compare(
            f"guides | {atoms}",
            lambda d=dictionary, a=alive, s=store, c=settings: train_guides(Guides(dim).to(device), d, a, s, 0, 14, c),
            # guide vectors and their coefficients' gradient, similarities and the vectors' gradient
            lambda x=x, w=weights, d=dictionary, v=directions: [
                (w @ d, (w @ d) @ d.T, x @ v, x.flatten(0, 1).T @ (x @ v).flatten()) for _ in range(epochs)
            ],
            arguments.runs,
        )


def compare(title: str, step: Callable[[], object], bare: Callable[[], object], runs: int) -> None:
    """Print the median of the ratios of interleaved runs."""
    step(), bare()
    shares = sorted(seconds(bare) / seconds(step) for _ in range(runs))
    low, middle, high = statistics.quantiles(shares, n=4)
    print(f"| {title} | {middle:.2f} | {low:.2f} to {high:.2f} |", flush=True)


def scale(arguments: argparse.Namespace) -> None:
    """240 images are the quickstart's 40 in 6 views."""
    print(
        "| images | tokens GiB | place | storing s | step of the dictionary s | memory GiB |\n|---|---|---|---|---|---|"
    )
    need = SPGModel(BACKBONE, layers=[6], pre_trained=False, image_size=(448, 448)).memory_need(1, (448, 448)) / GIB
    for images, folder in (
        (240, None),
        (240, arguments.folder),
        (2_400, None),
        (2_400, arguments.folder),
        (24_000, arguments.folder),
    ):
        before = memory("RssAnon", "RssShmem")  # without pages that are only a file's and can be dropped
        store = TokenStore(folder, {"images": images})
        try:
            storing, step = store_and_train(store, images, arguments.device)
            held = memory("RssAnon", "RssShmem") - before
            row = f"{'memory' if folder is None else 'disk'} | {storing:.1f} | {step:.3f} | {held:.1f}"
        finally:
            store.clear()
        print(f"| {images} | {images * need:.1f} | {row} |", flush=True)
    print(f"| 240000 | {240_000 * need:.0f} (arithmetic) | disk | | | |")


def store_and_train(store: TokenStore, images: int, device: str) -> tuple[float, float]:
    """Seconds to store so many images, and median seconds of 40 steps on 16 random ones of them."""
    batch = Tokens([torch.randn(16, PATCHES, DIM)], [torch.randn(16, DIM)], GRID)
    masks = torch.zeros(16, 448, 448, dtype=torch.bool)
    storing = seconds(lambda: [store.add(batch, masks, [False] * 16) for _ in range(images // 16)])
    sae = TopKSAE(DIM, 1024).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), fused=True)

    def step() -> None:
        numbers = torch.randint(images, (16,))
        optimizer.zero_grad()
        sae.loss(torch.cat([store.patches[0][i] for i in numbers]).to(device, torch.float32)).backward()
        optimizer.step()

    return storing, statistics.median(seconds(step) for _ in range(40))


def process(rank: int, world: int, arguments: argparse.Namespace, seed: int, folder: str) -> None:
    """One of the processes: learns on its share of the photographs, and rates on the other dataset."""
    from tests.benchmarks.cross_dataset import BLOCKS, Category, collect, learn, test

    torch.set_num_threads(max(1, torch.get_num_threads() // world))
    if world > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=world)
    datasets = collect(arguments.data, arguments.cache)

    def share(category: Category) -> Category:
        stored = {name: getattr(category, name)[rank::world] for name in ("test", "masks", "labels")}
        return Category({**stored, "train": category.train, "drawn": [], "drawn_masks": []}, category.norm)

    assert 6 in BLOCKS
    model = learn([share(category) for category in datasets["mvtec"].values()], seed)
    if rank == 0:
        rates = torch.tensor([test(model, category) for category in datasets["visa"].values()]).mean(dim=0)
        Path(folder, "rates").write_text(" | ".join(f"{100 * rate:.1f}" for rate in rates.tolist()), encoding="utf-8")


def processes(arguments: argparse.Namespace) -> None:
    """Both divide the threads there are."""
    print("| processes | seed | image AUROC | image AP | pixel AUROC | pixel AUPRO |\n|---|---|---|---|---|---|")
    for seed in range(3):
        for world in (1, 2):
            with tempfile.TemporaryDirectory() as folder:
                torch.multiprocessing.spawn(process, (world, arguments, seed, folder), nprocs=world)
                print(f"| {world} | {seed} | {Path(folder, 'rates').read_text(encoding='utf-8')} |", flush=True)


def published(arguments: argparse.Namespace) -> None:
    """Every image is new; half of them are anomalous."""
    device, side = torch.device(arguments.device), 8192 if arguments.device == "cuda" else 2048

    def rate(dtype: torch.dtype) -> float:
        """Operations a second of a large product."""
        a, b = torch.randn(2, side, side, device=device, dtype=dtype)
        seconds(lambda: a @ b)
        return 20 * side**3 / seconds(lambda: [a @ b for _ in range(10)])

    images, size = max(16, round(IMAGES * arguments.share)), (448, 448)
    settings = GuideSettings(
        sae_epochs=max(1, round(GuideSettings.sae_epochs * arguments.share)),
        guide_epochs=max(1, round(GuideSettings.guide_epochs * arguments.share)),
    )
    rates = {name: rate(dtype) for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16))}
    model = SPGModel(pre_trained=False, image_size=size).to(device).train()
    masks = torch.zeros(8, *size, device=device)
    masks[:4, :50, :50] = 1
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.backbone(torch.zeros(1, 3, *size, device=device))

    def store() -> None:
        for start in range(0, images, 8):
            count = min(8, images - start)
            with torch.autocast(device.type, torch.bfloat16, enabled=arguments.precision == "bf16"):
                model(torch.randn(count, 3, *size, device=device), masks[:count])

    backbone = seconds(store)
    dim, mean = model.backbone.embed_dim, torch.randn(model.backbone.embed_dim, device=device)
    basis = torch.randn(64, dim, device=device) / 8
    for image in model.store.patches[0]:
        tokens = mean + torch.randn(len(image), 64, device=device) @ basis
        image.copy_(tokens + 0.1 * torch.randn(len(image), dim, device=device))
    patches = len(model.store.patches[0][0])
    start = time.perf_counter()
    model.fit(settings)
    whole = backbone + time.perf_counter() - start
    used = len(model.guides[0].atoms)
    # pre-activations and the encoder's gradient in every epoch, and pre-activations once more in the end
    products = (4 * settings.sae_epochs + 2) * images * patches * dim * settings.num_atoms
    print("| stage | seconds | of the rate |\n|---|---|---|")
    share = counter.get_total_flops() * images / backbone / rates[arguments.precision]
    print(f"| backbone ({arguments.precision}) | {backbone:.1f} | {share:.2f} |")
    sae = model.seconds["sae"]
    print(f"| dictionary, {settings.sae_epochs} epochs | {sae:.1f} | {products / sae / rates['32']:.2f} |")
    print(f"| guides, {settings.guide_epochs} epochs | {model.seconds['guides']:.1f} | |\n| whole | {whole:.1f} | |")
    print(
        f"TFLOP/s of a large product: {rates['32'] / 1e12:.0f}, bf16 {rates['bf16'] / 1e12:.0f}; atoms in use: {used}"
    )


def main() -> None:
    """Print the table asked for."""
    tables = {function.__name__: function for function in (stages, stage, products, scale, processes, published)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=tables)
    parser.add_argument("--data", type=Path, default=Path("quickstart"))
    parser.add_argument("--cache", type=Path, default=Path("cross_dataset_tokens"))
    parser.add_argument("--folder", type=Path, default=Path("tokens"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=9)
    for name, default in (("images", 32), ("size", 448), ("atoms", 1024)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the table 'stage', one row of 'stages'")
    for name, default in (("dim", DIM), ("grid", GRID[0]), ("epochs", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="of the table 'products'")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="of 'published': the backbone's")
    parser.add_argument("--share", type=float, default=1.0, help="of the images and epochs of 'published'")
    arguments = parser.parse_args()
    tables[arguments.table](arguments)


if __name__ == "__main__":
    main()
