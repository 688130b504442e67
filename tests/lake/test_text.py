# SPDX-License-Identifier: Apache-2.0

"""Both towers of a CLIP checkpoint, against OpenCLIP's own, and the prompts."""

from pathlib import Path

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch.nn import functional as F  # noqa: N812

from anomalib_lake import LAKEModel
from anomalib_lake.text import embed_prompts, prompts, read_checkpoint, text_tower
from tests.helpers import TINY_CLIP


@pytest.mark.slow
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("ViT-B-32", "vit_base_patch32_clip_224.laion2b"),
        ("ViT-B-32-quickgelu", "vit_base_patch32_clip_quickgelu_224.openai"),
    ],
)
def test_both_towers_are_open_clips(theirs: str, ours: str) -> None:
    """Patch tokens, projected embedding and text embedding, for GELU and QuickGELU; the other activation differs."""
    reference = open_clip.create_model(theirs, pretrained=None).eval()
    state = reference.state_dict()
    model = LAKEModel(ours, text_weight=0.3)
    model.backbone.load_state(dict(state), "memory")
    images = torch.randn(2, 3, 224, 224)
    reference.visual.output_tokens = True
    texts = ["a photo of a flawless nut", "a damaged nut"]
    with torch.no_grad():
        pooled, patches = reference.visual(images)
        text = reference.encode_text(open_clip.tokenize(texts))
        tokens, _ = model.tokens(images)
        raw = tokens[model.semantic_layer]
        normed = model.backbone.vit.norm(raw)
        embedding = model.backbone.vit.forward_head(model.backbone.vit.forward_features(images))
        own = torch.cat([text_tower(state, "quickgelu" in ours)(open_clip.tokenize(texts))])
        wrong = text_tower(state, "quickgelu" not in ours)(open_clip.tokenize(texts))
    # In OpenCLIP patch tokens come before the projection, after the norm in some releases and before it in others.
    cosines = [F.cosine_similarity(candidate, patches, dim=-1).min() for candidate in (raw, normed)]
    assert max(cosines) > 0.9999
    assert F.cosine_similarity(embedding, pooled, dim=-1).min() > 0.9999
    assert F.cosine_similarity(own, text, dim=-1).min() > 0.9999
    assert F.cosine_similarity(wrong, text, dim=-1).min() < 0.9999
    projected = model.backbone.embed(raw)
    torch.testing.assert_close(projected, normed @ state["visual.proj"], rtol=1e-3, atol=1e-4)


def test_ensembles_are_mean_unit_embeddings(clip: open_clip.CLIP, clip_file: Path) -> None:
    """Prompt by prompt with OpenCLIP, and more prompts than go at a time."""
    ensemble = [f"a photo of part {number}" for number in range(70)]
    state, _ = read_checkpoint(TINY_CLIP, clip_file)
    own = embed_prompts(text_tower(state, quick_gelu=False), ensemble, ["another"])
    with torch.no_grad():
        each = [F.normalize(clip.encode_text(open_clip.tokenize([prompt])), dim=-1) for prompt in ensemble]
    expected = F.normalize(torch.cat(each).mean(dim=0), dim=0)
    torch.testing.assert_close(own[0], expected, rtol=1e-4, atol=1e-5)
    assert own.shape == (2, 512)
    assert not torch.allclose(own[0], own[1], atol=1e-2)


def test_custom_text_checkpoints_are_read(clip: open_clip.CLIP, tmp_path: Path) -> None:
    """OpenCLIP's models with a text module of their own put ``text.`` before the same names; training, ``module.``."""
    state = {
        f"module.{key}" if key.startswith(("visual.", "logit")) else f"module.text.{key}": value.contiguous()
        for key, value in clip.state_dict().items()
    }
    save_file(state, tmp_path / "custom.safetensors")
    read, _ = read_checkpoint(TINY_CLIP, tmp_path / "custom.safetensors")
    assert set(read) == set(clip.state_dict())


def test_file_without_text_tower(tmp_path: Path) -> None:
    """timm's own file of the vision tower cannot serve both."""
    save_file(timm.create_model(TINY_CLIP, pretrained=False).state_dict(), tmp_path / "vision.safetensors")
    with pytest.raises(ValueError, match=r"vision\.safetensors' holds no CLIP text tower.*text_weight=0"):
        read_checkpoint(TINY_CLIP, tmp_path / "vision.safetensors")


def test_unreachable_hub_says_what_to_do() -> None:
    """Which file to copy, how to pass it, and what works without."""
    with pytest.raises(RuntimeError, match=r"open_clip_model\.safetensors.*--model\.weights.*text_weight=0"):
        read_checkpoint("vit_large_patch14_clip_quickgelu_336.openai", None)


def test_other_vocabulary(clip: open_clip.CLIP) -> None:
    """Multilingual towers have tokenizers that are not here."""
    state = dict(clip.state_dict(), **{"token_embedding.weight": torch.zeros(250002, 8)})
    with pytest.raises(ValueError, match="250002 words"):
        text_tower(state, quick_gelu=False)


def test_other_text_tower(clip: open_clip.CLIP) -> None:
    """A tower with other parts."""
    state = {key: value for key, value in clip.state_dict().items() if not key.startswith("ln_final")}
    with pytest.raises(ValueError, match="not CLIP's.*ln_final"):
        text_tower(state, quick_gelu=False)


def test_own_prompts_are_taken() -> None:
    """As they are."""
    assert prompts("nut", ["good"], ["bad", "worse"]) == (["good"], ["bad", "worse"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nut", [], ["bad"]), r"normal_prompts=\[\] is empty"),
        (("nut", ["good"], [" "]), "anomalous_prompts=.*empty prompt"),
        (("nut", ["good"], None), "normal_prompts is given without anomalous_prompts"),
        (("nut", None, ["bad"]), "anomalous_prompts is given without normal_prompts"),
        (("{nut}",), "class_name='{nut}'.*no braces"),
        ((" ",), "not empty"),
    ],
)
def test_bad_prompts(arguments: tuple, message: str) -> None:
    """Named, with the remedy."""
    with pytest.raises(ValueError, match=message):
        prompts(*arguments)
