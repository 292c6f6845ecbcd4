"""The token for the whole clip: an option of a backbone, recorded in what it makes."""

import pytest
import torch
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.extract.backbones import build_backbone
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.weights import backbone_identity, backbone_request

SHAPES = {"video": (4, 3, 48, 48), "audio": (4, 48, 64), "detections": (4, 3, 6)}
MICRO = [("swin3d_micro", "video", False, 0), ("ast_micro", "audio", True, 0), ("stlt_micro", "detections", True, -1)]


def tokens(name, modality, clip_token):
    backbone = build_backbone(name, modality, SHAPES[modality], clip_token=clip_token).eval()
    shape = (2, *SHAPES[modality])
    x = (torch.arange(torch.Size(shape).numel()) * 0.7).sin().abs().view(shape)
    with torch.no_grad():
        found = backbone(x)
    assert found.shape[1] == backbone.n_tokens
    return found


@pytest.mark.parametrize(("name", "modality", "own", "place"), MICRO)
def test_clip_token_is_one_token_beside_the_others(name, modality, own, place):
    with_it, without = tokens(name, modality, True), tokens(name, modality, False)
    assert with_it.shape[1] == without.shape[1] + 1
    others = with_it[:, 1:] if place == 0 else with_it[:, :-1]
    assert torch.equal(others, without)
    assert torch.equal(tokens(name, modality, None), with_it if own else without)


def test_clip_token_of_swin_is_the_mean_of_the_others():
    found = tokens("swin3d_micro", "video", True)
    torch.testing.assert_close(found[:, 0], found[:, 1:].mean(1))


def test_swin_b_of_the_paper_gives_785_tokens_with_it_and_784_without():
    with torch.device("meta"):
        counts = [build_backbone("swin3d_b", "video", (32, 3, 224, 224), clip_token=t).n_tokens for t in (True, False)]
    assert counts == [785, 784]


@pytest.mark.parametrize(("name", "modality", "own", "place"), MICRO)
def test_clip_token_is_part_of_the_identity_where_it_is_not_the_backbones_own(name, modality, own, place):
    identities = {
        choice: backbone_identity(name, build_backbone(name, modality, SHAPES[modality], clip_token=choice))
        for choice in (None, True, False)
    }
    assert identities[own] == identities[None]
    assert identities[not own] == identities[None] | {"clip_token": not own}


def test_clip_token_is_part_of_what_a_recorded_backbone_was_asked_for():
    data, chosen = DataConfig(), BackboneConfig(name="ast_t", weights="none")
    requests = [
        backbone_request("audio", data, ExtractConfig(audio=chosen.model_copy(update={"clip_token": choice})))
        for choice in (None, True, False)
    ]
    assert len({str(request) for request in requests}) == 3


def test_backbone_that_leaves_no_choice_says_so():
    with pytest.raises(ConfigError, match="FrameTransformer: clip_token cannot be chosen for this backbone"):
        build_backbone("timm:vit_tiny_patch16_224", "video", (2, 3, 32, 32), clip_token=True)
