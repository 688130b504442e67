# SPDX-License-Identifier: Apache-2.0

"""Blocks of a benchmark's config with grids into configs of single jobs."""

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from anomalib.pipelines.components.utils import get_iterator_from_grid_dict
from anomalib.utils.config import flatten_dict


def expand_all(section: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401  # whatever a file holds
    """Go through all combinations of the section ``benchmark`` of a config.

    Args:
        section (Any): A block, or a list of blocks; ``None`` is none.

    Yields:
        dict[str, Any]: One combination, see :func:`expand`.

    Raises:
        ValueError: If a block or one of its sections is not what it should be.
    """
    for block in section if isinstance(section, list) else [section] if section else []:
        _check_lists(block)
        for config in expand(block):
            yield {**config, **{name: _named_class(name, config.get(name)) for name in ("model", "data")}}


def _named_class(name: str, section: Any) -> dict[str, Any]:  # noqa: ANN401  # whatever a file holds
    """A section with a ``class_path``, without arguments that were left empty."""
    if not isinstance(section, dict) or not isinstance(section.get("class_path"), str):
        msg = f"{name}: {section!r} names no class. Give it a class_path, and its arguments as init_args."
        raise ValueError(msg)  # noqa: TRY004  # what a file says
    empty = [part for part in ("init_args", "trainer") if part in section and section[part] is None]
    for part in ("init_args", "trainer"):
        if not isinstance(section.get(part) or {}, dict):
            msg = f"{name}: {part} is {section[part]!r}. Give arguments by name, or leave it out if there are none."
            raise ValueError(msg)  # noqa: TRY004  # what a file says
    return {part: value for part, value in section.items() if part not in empty}


def expand(block: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401  # whatever a file holds
    """Go through all combinations of a block's grids, nested ones too.

    Args:
        block (Any): ``seed``, ``model`` and ``data``, each with or without grids.

    Yields:
        dict[str, Any]: One combination, without grids.

    Raises:
        ValueError: If it is no such block, or one of the three is missing.

    Example:
        >>> models = [{"class_path": "SPG"}, {"class_path": "LAKE", "init_args": {"k_shot": {"grid": [1, 4]}}}]
        >>> for config in expand({"seed": 0, "model": {"grid": models}, "data": {"class_path": "Visa"}}):
        ...     print(config["model"])
        {'class_path': 'SPG'}
        {'class_path': 'LAKE', 'init_args': {'k_shot': 1}}
        {'class_path': 'LAKE', 'init_args': {'k_shot': 4}}
    """
    if not isinstance(block, dict):
        msg = f"A block of the section benchmark is {block!r}, and must have seed, model and data."
        raise ValueError(msg)  # noqa: TRY004  # what a file says
    missing = [name for name in ("seed", "model", "data") if name not in block]
    if missing:
        msg = f"A block of the section benchmark lacks {' and '.join(missing)}; it has {', '.join(block) or 'nothing'}."
        raise ValueError(msg)
    for config in get_iterator_from_grid_dict(block):
        if any(name == "grid" for key in flatten_dict(config) for name in key.split(".")):
            yield from expand(config)
        else:
            yield config


def _check_lists(section: Any, place: str = "") -> None:  # noqa: ANN401  # whatever a file holds
    """Refuse grids and lists without a value, which would be no job or a job without a value, and misspelt grids."""
    if isinstance(section, list):
        for entry in section:
            _check_lists(entry, place)
    if not isinstance(section, dict):
        return
    for name, value in section.items():
        where = f"{place}.{name}".removeprefix(".")
        if name == "trainer":
            continue
        if name == "grid" and not isinstance(value, list):
            msg = f"{where}: {value!r} is no list. Give the values that are varied, or leave the grid out."
            raise ValueError(msg)
        if value == []:
            msg = f"{where} is an empty list. Give it values, or leave it out."
            raise ValueError(msg)
        if name != "grid" and get_close_matches(str(name).lower(), ["grid"], cutoff=0.7):
            msg = f"{where}: did you mean grid? {name} has no meaning here."
            raise ValueError(msg)
        _check_lists(value, where)
