# SPDX-License-Identifier: Apache-2.0

"""A small CLIP model with random weights, as an OpenCLIP checkpoint."""

from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture(scope="session")
def clip() -> open_clip.CLIP:
    """OpenCLIP's own model of that architecture, randomly initialised."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        embed_dim=512,
        vision_cfg={"layers": 10, "width": 256, "patch_size": 16, "image_size": 224, "head_width": 64},
        text_cfg={"context_length": 77, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 3},
    )
    # At initialisation all prompts embed alike; larger weights tell them apart, as in a trained tower.
    torch.nn.init.normal_(model.token_embedding.weight, std=1.0)
    return model.eval()


@pytest.fixture(scope="session")
def clip_file(clip: open_clip.CLIP, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its checkpoint."""
    path = tmp_path_factory.mktemp("clip") / "open_clip_model.safetensors"
    save_file({key: value.contiguous() for key, value in clip.state_dict().items()}, path)
    return path
