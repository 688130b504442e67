# SPDX-License-Identifier: Apache-2.0

"""Who may import whom. The rules are those of the diagram in CONTRIBUTING.md."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import pytest

from tests.helpers import REPOSITORY

SPG, LAKE = "anomalib_spg", "anomalib_lake"
ROOMS = (f"{SPG}.components", f"{SPG}.explanations", f"{SPG}.benchmark")
DRAWING = ("figures", "matplotlib", "explain", "explanations", "lightning", "lightning_model", "pytorch_lightning")


class Import(NamedTuple):
    """A module, what it imports, and whether only a type checker sees that."""

    source: str
    target: str
    typing_only: bool


def module_name(path: str) -> str:
    """``anomalib_spg/sae.py`` is ``anomalib_spg.sae``; a package is named after its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


FILES = {
    module_name(path.relative_to(REPOSITORY).as_posix()): path
    for package in (SPG, LAKE)
    for path in sorted((REPOSITORY / package).rglob("*.py"))
}


def imports_of(module: str) -> Iterator[Import]:
    """All imports of a module, wherever they stand; relative names made absolute."""
    tree = ast.parse(FILES[module].read_text(encoding="utf-8"))
    guarded = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
        for statement in node.body
        for inner in ast.walk(statement)
    }
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *filter(None, [node.module])])
            names = [f"{base}.{name.name}" for name in node.names]
            # `from package import module` imports the module, `from module import name` the module that holds the name.
            targets = [name if name in FILES else base for name in names] if within(base, SPG, LAKE) else names
        else:
            continue
        yield from (Import(module, target, node in guarded) for target in targets)


def within(module: str, *packages: str) -> bool:
    """Whether a module is one of these packages, or lies in one."""
    return any(module == package or module.startswith(f"{package}.") for package in packages)


IMPORTS = [found for module in FILES for found in imports_of(module)]
OURS = [found for found in IMPORTS if within(found.target, SPG, LAKE)]


def needed_by(module: str) -> set[str]:
    """A module and those of ours that run when it is imported: what it imports, their packages, and so on."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting += [found.target for found in OURS if found.source == current and not found.typing_only]
            waiting += filter(None, [current.rpartition(".")[0]])
    return seen


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        (LAKE, (LAKE, *ROOMS[:2])),
        (SPG, (SPG,)),
        (ROOMS[0], ROOMS[:1]),
        (ROOMS[1], ROOMS[:2]),
    ],
)
def test_arrows(source: str, allowed: tuple[str, ...]) -> None:
    """Each part imports from these parts only, even for type checking."""
    assert any(within(found.source, source) for found in OURS)
    assert [found for found in OURS if within(found.source, source) and not within(found.target, *allowed)] == []


def test_names_are_imported_from_their_modules() -> None:
    """What the packages themselves export, on first use, is for their users: it would hide an arrow."""
    assert [found for found in OURS if found.target in {SPG, LAKE}] == []


def test_nothing_imports_the_benchmark() -> None:
    """The models work without it."""
    benchmark = ROOMS[2]
    assert [found for found in OURS if within(found.target, benchmark) and not within(found.source, benchmark)] == []


@pytest.mark.parametrize("package", [SPG, LAKE])
def test_torch_models_are_torch(package: str) -> None:
    """A torch model, and whatever of ours it imports, neither explains nor draws nor trains with Lightning."""
    needed = needed_by(f"{package}.torch_model")
    assert len(needed) > 1
    assert [
        found
        for found in IMPORTS
        if found.source in needed and not found.typing_only and set(found.target.split(".")) & set(DRAWING)
    ] == []


def test_no_circles() -> None:
    """No module needs itself through others."""
    sorter = TopologicalSorter({module: set() for module in FILES})
    for found in OURS:
        if not found.typing_only:
            sorter.add(found.source, found.target)
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"Circle: {' -> '.join(error.args[1])}")


def test_every_module_has_its_line() -> None:
    """The tree in CONTRIBUTING.md names all modules, and no others."""
    named = re.findall(r"── (\w+\.py) ", (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert sorted(named) == sorted(path.name for path in FILES.values() if path.name != "__init__.py")
