# SPDX-License-Identifier: Apache-2.0

"""SPG (Sparse-Projected Guides): zero-shot anomaly detection and segmentation for anomalib.

Example:
    >>> from anomalib_spg import SPG
    >>> SPG.__name__
    'SPG'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .components.post_processor import GoodPartsPostProcessor
    from .components.raw_scores import RawScorePostProcessor
    from .components.regions import defects
    from .datamodule import AuxiliaryTarget
    from .explanations.visualizer import ExplanationVisualizer
    from .few_shot import FewShot
    from .lightning_model import SPG
    from .settings import GuideSettings
    from .torch_model import SPGModel

__all__ = [
    "SPG",
    "AuxiliaryTarget",
    "ExplanationVisualizer",
    "FewShot",
    "GoodPartsPostProcessor",
    "GuideSettings",
    "RawScorePostProcessor",
    "SPGModel",
    "defects",
]

# Where each public name lives. They are imported on first use: this package also holds the plugin hook, which is
# imported while torch itself is still importing.
_MODULES = {
    "SPG": "lightning_model",
    "SPGModel": "torch_model",
    "GuideSettings": "settings",
    "GoodPartsPostProcessor": "components.post_processor",
    "RawScorePostProcessor": "components.raw_scores",
    "defects": "components.regions",
    "AuxiliaryTarget": "datamodule",
    "FewShot": "few_shot",
    "ExplanationVisualizer": "explanations.visualizer",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _MODULES:
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)
    msg = f"module '{__name__}' has no attribute '{name}'"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
