"""Weights that a student starts from decide its run by what is in their file."""

import json

import pytest
from karmma.data.errors import ConfigError
from karmma.distill.config import StudentConfig
from karmma.distill.stage import describe_run
from karmma.distill.teacher import find_teacher
from karmma.extract.backbones import build_backbone
from safetensors.torch import save_file


@pytest.fixture
def described(table, data):
    """A function: settings of the student's video backbone -> all that decides its run."""

    def describe(**video):
        config = StudentConfig(teacher="none", modalities=("video",), video={"name": "swin3d_micro", **video})
        return describe_run(table, data, config, find_teacher(None, table, data, config))

    return describe


def test_a_file_counts_by_its_bytes_and_not_by_its_place(data, described, tmp_path):
    tensors = build_backbone("swin3d_micro", "video", data.input_shape("video"), seed=5).state_dict()
    first, second = tmp_path / "start.safetensors", tmp_path / "second.safetensors"
    save_file(tensors, first)
    save_file(tensors, second)
    found = described(weights=str(first))
    assert described(weights=str(second)) == found
    assert str(tmp_path) not in json.dumps(found)
    tensors["norm.bias"] += 1
    save_file(tensors, second)
    assert described(weights=str(second)) != found


def test_backbones_that_are_not_in_use_decide_nothing(described):
    settings = described(weights="none")["settings"]
    assert settings["video"]["weights"] == "none"
    assert not {"flow", "audio", "detections"} & settings.keys()


def test_file_that_is_not_there_is_named(described, tmp_path):
    with pytest.raises(ConfigError, match=r"student\.video\.weights = .*gone\.safetensors': no such file"):
        described(weights=str(tmp_path / "gone.safetensors"))
