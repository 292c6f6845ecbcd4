"""The sampled cosine of bfloat16 tokens to float32."""

import numpy as np
import torch
from karmma.data.config import DataConfig
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.frozen import FrozenBackbone, build_frozen


def test_tokens_that_are_not_finite_do_not_stop_the_check_of_bfloat16():
    data = DataConfig(audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32)
    backbone = BackboneConfig(name="ast_micro", weights="none")
    config = ExtractConfig(audio=backbone, theta=7, batch_size=3, precision="bfloat16")
    frozen = FrozenBackbone("audio", build_frozen("audio", data, config), config, torch.device("cpu"))
    shape = data.input_shape("audio")
    sound = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    found = frozen.tokens({0: np.full(shape, np.nan, np.float32), 1: sound})
    assert np.isnan(found[0]).any()
    assert np.isfinite(found[1]).all()
    assert frozen.agreement["clips"] == 1
