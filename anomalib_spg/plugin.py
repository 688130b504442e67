# SPDX-License-Identifier: Apache-2.0

"""Makes installed plugin models known to anomalib, without a change to anomalib or to the user's commands.

anomalib itself has no discovery of third-party models. torch, however, calls every entry point of the group
``torch.backends`` at the end of ``import torch`` (its autoload, off with ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``).
:func:`autoload` is declared there and does nothing but ask to be called back once ``anomalib.models`` is imported;
:func:`register_models` then loads every entry point of the group ``anomalib.models``, of any distribution.

This module, and the packages' ``__init__``, are imported while torch is still importing, so they must not import it.
"""

import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import ModuleType
from typing import Any

GROUP = "anomalib.models"


def autoload() -> None:
    """Have :func:`register_models` called once ``anomalib.models`` is imported. Never raises."""
    try:
        if "anomalib.models" in sys.modules:
            register_models()
        else:
            sys.meta_path.insert(0, _Finder())
    except Exception as exception:  # noqa: BLE001  # `import torch` must survive whatever goes wrong here
        warnings.warn(f"anomalib plugin models are not registered: {exception!r}", stacklevel=2)


class _Finder:
    """Import hook for ``anomalib.models``: found as ever, and registering after it has run.

    The library wrapt has such hooks too, but importing it costs more than all the rest here.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:  # noqa: ANN401
        del path, target
        if name != "anomalib.models":
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                register_models(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_models(models: ModuleType | None = None) -> None:
    """Load the entry points of the group ``anomalib.models`` and make them known to anomalib.

    Each class becomes an attribute of ``anomalib.models`` (for ``class_path: SPG``), and its module one that
    ``get_model`` may import from (for ``class_path: anomalib_spg.SPG``). An entry point that cannot be loaded costs a
    warning that names it. Calling this again does no harm.

    Args:
        models (ModuleType | None): The module ``anomalib.models``. ``None`` takes it if it has been imported, and does
            nothing if not.
    """
    models = models or sys.modules.get("anomalib.models")
    if models is None:
        return
    if not _is_complete(models):
        # anomalib.models was imported first and is itself importing torch: wait until somebody uses it.
        models.__class__ = _Awaiting
        return
    awaiting = False
    points = entry_points(group=GROUP)
    packages = {point.module.split(".")[0] for point in points}
    for entry_point in points:
        try:
            model = entry_point.load()
        except Exception as exception:  # noqa: BLE001  # somebody else's broken package must not break anomalib
            if _is_importing(packages):
                # A plugin was imported first and is itself importing anomalib: its class, or one that another plugin
                # builds on, is not there yet.
                awaiting = True
                continue
            source = f" of {entry_point.dist.name}" if entry_point.dist else ""
            warnings.warn(
                f"anomalib model '{entry_point.name} = {entry_point.value}'{source} could not be loaded and is left "
                f"out: {exception!r}",
                stacklevel=2,
            )
            continue
        if getattr(models, entry_point.name, model) is not model:
            warnings.warn(
                f"anomalib model '{entry_point.name} = {entry_point.value}' is left out: anomalib.models has a "
                f"{entry_point.name} already.",
                stacklevel=2,
            )
            continue
        setattr(models, entry_point.name, model)
        getattr(models, "ALLOWED_MODULES", set()).add(entry_point.module)
    if awaiting:  # only now: the lines above use the module, and would come back here for ever
        models.__class__ = _Awaiting


def _is_complete(models: ModuleType) -> bool:
    """Whether ``anomalib.models`` has run to its end, where ``get_model`` stands."""
    return "get_model" in ModuleType.__getattribute__(models, "__dict__")  # noqa: PLC2801  # past _Awaiting's own


class _Awaiting(ModuleType):
    """``anomalib.models`` while it, or a plugin, is importing; registers when it is next used after that."""

    def __getattribute__(self, name: str) -> Any:  # noqa: ANN401
        if _is_complete(self):
            self.__class__ = ModuleType
            register_models(self)
        return ModuleType.__getattribute__(self, name)


def _is_importing(packages: set[str]) -> bool:
    """Whether any module of these packages is being imported right now."""
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False)
        for name, module in list(sys.modules.items())
        if name.split(".")[0] in packages
    )
