"""Identities: by content, and different in a field that has a name."""

import pytest
import torch
from karmma.data.config import DataConfig, digest
from karmma.data.identity import differences, input_identity, tensors_digest, token_identity
from karmma.data.modality import LETTERS

BACKBONE = {"name": "swin3d_b", "weights": "0123456789abcdef"}


def test_tensors_digest_depends_on_names_dtypes_shapes_and_bytes_and_not_on_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor(3)
    first = tensors_digest({"a": a, "b": b})
    assert len(first) == 16
    assert tensors_digest({"b": b, "a": a}) == first
    others = [
        {"a": a, "c": b},
        {"a": a.view(torch.int32), "b": b},
        {"a": a.view(2, 1), "b": b},
        {"a": torch.nextafter(a, a + 1), "b": b},
        {"a": a.bfloat16(), "b": b},
    ]
    assert len({first, *map(tensors_digest, others)}) == 6


def test_everything_that_changes_the_tokens_changes_the_identity():
    data = DataConfig()
    base = ("flow", data, BACKBONE, 300, "float32")
    changed = [
        ("video", data, BACKBONE, 300, "float32"),
        ("flow", data.model_copy(update={"flow_clamp_px": 10.0}), BACKBONE, 300, "float32"),
        ("flow", data.model_copy(update={"frames": 16}), BACKBONE, 300, "float32"),
        ("flow", data.model_copy(update={"view_seed": 1}), BACKBONE, 300, "float32"),
        ("flow", data, {**BACKBONE, "weights": "f" * 16}, 300, "float32"),
        ("flow", data, BACKBONE, None, "float32"),
        ("flow", data, BACKBONE, 300, "bfloat16"),
    ]
    digests = {digest(token_identity(*each)) for each in [base, *changed]}
    assert len(digests) == 1 + len(changed)


def test_what_does_not_change_the_tokens_is_no_part_of_the_identity():
    data = DataConfig()
    other = data.model_copy(update={"table": "b.csv", "heads": ("noun",), "audio_hop": 1, "cache": "elsewhere"})
    assert input_identity("video", data) == input_identity("video", other)


def test_differences_name_the_fields_and_both_values():
    found = {"theta": 300, "input": {"frames": 32, "size": 224}}
    wanted = {"theta": 100, "input": {"frames": 32, "size": 112}}
    assert differences(found, wanted) == ["input.size is 224, asked for 112", "theta is 300, asked for 100"]
    assert differences(found, found) == []


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"crop_box": (0, 0, 9, 9)}, "VFD"),
        ({"color_jitter": 0.5}, "V"),
        ({"audio_mask": 0.3}, "A"),
        ({"flip": True}, "VFD"),
        ({"view_seed": 3}, "VFAD"),
        ({"frames": 16}, "VFAD"),
        ({"flow_method": "farneback"}, "F"),
        ({"flow_method": "released"}, "F"),
        ({"flow_step_s": 0.1}, "F"),
        ({"max_boxes": 3}, "D"),
        ({"video_files": "a", "audio_files": "b", "detections_files": "c", "media": "/m", "table": "t.csv"}, ""),
        ({"video_fps": 5, "flow_fps": 5, "audio_hz": 5, "prune": False, "holdout": "clips"}, ""),
    ],
)
def test_identity_changes_with_what_a_model_sees_and_with_nothing_else(change, changed):
    plain, other = DataConfig(), DataConfig(**change)
    found = [letter for m, letter in LETTERS.items() if input_identity(m, plain) != input_identity(m, other)]
    assert "".join(found) == changed


def test_released_flow_does_not_depend_on_how_flow_would_be_computed():
    one, two = (DataConfig(flow_method="released", flow_step_s=step) for step in (0.05, 0.1))
    assert input_identity("flow", one) == input_identity("flow", two)
