# SPDX-License-Identifier: Apache-2.0

"""Tokens in memory and on disk."""

import platform
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import save_file

from anomalib_spg.components.backbone import Backbone, Tokens
from anomalib_spg.token_store import TokenStore, check_space, memory_need
from tests.helpers import TINY, run_command


def batch(images: int = 2, layers: int = 2) -> tuple[Tokens, torch.Tensor, list[bool]]:
    """Random tokens of a batch."""
    tokens = Tokens(
        [torch.randn(images, 6, 4) for _ in range(layers)], [torch.randn(images, 4) for _ in range(layers)], (2, 3)
    )
    return tokens, torch.rand(images, 8, 12) > 0.5, [True] + [False] * (images - 1)


def same(first: TokenStore, second: TokenStore) -> bool:
    """Whether two stores hold the same."""
    kinds = ((*first.patches, *first.pooled, first.masks), (*second.patches, *second.pooled, second.masks))
    pairs = zip(chain(*kinds[0]), chain(*kinds[1]), strict=True)
    return all(torch.equal(one, other) for one, other in pairs) and first.labels == second.labels


def test_disk_holds_what_memory_holds(tmp_path: Path) -> None:
    """The same tensors come back, in half precision, and clearing leaves no file."""
    memory, disk = TokenStore(), TokenStore(tmp_path / "tokens", {"layers": [1]})
    for _ in range(3):
        stored = batch()
        memory.add(*stored)
        disk.add(*stored)
    assert len(disk) == 6
    assert disk.grid == memory.grid == (2, 3)
    assert disk.patches[1][5].dtype == torch.float16
    torch.testing.assert_close(disk.patches[1][5], stored[0].patches[1][1].half())
    assert same(memory, disk)
    assert len(list(disk.path.glob("*.safetensors"))) == 3
    disk.clear()
    assert len(disk) == 0
    assert not (tmp_path / "tokens").exists()


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    """What was stored is there again, by name; a file that was being written is not; other tokens are left alone."""
    first = TokenStore(tmp_path, {"backbone": "a"})
    first.add(*batch(), names=["x.png#0", "y.png#0"])
    (first.path / "000001.tmp").write_bytes(b"half a file")
    other = TokenStore(tmp_path, {"backbone": "b"})
    assert len(other) == 0
    again = TokenStore(tmp_path, {"backbone": "a"})
    assert same(first, again)
    assert "x.png#0" in again
    assert "z.png#0" not in again
    assert not list(again.path.glob("*.tmp"))
    again.add(*batch(), names=["z.png#0", "w.png#0"])
    assert len(TokenStore(tmp_path, {"backbone": "a"})) == 4
    again.clear()
    assert other.path.exists()


def test_damaged_file_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its images are not restored, so they pass the backbone again."""
    store = TokenStore(tmp_path)
    store.add(*batch(), names=["a", "b"])
    store.add(*batch(), names=["c", "d"])
    (store.path / "000000.safetensors").write_bytes(b"damaged")
    again = TokenStore(tmp_path)
    assert again.restored == {"c", "d"}
    assert "000000.safetensors" in caplog.text
    again.add(*batch(), names=["a", "b"])
    assert len(TokenStore(tmp_path)) == 4


RUN = """
import sys, torch
from anomalib_spg.components.backbone import Tokens
from anomalib_spg.token_store import TokenStore
store = TokenStore(sys.argv[1], {"backbone": "a"})
tokens = Tokens([torch.full((1, 6, 4), 7.0)], [torch.zeros(1, 4)], (2, 3))
store.add(tokens, torch.zeros(1, 8, 12), [False], names=["theirs"])
print(store.path.name, flush=True)
input()
store.add(tokens, torch.zeros(1, 8, 12), [True], names=["later"])
assert len(store) == 2 and all((patches == 7).all() for patches in store.patches[0])
assert sorted(path.name for path in store.path.iterdir()) == ["000000.safetensors", "000001.safetensors"]
if input() == "clear":
    store.clear()
"""


@pytest.mark.command
@pytest.mark.parametrize("ending", ["clear", "leave"])
def test_two_runs_at_once_share_no_file(ending: str, tmp_path: Path) -> None:
    """Of the same tokens in one folder, in two processes: each has a subfolder, which the other's end leaves alone."""
    folder = tmp_path / "tokens"
    command = [sys.executable, "-c", RUN, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        theirs = other.stdout.readline().strip()
        mine = TokenStore(folder, {"backbone": "a"})
        assert theirs
        assert mine.path.name != theirs
        assert not mine.restored
        mine.add(*batch(), names=["mine", "too"])
        mine.clear()
        assert (folder / theirs).exists()
        mine = TokenStore(folder, {"backbone": "a"})
        mine.add(*batch(), names=["mine", "too"])
        other.communicate(f"\n{ending}\n", timeout=60)
    assert other.returncode == 0
    assert mine.path.exists()
    mine.clear()
    if ending == "clear":
        assert not folder.exists()
    else:  # the process ended, and with it its lock
        assert TokenStore(folder, {"backbone": "a"}).restored == {"theirs", "later"}


def test_tokens_of_other_runs_are_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """How much, where, and what to do; also when one's own fit in memory. One's own are not."""
    backbone, folder = Backbone(TINY, pre_trained=False), tmp_path / "tokens"
    for identity in ({"k": 1}, {"k": 1}):
        TokenStore.fitting(backbone, 2, (8, 12), 0, folder, identity).add(*batch(), names=["a", "b"])
    assert not caplog.text
    left = next(path.name for path in folder.iterdir() if path.is_dir())
    for limit in (0, 1):
        TokenStore.fitting(backbone, 2, (8, 12), limit, folder, {"k": 2}).clear()
        assert f"0.00 GiB of tokens of other runs lie in '{folder}' ({left})" in caplog.text
        assert "when the same command is given again" in caplog.text
        caplog.clear()


def test_full_disk(tmp_path: Path) -> None:
    """The message says what to do, what was stored stays, and no half file is left."""
    store = TokenStore(tmp_path)
    store.add(*batch(), names=["a", "b"])

    def full(tensors: dict, path: Path, metadata: dict) -> None:
        save_file(tensors, path, metadata)
        raise OSError(28, "No space left on device")

    with (
        patch("anomalib_spg.components.files.save_file", full),
        pytest.raises(OSError, match=r"No space left.*same command again"),
    ):
        store.add(*batch(), names=["c", "d"])
    assert [path.name for path in store.path.iterdir()] == ["000000.safetensors"]
    assert len(TokenStore(tmp_path)) == 2


def test_space_is_checked_first(tmp_path: Path) -> None:
    """More than the disk has is refused, also for a folder that is not there yet."""
    free = shutil.disk_usage(tmp_path).free
    check_space(tmp_path / "not" / "there", free // 2)
    with pytest.raises(OSError, match=r"GiB free\. Give another disk's folder"):
        check_space(tmp_path / "not" / "there", free * 2)


def test_processes_of_a_machine_count_together(tmp_path: Path) -> None:
    """What fits one does not fit two in memory, nor on a disk that has room for one and a half."""
    backbone = Backbone(TINY, pre_trained=False)
    need = memory_need(backbone, 2, (64, 64))
    sizes = (backbone, 2, (64, 64), 1.5 * need / 2**30)
    assert TokenStore.fitting(*sizes, tmp_path / "tokens").path is None
    assert TokenStore.fitting(*sizes, tmp_path / "tokens", processes=2).path is not None
    with pytest.raises(MemoryError, match="tokens of 4 images of 64x64 need .* for all processes of this machine"):
        TokenStore.fitting(*sizes, processes=2)
    usage = SimpleNamespace(free=int(1.5 * need))
    with patch("anomalib_spg.token_store.shutil.disk_usage", return_value=usage):
        TokenStore.fitting(*sizes[:3], 0, tmp_path / "other")
        with pytest.raises(OSError, match="GiB free"):
            TokenStore.fitting(*sizes[:3], 0, tmp_path / "more", processes=2)


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_goes_back_to_the_system(tmp_path: Path) -> None:
    """Holes between small objects that stay, as hundreds of written batches leave them, are given back by the next."""
    code = """
import sys, torch
from anomalib_spg.components.backbone import Backbone, Tokens
from anomalib_spg.token_store import TokenStore
def memory():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 2**20
store = TokenStore(sys.argv[1])
large, small = 100_000, 1_000
blocks = [(b"x" * large, b"x" * small) for _ in range(5_000)]
stay = [block for _, block in blocks]
del blocks
before = memory()
store.add(Tokens([torch.randn(2, 6, 4)], [torch.randn(2, 4)], (2, 3)), torch.zeros(2, 8, 12), [False, True])
print(before - memory())
store.clear()
"""
    given_back = float(run_command([sys.executable, "-c", code, tmp_path / "tokens"], tmp_path).splitlines()[0])
    assert given_back > 0.3  # GiB, of 0.47
