# SPDX-License-Identifier: Apache-2.0

"""``nn.ModuleList``, which a type checker also tells the class of its elements: ``guides: ModuleList[Guides]``."""

from typing import TYPE_CHECKING, Generic, TypeVar, overload

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Element = TypeVar("Element", bound=nn.Module)

    class ModuleList(nn.ModuleList, Generic[Element]):
        """Seen by type checkers only."""

        def __init__(self, modules: Iterable[Element] | None = None) -> None: ...
        def __iter__(self) -> Iterator[Element]: ...  # noqa: D105
        @overload
        def __getitem__(self, idx: slice) -> nn.ModuleList: ...
        @overload
        def __getitem__(self, idx: int) -> Element: ...
        def __getitem__(self, idx: int | slice) -> nn.Module: ...  # noqa: D105

else:
    ModuleList = nn.ModuleList
