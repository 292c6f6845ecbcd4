import math

import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.distill.losses import kl_divergence


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def test_kl_of_one_clip_matches_hand_and_is_teacher_against_student():
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    by_hand = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl_divergence({"verb": student}, {"verb": teacher}).item() == pytest.approx(by_hand, rel=1e-6)
    turned = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert kl_divergence({"verb": teacher}, {"verb": student}).item() == pytest.approx(turned, rel=1e-6)


def test_kl_is_the_mean_over_clips_and_over_heads():
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    one = kl_divergence({"verb": student}, {"verb": teacher})
    clips = kl_divergence({"verb": torch.cat([student, teacher])}, {"verb": torch.cat([teacher, teacher])})
    torch.testing.assert_close(clips, one / 2)
    heads = kl_divergence({"verb": student, "noun": teacher}, {"noun": teacher, "verb": teacher})
    torch.testing.assert_close(heads, one / 2)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_kl_values_and_gradients_match_slow_loop(temperature):
    student = {"verb": _wave(3, 4).requires_grad_(), "noun": _wave(3, 5, start=7).requires_grad_()}
    teacher = {"verb": 2 * _wave(3, 4, start=2), "noun": 2 * _wave(3, 5, start=4)}
    heads = []
    for head in student:
        clips = []
        for mine, theirs in zip(student[head] / temperature, teacher[head] / temperature, strict=True):
            p, q = theirs.exp() / theirs.exp().sum(), mine.exp() / mine.exp().sum()
            clips.append(sum(p[c] * (p[c].log() - q[c].log()) for c in range(len(p))))
        heads.append(sum(clips) / 3)
    slow, fast = sum(heads) / 2 * temperature**2, kl_divergence(student, teacher, temperature)
    torch.testing.assert_close(fast, slow)
    inputs = list(student.values())
    torch.testing.assert_close(torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_of_equal_logits_is_zero_and_so_is_its_gradient(temperature):
    student = (5 * _wave(3, 6)).requires_grad_()
    loss = kl_divergence({"verb": student}, {"verb": student.detach() + 2.5}, temperature)  # a shift is no difference
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert student.grad.abs().max() < 1e-6


def test_kl_is_never_negative():
    for start in range(20):
        loss = kl_divergence({"verb": _wave(2, 3, start=start)}, {"verb": _wave(2, 3, start=start + 1)})
        assert loss.item() > 0


def test_kl_gives_the_teacher_no_gradient():
    student, teacher = _wave(2, 3).requires_grad_(), _wave(2, 3, start=4).requires_grad_()
    kl_divergence({"verb": student}, {"verb": teacher}).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_kl_of_half_precision_is_computed_in_float32():
    student, teacher = (8 * _wave(2, 300)).bfloat16(), (8 * _wave(2, 300, start=3)).bfloat16()
    exact = kl_divergence({"noun": student.float()}, {"noun": teacher.float()})
    assert kl_divergence({"noun": student}, {"noun": teacher}).equal(exact)


def test_kl_of_very_sure_teacher_stays_finite():
    student, teacher = torch.tensor([[0.0, 1e4]]).requires_grad_(), torch.tensor([[1e4, 0.0]])
    loss = kl_divergence({"verb": student}, {"verb": teacher})
    loss.backward()
    assert loss.item() == pytest.approx(1e4)
    assert student.grad.isfinite().all()


@pytest.mark.parametrize(
    ("teacher", "found"),
    [({}, "none"), ({"noun": torch.zeros(2, 3)}, "none"), ({"verb": torch.zeros(2, 1)}, r"\(2, 1\)")],
)
def test_kl_of_heads_that_do_not_fit_raises(teacher, found):
    with pytest.raises(ValueError, match=rf"teacher logits of 'verb' are {found}, expected \(2, 3\)"):
        kl_divergence({"verb": torch.zeros(2, 3)}, teacher)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_kl_of_temperature_not_above_zero_raises(temperature):
    with pytest.raises(ConfigError, match=f"temperature is {temperature}, expected a number above 0"):
        kl_divergence({"verb": torch.zeros(2, 3)}, {"verb": torch.zeros(2, 3)}, temperature)
