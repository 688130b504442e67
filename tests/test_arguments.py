# SPDX-License-Identifier: Apache-2.0

"""Arguments that cannot work are refused by the constructors, before any image is read."""

from typing import Any

import pytest

from anomalib_lake import LAKE
from anomalib_spg import SPG
from tests.helpers import TINY, TINY_CLIP

NAN, INF = float("nan"), float("inf")

SHARED: list[tuple[dict[str, Any], str]] = [
    ({"image_size": 0}, "image_size=0 must be a positive"),
    ({"image_size": -64}, "image_size=-64"),
    ({"image_size": "64"}, "image_size='64'"),
    ({"image_size": 64.5}, r"image_size=64\.5"),
    ({"image_size": (64,)}, r"image_size=\(64,\)"),
    ({"image_size": (64, 64, 3)}, r"image_size=\(64, 64, 3\)"),
    ({"image_size": (64, -1)}, r"image_size=\(64, -1\)"),
    ({"image_size": [64, "64"]}, "image_size="),
    ({"image_size": 8}, r"image_size=\(8, 8\) is too small for patches of 16 pixels"),
    ({"sigma": -1}, r"sigma=-1 must lie in \[0, 15\.875\)"),
    ({"sigma": 15.9}, r"sigma=15\.9"),
    ({"sigma": NAN}, "sigma=nan"),
    ({"layers": []}, r"layers=\[\]"),
    ({"layers": [12]}, r"blocks 0 to 11.*\[12\]"),
    ({"layers": [3, -13]}, r"blocks 0 to 11.*\[-13\]"),
    ({"temperature": 0}, "temperature=0 must be a positive"),
    ({"temperature": -1.0}, "temperature=-1"),
    ({"temperature": NAN}, "temperature=nan"),
    ({"temperature": INF}, "temperature=inf"),
    ({"false_alarm_rate": 0}, r"false_alarm_rate=0 must lie in \(0, 0\.5\]"),
    ({"false_alarm_rate": 1}, "false_alarm_rate=1"),
    ({"false_alarm_rate": NAN}, "false_alarm_rate=nan"),
    ({"pixel_false_alarm_rate": 0.6}, r"pixel_false_alarm_rate=0\.6"),
    ({"pixel_false_alarm_rate": NAN}, "pixel_false_alarm_rate=nan"),
    ({"weights": "none.safetensors"}, r"No weights file at 'none\.safetensors'"),
    ({"weights": ""}, "No weights file at ''"),
]
OF_SPG: list[tuple[dict[str, Any], str]] = [
    ({"hold_out": 1.0}, r"hold_out=1\.0 must lie in \[0, 1\)"),
    ({"hold_out": NAN}, "hold_out=nan"),
    ({"views": 0}, "views=0 must be at least 1"),
    ({"learn_on": True}, r"learn_on=True learns on from guides.*guides_file"),
    ({"memory_limit": -1}, "memory_limit=-1 must not be negative"),
    ({"memory_limit": NAN}, "memory_limit=nan"),
    ({"num_atoms": 0}, "num_atoms=0"),
    ({"k": 0}, "k=0"),
    ({"k": 5000}, "k=5000 .* num_atoms=4096"),
    ({"sae_epochs": 0}, "sae_epochs=0"),
    ({"guide_epochs": 0}, "guide_epochs=0"),
    ({"guide_top_k": 0}, "guide_top_k=0"),
    ({"sparsity": -1.0}, r"sparsity=-1\.0"),
    ({"sparsity": NAN}, "sparsity=nan"),
    ({"sparsity": INF}, "sparsity=inf"),
    ({"ema_decay": 1.0}, r"ema_decay=1\.0 must lie in \[0, 1\)"),
    ({"ema_decay": NAN}, "ema_decay=nan"),
    ({"image_score": "mean"}, "image_score='mean'"),
    ({"top_fraction": 0}, r"top_fraction=0 must lie in \(0, 1\]"),
    ({"top_fraction": NAN}, "top_fraction=nan"),
    ({"cls_weight": 1.5}, r"cls_weight=1\.5 must lie in \[0, 1\]"),
    ({"cls_weight": NAN}, "cls_weight=nan"),
    ({"guides_file": ""}, "guides file ''"),
    ({"guides_file": "hf://guides.safetensors"}, "'hf://guides.safetensors' is no address of a file on the hub"),
]
OF_LAKE: list[tuple[dict[str, Any], str]] = [
    ({"k_shot": 0}, "k_shot=0 must be at least 1"),
    ({"k_shot": "most"}, "k_shot=most must be at least 1, 'auto' for up to 32, or null"),
    ({"extend": "none.ckpt"}, r"extend='none\.ckpt' is no file"),
    ({"num_neurons": 0}, "num_neurons=0 must be at least 1"),
    ({"num_neurons": 1}, "num_neurons=1 .* only a sign"),
    ({"num_neurons": 193}, "num_neurons=193 exceeds the 192 channels"),
    ({"selection": "best"}, "selection='best'"),
    ({"normalization": "later"}, "normalization='later'"),
    ({"bank_size": 0}, "bank_size=0 must be at least 1"),
    ({"scales": []}, r"scales=\[\] must be odd"),
    ({"scales": [1, 2]}, r"scales=\[1, 2\] must be odd"),
    ({"scales": [-1]}, r"scales=\[-1\] must be odd"),
    ({"scales": [1, 5]}, r"scales=\[1, 5\] must not exceed the 4x4 patches"),
    ({"semantic_layer": 12}, "semantic_layer=12 must be one of the blocks 0 to 11"),
    ({"text_weight": -0.1}, r"text_weight=-0\.1 must lie in \[0, 1\]"),
    ({"text_weight": NAN}, "text_weight=nan"),
    ({"text_weight": 0.3}, "has no text tower"),
    ({"backbone": TINY_CLIP, "class_name": " "}, "class_name=' ' must be a plain name"),
    ({"backbone": TINY_CLIP, "normal_prompts": [], "anomalous_prompts": ["a"]}, r"normal_prompts=\[\] is empty"),
    ({"backbone": TINY_CLIP, "normal_prompts": ["a"], "anomalous_prompts": [""]}, "anomalous_prompts=.* empty prompt"),
    ({"backbone": TINY_CLIP, "normal_prompts": ["a"]}, "without anomalous_prompts"),
]
CASES = [(model, *case) for model, own in ((SPG, OF_SPG), (LAKE, OF_LAKE)) for case in (*SHARED, *own)]


@pytest.mark.parametrize(("model", "arguments", "message"), CASES)
def test_refused(model: type, arguments: dict[str, Any], message: str) -> None:
    """The message names argument, value and range."""
    with pytest.raises(ValueError, match=message):
        model(**{"backbone": TINY, "pre_trained": False, "image_size": 64, **arguments})


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        (SPG, {"sigma": 15.8}),
        (SPG, {"sigma": 0, "layers": [3, 3, -9]}),  # the same block, once
        (SPG, {"image_size": 9}),
        (LAKE, {"num_neurons": 1, "normalization": "before"}),
        (LAKE, {"num_neurons": 192, "scales": [3, 1, 3]}),
    ],
)
def test_accepted(model: type, arguments: dict[str, Any]) -> None:
    """What lies just inside, and what is given twice."""
    arguments = {"sigma": 1} | arguments
    built = model(**{"backbone": TINY, "pre_trained": False, "image_size": 64, **arguments})
    assert len(set(built.model.backbone.layers)) == len(built.model.backbone.layers)
