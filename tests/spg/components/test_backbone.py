# SPDX-License-Identifier: Apache-2.0

"""The frozen backbone: published models, token layout, weights."""

import pickle
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from anomalib_spg.components.backbone import Backbone
from tests.helpers import TINY

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "patch_size", "dim", "statistics"),
    [
        ("vit_large_patch16_dinov3.lvd1689m", 16, 1024, IMAGENET),
        ("vit_large_patch14_dinov2.lvd142m", 14, 1024, IMAGENET),
        ("vit_large_patch14_clip_quickgelu_336.openai", 14, 768, CLIP),
        ("vit_large_patch16_siglip_384.webli", 16, 1024, HALF),
    ],
)
def test_published_backbones(name: str, patch_size: int, dim: int, statistics: tuple) -> None:
    """Tokens of the last block are what timm's own ``forward_features`` ends with, prefix tokens dropped."""
    backbone = Backbone(name, pre_trained=False, image_size=(4 * patch_size, 6 * patch_size))
    assert (backbone.patch_size, backbone.embed_dim, backbone.mean, backbone.std) == (patch_size, dim, *statistics)
    images = torch.randn(1, 3, 4 * patch_size, 6 * patch_size)
    tokens = backbone(images)
    assert tokens.grid == (4, 6)
    with torch.no_grad():
        expected = backbone.vit.forward_features(images)  # after the final norm
        patches = expected[:, backbone.vit.num_prefix_tokens :]
        if "clip" in name:  # the visual projection
            patches = backbone.vit.head(patches)
            pooled = backbone.vit.head(expected[:, 0])
        elif "siglip" in name:
            pooled = backbone.vit.attn_pool(expected)
        else:
            pooled = expected[:, 0]
    assert (
        expected.shape[1] - patches.shape[1]
        == {"dinov3": 5, "dinov2": 1, "clip": 1, "siglip": 0}[
            next(family for family in ("dinov3", "dinov2", "clip", "siglip") if family in name)
        ]
    )
    torch.testing.assert_close(tokens.patches[0], patches, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.pooled[0], pooled, rtol=1e-4, atol=1e-4)
    assert tokens.patches[0].shape == (1, 24, dim)
    assert "quickgelu" not in name or "QuickGELU" in repr(backbone.vit.blocks[0].mlp.act)


def test_layers_are_those_blocks_and_stop_early() -> None:
    """Block 3's tokens do not depend on the blocks behind it, and -1 is the last one."""
    backbone = Backbone(TINY, layers=[-1, 3], pre_trained=False)
    assert backbone.layers == [3, 11]
    only = Backbone(TINY, layers=[3], pre_trained=False)
    only.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 32, 48)
    ran = []
    only.vit.blocks[4].register_forward_hook(lambda *_: ran.append(4))
    torch.testing.assert_close(only(images).patches[0], backbone(images).patches[0])
    assert not ran


@pytest.mark.parametrize("size", [(64, 96), (70, 96), (65, 90), (33, 47)])
def test_any_size_keeps_alignment(size: tuple[int, int]) -> None:
    """Sizes that are no multiple of the patch get more patches; the ones inside see the same pixels."""
    backbone = Backbone(TINY, pre_trained=False)
    grid = backbone(torch.randn(1, 3, *size)).grid
    assert grid == (-(-size[0] // 16), -(-size[1] // 16))


def test_grey_images_equal_their_rgb_copy() -> None:
    """One channel is taken three times."""
    backbone = Backbone(TINY, pre_trained=False)
    grey = torch.randn(1, 1, 32, 32)
    torch.testing.assert_close(backbone(grey).patches[0], backbone(grey.expand(-1, 3, -1, -1)).patches[0])


def test_frozen() -> None:
    """No gradients, and evaluation mode whatever is asked."""
    backbone = Backbone(TINY, pre_trained=False).train()
    assert not backbone.training
    assert not backbone.vit.training
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone(torch.randn(1, 3, 32, 32)).patches[0].requires_grad


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_local_weights(tmp_path: Path, suffix: str) -> None:
    """A file in timm's naming is loaded when first needed, from either format."""
    source = timm.create_model(TINY, pretrained=False, num_classes=0)
    path = tmp_path / f"vit.{suffix}"
    if suffix == "safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    backbone = Backbone(TINY, weights=path)
    images = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(backbone(images).pooled[0], source.eval().forward_features(images)[:, 0])


def test_local_weights_of_another_grid(quickstart: Path) -> None:
    """DINOv2's 37x37 position grid is resized to that of the image."""
    weights = quickstart / "dinov2_vits14.safetensors"
    backbone = Backbone("vit_small_patch14_dinov2.lvd142m", weights=weights, image_size=(224, 448))
    backbone.load_weights()
    assert load_file(weights)["pos_embed"].shape[1] == 37 * 37 + 1
    assert backbone.vit.pos_embed.shape[1] == 16 * 32 + 1


def test_wrong_weights_name_the_keys(tmp_path: Path) -> None:
    """A file that does not fit says which keys are missing and which are unexpected."""
    state = timm.create_model(TINY, pretrained=False, num_classes=0).state_dict()
    state["foo.weight"] = state.pop("norm.weight")
    save_file(state, tmp_path / "bad.safetensors")
    with pytest.raises(ValueError, match=r"(?s)bad\.safetensors.*Missing.*norm\.weight.*Unexpected.*foo\.weight"):
        Backbone(TINY, weights=tmp_path / "bad.safetensors").load_weights()


def test_unreachable_hub_says_what_to_do() -> None:
    """Without internet the message offers the local file."""
    with pytest.raises(RuntimeError, match="--model.weights"):
        Backbone("vit_tiny_patch16_224.augreg_in21k").load_weights()


def test_restoring_never_fetches() -> None:
    """Weights that come with a state dict make the hub needless; building alone never asks for it."""
    state = Backbone(TINY, pre_trained=False).state_dict()
    with patch("anomalib_spg.components.backbone.timm.create_model", wraps=timm.create_model) as create:
        backbone = Backbone(TINY)
        backbone.load_state_dict(state)
        backbone(torch.randn(1, 3, 32, 32))
        backbone.state_dict()
    assert not any(call.kwargs.get("pretrained") for call in create.call_args_list)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vit_smal_patch14_dinov2"}, "vit_small_patch14_dinov2"),
        ({"name": "resnet18"}, "not a vision transformer"),
        *(
            ({"name": name}, f"'{name}' is not a vision transformer with a token for every patch. Choose one of")
            for name in (
                "vit_small_r26_s32_224",
                "vit_tiny_r_s16_p8_224",
                "beit_base_patch16_224",
                "xcit_nano_12_p16_224",
            )
        ),
        ({"name": "swin_tiny_patch4_window7_224"}, "not a vision transformer"),
        ({"name": TINY, "layers": [3, 12]}, r"blocks 0 to 11.*\[12\]"),
        ({"name": TINY, "weights": "nowhere.safetensors"}, "No weights file at 'nowhere.safetensors'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    """Errors name the value and the remedy."""
    with pytest.raises(ValueError, match=message):
        Backbone(**arguments)


def test_pickling_takes_the_weights_along(tmp_path: Path) -> None:
    """As the export to torch does; hooks and lazily loaded weights survive it."""
    source = timm.create_model(TINY, pretrained=False, num_classes=0)
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    pickled = pickle.dumps(Backbone(TINY, weights=tmp_path / "vit.safetensors"))
    (tmp_path / "vit.safetensors").unlink()
    copy = pickle.loads(pickled)
    torch.testing.assert_close(copy.state_dict()["vit.norm.weight"], source.state_dict()["norm.weight"])
    assert torch.equal(copy.vit.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)


@pytest.mark.parametrize("name", [TINY, "vit_small_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_dinov3.lvd1689m"])
def test_no_random_numbers_where_weights_come(name: str, tmp_path: Path) -> None:
    """Of a file all values are taken, what is not in it is as ever; without one the seed gives them."""
    drawn = Backbone(name, pre_trained=False)
    save_file(drawn.vit.state_dict(), tmp_path / "weights.safetensors")
    before = torch.get_rng_state()
    backbone = Backbone(name, weights=tmp_path / "weights.safetensors")
    assert torch.equal(before, torch.get_rng_state())
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone(images).patches[0], drawn(images).patches[0])
    buffers = dict(drawn.vit.named_buffers())
    assert all(torch.equal(buffers.pop(name), buffer) for name, buffer in backbone.vit.named_buffers())
    assert not buffers
    torch.manual_seed(0)  # as the test began
    assert Backbone(name, pre_trained=False).fingerprint() == drawn.fingerprint()
    assert Backbone(name, pre_trained=False).fingerprint() != drawn.fingerprint()
