"""torch.compile and bfloat16 autocast: the same numbers as eager float32, or nearly."""

import shutil

import pytest
import torch
from karmma.distill.student import build_student

M = ("video", "audio", "detections")
PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])


@pytest.fixture
def student(data, config):
    torch.manual_seed(0)
    return build_student(data, config, {"verb": 4, "noun": 6}).eval()


def inputs(data, present):
    """Arrays by formula for the clips that are present; boxes with a category, pixels as bytes."""
    found = {}
    for column, modality in enumerate(M):
        shape = (int(present[:, column].sum()), *data.input_shape(modality))
        if shape[0]:
            found[modality] = (torch.arange(torch.Size(shape).numel()) * 0.37).sin().abs().view(shape)
    if "detections" in found:
        found["detections"][..., 5] = 1
    if "video" in found:
        found["video"] = (255 * found["video"]).to(torch.uint8)
    return found


def step(student, data, present, autocast=False):
    """Return logits and gradients of one forward and backward pass."""
    student.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = student(inputs(data, present), present).logits
    sum((scores.float() ** 2).sum() for scores in logits.values()).backward()
    return logits, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_bfloat16_autocast_stays_near_float32_with_its_gradients(student, data):
    exact, exact_gradients = step(student, data, PRESENT)
    rough, rough_gradients = step(student, data, PRESENT, autocast=True)
    for head, scores in exact.items():
        assert (rough[head].float() - scores).abs().max() < 0.05 * scores.abs().max()
    assert rough_gradients.keys() == exact_gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in rough_gradients.values())
    exact, rough = (
        torch.cat([found[name].flatten() for name in exact_gradients]) for found in (exact_gradients, rough_gradients)
    )
    assert torch.cosine_similarity(exact, rough, dim=0) > 0.99


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch looks itself, and hides it
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
def test_compiled_student_equals_the_eager_one_with_its_gradients(student, data):
    subsets = PRESENT, torch.tensor([[False, True, True]] * 2), PRESENT[:1]
    eager = [step(student, data, present) for present in subsets]
    names = set(student.state_dict())
    student.compile()
    for present, (logits, gradients) in zip(subsets, eager, strict=True):
        found, found_gradients = step(student, data, present)
        for head, scores in logits.items():
            torch.testing.assert_close(found[head], scores, atol=1e-5, rtol=1e-4)
        assert found_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-3)
    assert set(student.state_dict()) == names
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 5  # three backbones, block and heads: not eager
