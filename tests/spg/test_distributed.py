# SPDX-License-Identifier: Apache-2.0

"""Training in two processes gives what one process gives."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import PropertyMock, patch

import pandas as pd
import pytest
import torch
from torch import distributed, multiprocessing

from anomalib_spg import GuideSettings
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.guides import Guides, train_guides
from anomalib_spg.sae import TopKSAE, train_sae
from anomalib_spg.token_store import TokenStore, memory_need
from tests.helpers import REPOSITORY, data, engine, make_mvtec, run_command
from tests.lake.test_lightning_model import build as build_lake
from tests.spg.test_lightning_model import build

IMAGES, PATCHES, DIM, ATOMS = 8, 16, 12, 600


def learn(numbers: range) -> dict[str, torch.Tensor]:
    """Train both stages on some of the images, the whole set being one batch, so that the order does not matter."""
    torch.manual_seed(0)
    patches = list(torch.randn(IMAGES, PATCHES, DIM))
    masks = list(torch.zeros(IMAGES, 16, 16))
    for image in range(0, IMAGES, 3):  # so that processes hold different numbers of anomalous images
        masks[image][:4, :4] = 1
        patches[image][0, 0] += 3
    patches, masks = [patches[i] for i in numbers], [masks[i] for i in numbers]
    torch.manual_seed(numbers.start)  # each process draws its own beginning; the first one's must win
    sae = TopKSAE(DIM, ATOMS, k=3, dead_after=200)
    alive = train_sae(sae, patches, epochs=12, batch_size=IMAGES)
    torch.manual_seed(numbers.start)
    guides, store = Guides(DIM), TokenStore()
    tokens = torch.stack(patches)
    store.add(Tokens([tokens], [tokens.mean(dim=1)], (4, 4)), torch.stack(masks), [bool(mask.any()) for mask in masks])
    settings = GuideSettings(guide_epochs=20, ema_warmup=True)
    train_guides(guides, sae.dictionary.detach(), alive, store, 0, 4, settings, batch_size=IMAGES)
    return {"dictionary": sae.dictionary.detach(), "since": sae.tokens_since_fired, "vectors": guides.vectors}


def process(rank: int, folder: Path) -> None:
    """One of two processes, with every second image."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=2)
    torch.save(learn(range(rank, IMAGES, 2)), folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Same dictionary, same bookkeeping of dead atoms, same guides, in both processes and in one with all images."""
    multiprocessing.spawn(process, (tmp_path,), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    alone = learn(range(IMAGES))
    assert (alone["since"] > 200).any(), "AuxK must have been at work"
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-3, msg=name)


# Lightning starts the script again for the second process, in which nothing is seeded.
RUN = """
import json, sys, torch
from pathlib import Path
from anomalib.data import Folder
from tests.helpers import data, engine
from tests.spg.test_lightning_model import build
from tests.lake.test_lightning_model import build as build_lake

def main(devices, images, folder):
    datamodule = Folder("parts", "train/good", images / "brick", "test/hole", "test/good", num_workers=0,
                        eval_batch_size=3, val_split_mode="from_test", val_split_ratio=0.45, seed=0)
    model = build(backbone=None, layers=None, image_size=None, guides_file=folder / "guides.safetensors")
    model.model.backbone.load_state_dict(torch.load(folder / "backbone.pt"))
    torch.seed()
    run = engine(folder / str(devices), strategy="ddp", devices=devices)
    metrics = run.train(model=model, datamodule=datamodule)[0]
    run.predict(model=model, data_path=images / "brick/test", return_predictions=False)
    table = Path(run.trainer.default_root_dir) / "predictions.csv"
    if devices == 1:  # Lightning's DDP with one process, too
        engine(folder / "lake", strategy="ddp", devices=2).fit(model=build_lake(), datamodule=datamodule)
    elif not run.trainer.is_global_zero:
        return
    post_processor = model.post_processor
    Path(folder / f"{devices}.json").write_text(json.dumps({
        "images": {kind: len(scores) for kind, scores in post_processor._scores.items()},
        "pixels": [int(counts.sum()) for counts in post_processor._pixels.values()],
        "splits": [len(datamodule.val_data), len(datamodule.test_data)],
        "thresholds": {name: float(value) for name, value in post_processor.state_dict().items()},
        "metrics": metrics,
        "table": str(table),
    }))

if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
"""


@pytest.mark.slow
@pytest.mark.command
def test_two_processes_decide_as_one_does(tmp_path: Path) -> None:
    """Thresholds, metrics and decisions, though they cannot have equal shares of validation; no image counts twice."""
    images, model = make_mvtec(tmp_path / "images", count=7), build(seed=0)
    next((images / "brick/test/good").iterdir()).unlink()  # 5 to validate with, 8 to test
    run = engine(tmp_path / "fit")
    run.fit(model=model, datamodule=data(images, category="grass"))
    (Path(run.trainer.default_root_dir) / "weights" / "guides.safetensors").rename(tmp_path / "guides.safetensors")
    torch.save(model.model.backbone.state_dict(), tmp_path / "backbone.pt")
    (tmp_path / "run.py").write_text(RUN)
    found: list[dict[str, Any]] = []
    for devices in (1, 2):
        run_command([sys.executable, "run.py", str(devices), images, tmp_path], tmp_path, PYTHONPATH=str(REPOSITORY))
        found.append(json.loads((tmp_path / f"{devices}.json").read_text()))
    one, two = found
    validated, tested = one["splits"]
    assert (validated % 2, tested % 2) == (1, 0)  # Lightning would count an image twice in metrics
    assert one["images"]["good"] + one["images"]["bad"] == validated
    assert one["images"]["held_out"] == 7
    for name in ("images", "pixels", "splits"):
        assert two[name] == one[name], name
    for name in ("thresholds", "metrics"):
        assert two[name] == pytest.approx(one[name], abs=1e-6), name
    tables = [pd.read_csv(run["table"]).sort_values("image", ignore_index=True) for run in found]
    assert len(tables[0]) == 13
    pd.testing.assert_frame_equal(*tables, atol=2e-6)


def test_processes_that_divide_the_images_differently(mvtec: Path, tmp_path: Path) -> None:
    """Without a seed each process may draw its own validation set: refused, with the remedy."""

    def gather(everywhere: list[Any], mine: Any) -> None:
        everywhere[:] = [mine, [mine[0], mine[1][1:], mine[2]]]

    with (
        patch("lightning.pytorch.Trainer.world_size", new_callable=PropertyMock, return_value=2),
        patch("torch.distributed.all_gather_object", gather),
        pytest.raises(ValueError, match=r"2 processes have divided the images differently.*--data\.seed"),
    ):
        engine(tmp_path).fit(model=build(), datamodule=data(mvtec))


def test_the_memory_limit_counts_all_processes(mvtec: Path, tmp_path: Path) -> None:
    """Of a machine: each knows its own share of the images."""
    model = build(tokens_dir=None)
    model.memory_limit = 1.5 * memory_need(model.model.backbone, 8, (64, 64)) / 2**30
    with (
        patch("lightning.pytorch.Trainer.num_devices", new_callable=PropertyMock, return_value=2),
        pytest.raises(MemoryError, match="tokens of 16 images of 64x64 need"),
    ):
        engine(tmp_path).fit(model=model, datamodule=data(mvtec))


def test_all_processes_hold_out_the_same_images(tmp_path: Path) -> None:
    """Those the first one chose, for another one's seed would choose some that the first one learns from."""
    images = make_mvtec(tmp_path / "images", ("brick",), count=12)
    model = build()

    def of_the_first(_: Any, value: Any, *_args: Any) -> Any:
        return [1, 4, 7] if isinstance(value, list) and len(value) == 3 else value

    with (
        patch("lightning.pytorch.strategies.SingleDeviceStrategy.broadcast", of_the_first),
        patch.object(model, "add_good", side_effect=KeyboardInterrupt),
        pytest.raises(SystemExit),
    ):
        engine(tmp_path).fit(model=model, datamodule=data(images))
    assert [Path(path).name for path in model.held_out.samples.image_path] == ["001.png", "004.png", "007.png"]


def test_lake_runs_in_one_process(mvtec: Path, tmp_path: Path) -> None:
    """Several are refused before anything is computed; the engine asks for one by itself."""
    with (
        patch("lightning.pytorch.Trainer.world_size", new_callable=PropertyMock, return_value=2),
        patch("anomalib_lake.lightning_model.draw_normal_images", side_effect=AssertionError("went on")),
        pytest.raises(ValueError, match=r"which one process passes; this run has 2\. Fit it with --trainer\.devices 1"),
    ):
        engine(tmp_path).fit(model=build_lake(), datamodule=data(mvtec))
