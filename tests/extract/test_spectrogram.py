import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.extract.spectrogram import OverlappingPatches, SpectrogramTransformer, spectrogram_images, standardise
from torch.nn import functional as F


def formula(*shape):
    return torch.sin(torch.arange(torch.Size(shape).numel()) * 0.7).view(shape)


def micro(shape=(3, 20, 14), patches=(8, 6)):
    torch.manual_seed(0)
    return SpectrogramTransformer(shape, width=12, depth=2, n_heads=3, patches=patches).eval()


def test_standardise_maps_silence_and_loudness_to_the_numbers_on_paper():
    assert standardise(torch.tensor([-10.0, -4.0, 0.0, 3.0])).tolist() == [-1.5, 0.0, 1.0, 1.75]


def test_spectrogram_images_of_the_right_side_are_only_standardised():
    x = formula(1, 2, 4, 4)
    images = spectrogram_images(x, 4)
    assert images.shape == (1, 3, 2, 4, 4)
    for channel in range(3):
        torch.testing.assert_close(images[:, channel], (x + 4) / 4)


def test_overlapping_patches_equal_a_loop_over_corners():
    patches = OverlappingPatches(6, img_size=(20, 14), patch_size=8, in_chans=3, embed_dim=5)
    x = formula(2, 3, 20, 14)
    corners = [(mel, step) for mel in (0, 6, 12) for step in (0, 6)]
    wanted = [
        F.linear(x[:, :, mel : mel + 8, step : step + 8].flatten(1), patches.proj.weight.flatten(1), patches.proj.bias)
        for mel, step in corners
    ]
    assert patches.num_patches == len(corners)
    torch.testing.assert_close(patches(x), torch.stack(wanted, 1), atol=1e-5, rtol=1e-5)


def test_ast_of_the_papers_spectrogram_has_252_patches_and_one_token_for_the_clip():
    with torch.device("meta"):
        backbone = SpectrogramTransformer((32, 128, 224), width=192, depth=12, n_heads=3, patches=(16, 10))
    assert backbone.vit.patch_embed.num_patches == 12 * 21
    assert backbone.n_tokens == 253


def test_ast_first_token_is_the_mean_of_class_and_distillation_token():
    backbone, x = micro(), formula(2, 3, 20, 14)
    inner = backbone.vit.forward_features((x + 4) / 4)
    found = backbone(x)
    assert inner.shape == (2, 8, 12)
    assert found.shape == (2, 7, 12)
    torch.testing.assert_close(found[:, 0], (inner[:, 0] + inner[:, 1]) / 2)
    assert torch.equal(found[:, 1:], inner[:, 2:])


def test_ast_hears_every_segment():
    backbone, x = micro(), formula(1, 3, 20, 14)
    for segment in range(3):
        other = x.clone()
        other[:, segment] += 1
        assert not torch.allclose(backbone(other), backbone(x), atol=1e-4)


def test_ast_on_a_spectrogram_smaller_than_a_patch_says_so():
    with pytest.raises(ConfigError, match="7 mels x 20 steps is smaller than a patch of this backbone, 8 x 8"):
        micro((3, 7, 20))
