# SPDX-License-Identifier: Apache-2.0

"""LAKE (Latent Anomaly Knowledge Excavation): training-free, few-shot anomaly detection for anomalib.

Example:
    >>> from anomalib_lake import LAKE
    >>> LAKE.__name__
    'LAKE'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomalib_spg.explanations.visualizer import ExplanationVisualizer

    from .lightning_model import LAKE
    from .neuron_selection import SelectSensitiveNeurons
    from .torch_model import LAKEModel

__all__ = ["LAKE", "ExplanationVisualizer", "LAKEModel", "SelectSensitiveNeurons"]

# Where each public name lives; imported on first use, so that importing the package alone stays cheap.
_MODULES = {
    "LAKE": ".lightning_model",
    "LAKEModel": ".torch_model",
    "SelectSensitiveNeurons": ".neuron_selection",
    "ExplanationVisualizer": "anomalib_spg.explanations.visualizer",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name in _MODULES:
        return getattr(import_module(_MODULES[name], __name__), name)
    msg = f"module '{__name__}' has no attribute '{name}'"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
