# SPDX-License-Identifier: Apache-2.0

"""Text side of LAKE: prompts, and their embeddings by the text tower of an OpenCLIP checkpoint.

The tower exists only while the two embeddings are computed; only these two vectors are kept.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from anomalib.models.image.winclip.prompting import create_prompt_ensemble
from huggingface_hub import hf_hub_download
from open_clip.transformer import QuickGELU, TextTransformer
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_spg.components.backbone import pretrained_config, read_weights

CHECKPOINT = "open_clip_model.safetensors"  # what OpenCLIP calls it in the hub's repositories
BATCH = 64  # prompts at a time
VOCABULARY = 49408  # of CLIP's own tokenizer, the only one supported


def prompts(
    class_name: str,
    normal_prompts: Sequence[str] | None = None,
    anomalous_prompts: Sequence[str] | None = None,
) -> tuple[list[str], list[str]]:
    """Normal and anomalous descriptions: the user's own, else WinCLIP's ensemble with the class name.

    Args:
        class_name (str): What the images show; underscores become spaces.
        normal_prompts (Sequence[str] | None): The user's normal descriptions.
        anomalous_prompts (Sequence[str] | None): The user's anomalous descriptions.

    Returns:
        tuple[list[str], list[str]]: Normal and anomalous prompts.

    Raises:
        ValueError: If only one list is given, a list is empty or holds an empty prompt, or the class name is empty or
            has braces.

    Example:
        >>> normal, anomalous = prompts("metal_nut")
        >>> normal[0], anomalous[0], len(normal), len(anomalous)
        ('a cropped photo of the metal nut.', 'a cropped photo of the damaged metal nut.', 147, 84)
    """
    lists = {"normal_prompts": normal_prompts, "anomalous_prompts": anomalous_prompts}
    given = {name: list(value) for name, value in lists.items() if value is not None}
    for name, value in given.items():
        if not value or not all(prompt.strip() for prompt in value):
            msg = f"{name}={value} is empty or holds an empty prompt. Give descriptions, or leave both lists out."
            raise ValueError(msg)
    if len(given) == 1:
        missing = next(name for name in lists if name not in given)
        msg = f"{next(iter(given))} is given without {missing}. Give both lists, or leave both out."
        raise ValueError(msg)
    if given:
        return given["normal_prompts"], given["anomalous_prompts"]
    if not class_name.strip() or set(class_name) & set("{}"):
        msg = f"class_name='{class_name}' must be a plain name such as 'metal nut': not empty, no braces."
        raise ValueError(msg)
    return create_prompt_ensemble(class_name.replace("_", " "))


def read_checkpoint(backbone: str, weights: str | Path | None) -> tuple[dict[str, Any], str]:
    """Get the OpenCLIP checkpoint that holds both towers of a CLIP model.

    Args:
        backbone (str): timm model name of the vision tower.
        weights (str | Path | None): Local OpenCLIP checkpoint. ``None`` takes it from the model hub.

    Returns:
        tuple[dict[str, Any], str]: State dict under OpenCLIP's names, and where it is from.

    Raises:
        ValueError: If the file has no text tower.
        RuntimeError: If the hub cannot be reached; the message says how to use a local file.
    """
    if weights is None:
        repository = pretrained_config(backbone)["hf_hub_id"]
        repository = f"timm/{backbone}" if repository == "timm/" else repository
        try:
            source = hf_hub_download(repository, CHECKPOINT)
        except Exception as exception:
            msg = (
                f"Could not get {CHECKPOINT} of '{repository}' from the hub ({type(exception).__name__}: {exception}). "
                "Without internet, copy that file here and pass weights=<path> (--model.weights on the command line); "
                "it serves both towers. Or do without text: text_weight=0."
            )
            raise RuntimeError(msg) from exception
    else:
        source = str(weights)
    state = read_weights(source)
    state = state.get("state_dict", state)
    state = {key.removeprefix("module."): value for key, value in state.items()}
    # OpenCLIP's "custom text" models put a prefix before the same names.
    state = {key.removeprefix("text."): value for key, value in state.items()}
    if "token_embedding.weight" not in state or "text_projection" not in state:
        msg = (
            f"Weights file '{source}' holds no CLIP text tower. Give the OpenCLIP checkpoint of '{backbone}' "
            f"({CHECKPOINT}), which serves both towers, or do without text: text_weight=0."
        )
        raise ValueError(msg)
    return state, source


def text_tower(state: dict[str, Any], quick_gelu: bool) -> TextTransformer:
    """Build the text tower of a checkpoint from the shapes in it.

    Args:
        state (dict[str, Any]): State dict under OpenCLIP's names.
        quick_gelu (bool): Whether the model was trained with QuickGELU, as OpenAI's were.

    Returns:
        TextTransformer: OpenCLIP's text tower with those weights.

    Raises:
        ValueError: If the weights are not those of CLIP's own text tower.
    """
    vocabulary, width = state["token_embedding.weight"].shape
    if vocabulary != VOCABULARY:
        msg = f"The text tower has {vocabulary} words, CLIP's tokenizer {VOCABULARY}. Use text_weight=0 for this model."
        raise ValueError(msg)
    tower = TextTransformer(
        context_length=state["positional_embedding"].shape[0],
        vocab_size=vocabulary,
        width=width,
        heads=width // 64,  # as in every CLIP
        layers=len({key.split(".")[2] for key in state if key.startswith("transformer.resblocks.")}),
        output_dim=state["text_projection"].shape[1],
        act_layer=QuickGELU if quick_gelu else nn.GELU,
    )
    try:
        tower.load_state_dict({key: state[key].float() for key in tower.state_dict()})
    except (KeyError, RuntimeError) as exception:
        msg = f"The text tower of the checkpoint is not CLIP's: {exception}. Use text_weight=0 for this model."
        raise ValueError(msg) from exception
    return tower.eval()


@torch.no_grad()
def embed_prompts(tower: TextTransformer, *ensembles: Sequence[str]) -> torch.Tensor:
    """Embed prompt ensembles: the mean of the prompts' unit embeddings, brought to unit length.

    Args:
        tower (TextTransformer): Text tower.
        *ensembles (Sequence[str]): Lists of prompts.

    Returns:
        torch.Tensor: One embedding per ensemble, ``(len(ensembles), D)``.
    """
    means = []
    for ensemble in ensembles:
        tokens = open_clip.tokenize(list(ensemble), context_length=tower.context_length)
        embeddings = torch.cat([F.normalize(tower(batch), dim=-1) for batch in tokens.split(BATCH)])
        means.append(F.normalize(embeddings.mean(dim=0), dim=0))
    return torch.stack(means)
