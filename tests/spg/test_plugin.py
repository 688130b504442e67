# SPDX-License-Identifier: Apache-2.0

"""Registration with an unmodified anomalib, each case in a new process."""

import os
import sys
from pathlib import Path

import pytest

from tests.helpers import FIND, fake_distribution, run_command

pytestmark = pytest.mark.command


def python(code: str, folder: Path, *paths: Path) -> str:
    """Run code in a new interpreter, with folders put before the installed packages."""
    inherited = [path for path in [os.environ.get("PYTHONPATH")] if path]
    environment = {"PYTHONPATH": os.pathsep.join([*map(str, paths), *inherited])} if paths else {}
    return run_command([sys.executable, "-c", code], folder, **environment)


@pytest.mark.parametrize(
    "first",
    [
        "",  # anomalib.models imports torch itself
        "import torch",
        "import anomalib.engine",
        "from anomalib_spg import SPG",
        "from anomalib_spg.lightning_model import SPG",
        "from anomalib_spg.torch_model import SPGModel",
        "from anomalib_spg.datamodule import AuxiliaryTarget",
        "from anomalib_lake import LAKE",
        "from anomalib_lake.lightning_model import LAKE",
        "from anomalib_lake.torch_model import LAKEModel",
        "import torch; from anomalib_spg.lightning_model import SPG",
    ],
)
def test_found_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    """By name, as bare and as full class path, in the list."""
    python(f"import warnings; warnings.simplefilter('error', UserWarning)\n{first}\n{FIND}", tmp_path)


def test_importing_torch_alone_imports_nothing_else(tmp_path: Path) -> None:
    """Neither anomalib, timm, Lightning nor our models."""
    code = (
        "import sys, torch; print(sorted({m.split('.')[0] for m in sys.modules} & {'anomalib', 'timm', 'lightning'}))"
    )
    assert python(code, tmp_path).strip().endswith("[]")
    code = "import sys, torch; print([m for m in sys.modules if m.startswith('anomalib_')])"
    assert python(code, tmp_path).strip().endswith("['anomalib_spg', 'anomalib_spg.plugin']")


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('boom')", "boom"),
        ("import nowhere_to_be_found", "nowhere_to_be_found"),
        ("", "has no attribute 'Model'"),
    ],
)
def test_broken_entry_point_costs_a_warning(code: str, reason: str, tmp_path: Path) -> None:
    """It names the entry point and its distribution; torch, anomalib and the other models work."""
    fake_distribution(tmp_path, "broken", "[anomalib.models]\nBroken = broken:Model\n", code)
    output = python(f"import torch\n{FIND}", tmp_path, tmp_path)
    assert "'Broken = broken:Model' of broken could not be loaded" in output
    assert reason in output


def test_other_plugins_are_found_too(tmp_path: Path) -> None:
    """Anyone's model in the group is registered the same way; a name that anomalib has already is not taken over."""
    classes = "class Mine(AnomalibModule): ...\nclass Other(AnomalibModule): ...\n"
    code = f"from anomalib.models import AnomalibModule\n{classes}"
    points = "[anomalib.models]\nMine = mine:Mine\nPadim = mine:Other\n"
    fake_distribution(tmp_path, "mine", points, code)
    check = (
        "import anomalib.models as m; from anomalib.models import list_models\n"
        "assert m.Mine.__module__ == 'mine' and 'mine' in m.ALLOWED_MODULES and 'mine' in list_models()\n"
        "assert m.Padim.__module__.startswith('anomalib.')"
    )
    assert "anomalib.models has a Padim already" in python(check, tmp_path, tmp_path)


@pytest.mark.parametrize(
    "first", ["", "import anomalib.data", "from anomalib_spg import AuxiliaryTarget", "import torch"]
)
def test_datamodules_are_found(first: str, tmp_path: Path) -> None:
    """By bare name and class path once a model is imported, whatever came first; anomalib's own are not taken over."""
    points = "[anomalib.data]\nAuxiliaryTarget = anomalib_spg:AuxiliaryTarget\nVisa = anomalib_spg:AuxiliaryTarget\n"
    fake_distribution(tmp_path, "mine", points, "")
    code = """
from anomalib.models import get_model
from anomalib.data import get_datamodule
for name in ("AuxiliaryTarget", "anomalib_spg.AuxiliaryTarget"):
    arguments = {"auxiliary": "Visa", "target": "MVTecAD", "target_args": {"category": "wood"}}
    assert get_datamodule({"class_path": name, "init_args": arguments}).category == "wood"
"""
    output = python(f"{first}\n{code}{FIND}", tmp_path, tmp_path)
    assert "anomalib.data plugin 'Visa = anomalib_spg:AuxiliaryTarget' of mine is left out" in output


def test_broken_datamodule_costs_a_warning(tmp_path: Path) -> None:
    """It names the entry point; models and other datamodules work."""
    fake_distribution(tmp_path, "broken", "[anomalib.data]\nBroken = broken:Data\n", "raise RuntimeError('boom')")
    output = python(f"import torch\n{FIND}", tmp_path, tmp_path)
    assert "anomalib.data plugin 'Broken = broken:Data' of broken could not be loaded" in output
    assert "boom" in output


def test_metadata_is_read_once(tmp_path: Path) -> None:
    """Reading all distributions' entry points takes longer than all the rest."""
    code = """
import anomalib_spg.plugin as plugin, importlib.metadata as metadata
calls = []
plugin.entry_points = lambda **keywords: calls.append(keywords) or metadata.entry_points(**keywords)
import anomalib.models
assert anomalib.models.SPG and len(calls) == 1, calls
"""
    python(code, tmp_path)


def test_registering_twice_does_no_harm(tmp_path: Path) -> None:
    """No warning, no second subclass."""
    code = """
import warnings; warnings.simplefilter("error", UserWarning)
import torch, anomalib.models
from anomalib_spg.plugin import autoload, register_models
before = list(anomalib.models.AnomalibModule.__subclasses__())
autoload(); register_models(); register_models(anomalib.models)
assert anomalib.models.AnomalibModule.__subclasses__() == before
"""
    python(code + FIND, tmp_path)


@pytest.mark.parametrize("first", ["import torch", ""])  # with "", anomalib.models is the first to import torch
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ImportError"])
def test_an_interrupted_import_is_tried_again(first: str, error: str, tmp_path: Path) -> None:
    """Somebody presses Ctrl+C while anomalib.models is importing, and imports it again."""
    code = f"""
import sys
{first}
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "anomalib.models.image.patchcore":
            sys.meta_path.remove(self)
            raise {error}
sys.meta_path.insert(0, Stop())
try:
    import anomalib.models
except {error}:
    print("interrupted")
assert "anomalib.models" not in sys.modules
"""
    assert "interrupted" in python(code + FIND, tmp_path)


@pytest.mark.parametrize(
    "before",
    [
        "import torch, importlib.util; assert importlib.util.find_spec('anomalib.models')",
        "import torch, importlib, anomalib.models; importlib.reload(anomalib.models)",
        "import importlib, anomalib.models; importlib.reload(importlib.reload(anomalib.models))",
    ],
)
def test_looked_for_or_reloaded(before: str, tmp_path: Path) -> None:
    """The hook is still there for the import that follows, and a reload keeps what was allowed."""
    python(f"{before}\n{FIND}", tmp_path)


@pytest.mark.parametrize("first", ["import torch", "import anomalib.models"])
def test_unreadable_metadata_costs_a_warning(first: str, tmp_path: Path) -> None:
    """Whatever reading the entry points raises, torch and anomalib import."""
    code = f"""
import anomalib_spg.plugin
def fail(): raise ValueError("broken metadata")
anomalib_spg.plugin.entry_points = fail
{first}
import anomalib.models
print(anomalib.models.Padim.__name__)
"""
    output = python(code, tmp_path)
    assert "plugins are not registered: ValueError('broken metadata')" in output
    assert "Padim" in output


def test_spawned_workers(tmp_path: Path) -> None:
    """A process that starts from nothing finds the models."""
    (tmp_path / "job.py").write_text(f"def work():\n{FIND.replace(chr(10), chr(10) + '    ')}\n    print('found')\n")
    code = """
import multiprocessing, job
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=job.work)
    process.start(); process.join()
    assert process.exitcode == 0
"""
    (tmp_path / "main.py").write_text(code)
    assert "found" in run_command([sys.executable, "main.py"], tmp_path)


def test_autoload_switched_off(tmp_path: Path) -> None:
    """With torch's switch the full class path still works."""
    for package, model in (("anomalib_spg", "SPG"), ("anomalib_lake", "LAKE")):
        code = f"import torch; from {package} import {model}; {model}('vit_tiny_patch16_224', pre_trained=False)"
        run_command([sys.executable, "-c", code], tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
