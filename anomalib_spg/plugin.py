# SPDX-License-Identifier: Apache-2.0

"""Registers installed plugin models and datamodules with anomalib, without changing anomalib or its commands.

anomalib itself has no discovery of third-party code. torch, however, calls every entry point of the group
``torch.backends`` at the end of ``import torch`` (its autoload, off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).
:func:`autoload` is declared there. All it does is have :func:`register_models` called once ``anomalib.models`` has been
imported; that function loads every entry point of the groups ``anomalib.models`` and ``anomalib.data``, of any
distribution.

This module, and the packages' ``__init__``, are imported while torch is still importing, so they must not import it.
"""

import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

GROUPS = ("anomalib.models", "anomalib.data")  # each named after the module its entry points become attributes of


def autoload() -> None:
    """Have :func:`register_models` called once ``anomalib.models`` is imported. Never raises."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    _register()


class _Finder:
    """Import hook that lets ``anomalib.models`` be found as usual, and registers the plugins once it has run.

    It stays: an import may be interrupted and tried again, the module may be looked for without being imported, and it
    may be reloaded. The library wrapt offers such hooks, but importing it takes longer than everything else here.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ANN401
        if name != "anomalib.models":
            return None
        others = (finder for finder in list(sys.meta_path) if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this loader only
        return spec


def _register(models: ModuleType | None = None) -> None:
    try:
        register_models(models)
    except Exception as exception:  # noqa: BLE001  # importing torch and anomalib must survive whatever goes wrong here
        warnings.warn(f"anomalib plugins are not registered: {exception!r}", stacklevel=3)


def register_models(models: ModuleType | None = None) -> None:
    """Load the entry points of the groups ``anomalib.models`` and ``anomalib.data`` and register them with anomalib.

    Each class becomes an attribute of the module its group is named after (for ``class_path: SPG``), and a model's
    module is added to those ``get_model`` may import from (for ``class_path: anomalib_spg.SPG``). An entry point that
    cannot be loaded only causes a warning that names it. Calling this more than once is harmless.

    Args:
        models (ModuleType | None): The module ``anomalib.models``. ``None`` takes it if it has been imported, and does
            nothing if not.
    """
    models = models or sys.modules.get("anomalib.models")
    if models is None:
        return
    if not _is_complete(models):
        # anomalib.models was imported first and is itself importing torch: wait until it is used.
        models.__class__ = _Awaiting
        return
    awaiting = False
    found = entry_points()  # one call for both groups: each reads the metadata of everything that is installed
    points = [point for group in GROUPS for point in found.select(group=group)]
    packages = {point.module.split(".")[0] for point in points}
    for entry_point in points:
        source = f" of {entry_point.dist.name}" if entry_point.dist else ""
        plugin = f"{entry_point.group} plugin '{entry_point.name} = {entry_point.value}'{source}"
        try:
            module, value = sys.modules[entry_point.group], entry_point.load()
        except Exception as exception:  # noqa: BLE001  # somebody else's broken package must not break anomalib
            if _is_importing(packages):
                # A plugin was imported first and is itself importing anomalib: its class, or one that another plugin
                # builds on, is not there yet.
                awaiting = True
                continue
            warnings.warn(f"{plugin} could not be loaded and is left out: {exception!r}", stacklevel=2)
            continue
        if getattr(module, entry_point.name, value) is not value:
            message = f"{plugin} is left out: {entry_point.group} has a {entry_point.name} already."
            warnings.warn(message, stacklevel=2)
            continue
        setattr(module, entry_point.name, value)
        allowed: set[str] = getattr(module, "ALLOWED_MODULES", set())
        allowed.add(entry_point.module)
    if awaiting:  # not earlier: the lines above access the module, which would call this function again
        models.__class__ = _Awaiting


def _is_complete(models: ModuleType) -> bool:
    """Whether ``anomalib.models`` is fully imported: ``get_model`` is defined at its end."""
    return "get_model" in ModuleType.__getattribute__(models, "__dict__")  # noqa: PLC2801  # bypasses _Awaiting's


class _Awaiting(ModuleType):
    """``anomalib.models`` while it, or a plugin, is importing; registers when it is next used after that."""

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401
        if _is_complete(self):
            self.__class__ = ModuleType  # type: ignore[assignment]  # back to what it was
            _register(self)
        return ModuleType.__getattribute__(self, name)


def _is_importing(packages: set[str]) -> bool:
    """Whether any module of these packages is being imported right now."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in packages
    )
