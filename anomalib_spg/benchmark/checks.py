# SPDX-License-Identifier: Apache-2.0

"""Names in a benchmark's config, checked for all jobs before the first one runs. No model or datamodule is built."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import anomalib.data
import anomalib.models
from anomalib.data import AnomalibDataModule
from anomalib.models import ALLOWED_MODULES, AnomalibModule
from lightning.pytorch import Trainer

from anomalib_spg.datamodule import datamodule_class

_SECTIONS = {"model": ("class_path", "init_args", "image_size", "trainer"), "data": ("class_path", "init_args")}


def check_names(configs: Iterable[dict[str, Any]]) -> None:
    """Refuse classes that anomalib does not have, and arguments that they do not take.

    Args:
        configs (Iterable[dict[str, Any]]): ``model`` and ``data`` of the jobs, without grids.

    Raises:
        ValueError: If there are any; names all of them, with the nearest known names.
    """
    mistakes = list(dict.fromkeys(mistake for config in configs for mistake in _mistakes(config)))
    if mistakes:
        raise ValueError("\n  ".join(mistakes))


def _mistakes(config: dict[str, Any]) -> Iterator[str]:
    for name, known in _SECTIONS.items():
        yield from (_unknown(name, "entry", part, known) for part in config[name] if part not in known)
    model, data = config["model"], config["data"]
    module, _, name = model["class_path"].rpartition(".")
    if module and module not in ALLOWED_MODULES:
        yield f"model: anomalib imports no model from '{module}'. Write class_path: {name}."
    else:
        cls = getattr(import_module(module or "anomalib.models"), name, None)
        yield from _class("model", name, cls, AnomalibModule, model.get("init_args") or {})
    yield from _arguments("model", "trainer", Trainer, model.get("trainer") or {})
    yield from _data("data", data["class_path"].split(".")[-1], data.get("init_args") or {})


def _data(place: str, name: str, arguments: dict[str, Any]) -> Iterator[str]:
    yield from _class(place, name, getattr(anomalib.data, name, None), AnomalibDataModule, arguments)
    for part in ("auxiliary", "target"):  # of AuxiliaryTarget and FewShot
        inner = arguments.get(part)
        if isinstance(inner, str):
            inner = {"class_path": inner, "init_args": arguments.get(f"{part}_args")}
        if isinstance(inner, dict) and isinstance(inner.get("class_path"), str):
            inner_name = inner["class_path"].split(".")[-1]
            mistakes = list(_data(f"{place}: {part}", inner_name, inner.get("init_args") or {}))
            yield from mistakes
            if not mistakes:
                try:
                    datamodule_class(inner_name)
                except ValueError as exception:
                    yield f"{place}: {part}: {exception}"


def _class(place: str, name: str, found: Any, kind: type, arguments: dict[str, Any]) -> Iterator[str]:  # noqa: ANN401
    if isinstance(found, type) and issubclass(found, kind):
        yield from _arguments(place, name, found, arguments)
        return
    among = anomalib.models if kind is AnomalibModule else anomalib.data
    known = [key for key, value in vars(among).items() if isinstance(value, type) and issubclass(value, kind)]
    word = "model" if kind is AnomalibModule else "datamodule"
    yield _unknown(f"{place}: anomalib", word, name, [key for key in known if key != kind.__name__])


def _arguments(place: str, name: str, cls: type, arguments: dict[str, Any]) -> Iterator[str]:
    parameters = signature(cls).parameters
    if not any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values()):
        unknown = [argument for argument in map(str, arguments) if argument not in parameters]
        yield from (_unknown(f"{place}: {name}", "argument", argument, parameters) for argument in unknown)
    needed = [key for key, parameter in parameters.items() if _is_needed(parameter) and key not in arguments]
    if needed:
        yield f"{place}: {name} needs {' and '.join(needed)} among its arguments."


def _is_needed(parameter: Parameter) -> bool:
    return parameter.default is Parameter.empty and parameter.kind not in {
        Parameter.VAR_KEYWORD,
        Parameter.VAR_POSITIONAL,
    }


def _unknown(owner: str, word: str, name: str, known: Iterable[str]) -> str:
    """Say that a name is unknown, and which known ones are near.

    Example:
        >>> _unknown("model: LAKE", "argument", "k_shots", ["k_shot", "seed"])
        "model: LAKE has no argument 'k_shots'. Did you mean k_shot?"
        >>> _unknown("model: LAKE", "argument", "x", ["seed", "k_shot"])
        "model: LAKE has no argument 'x'. Choose one of k_shot, seed."
    """
    spelt = {key.lower(): key for key in known}
    near = [spelt[key] for key in get_close_matches(name.lower(), spelt)]
    msg = f"{owner} has no {word} '{name}'. "
    return msg + (f"Did you mean {' or '.join(near)}?" if near else f"Choose one of {', '.join(sorted(known))}.")
