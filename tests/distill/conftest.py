"""24 clips of the sample data, and a student small enough for tests."""

import pytest
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.sample import write_sample
from karmma.distill.config import StudentConfig

MODALITIES = ("video", "audio", "detections")


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=24)
    return folder


@pytest.fixture
def data(tmp_path):
    return DataConfig(
        cache=tmp_path / "cache", runs=tmp_path / "runs", modalities=MODALITIES, frames=4, size=32, max_boxes=3,
        audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip


@pytest.fixture
def table(sample, data):
    return read_clip_table(sample / "clips.csv", data.heads)


@pytest.fixture
def config():
    return StudentConfig(
        video={"name": "swin3d_micro", "weights": "none"}, audio={"name": "ast_micro", "weights": "none"},
        detections={"name": "stlt_micro", "weights": "none"}, theta=9, embed_dim=16, ffn_dim=16, n_attention_heads=2,
        batch_size=5, epochs=2, warmup_epochs=1, max_lr=1e-3, teacher="none", threads=1, readers=2,
    )  # fmt: skip
