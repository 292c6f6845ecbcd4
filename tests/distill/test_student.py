"""The student: backbones run on present clips only, and the result equals the plain way."""

import numpy as np
import pytest
import torch
from karmma.data.theta import theta_average
from karmma.distill.clip_dropout import seed_clips
from karmma.distill.stream import ClipStream
from karmma.distill.student import build_student
from karmma.distill.subsets import subset_logits
from karmma.extract.backbones import BACKBONES
from karmma.fuse.losses import cross_entropy
from karmma.fuse.seeds import clip_seeds

M = ("video", "audio", "detections")
PRESENT = torch.tensor([[True, False, True], [False, True, False], [True, True, True], [False, False, True]])


@pytest.fixture
def batch(table, data):
    """Four clips with everything, read."""
    with ClipStream(table, data, M) as stream:
        usable = np.flatnonzero(stream.survey(np.arange(12)).all(axis=1))[:4]
        (found,) = stream.batches([(usable, np.ones((4, 3), bool))], 0)
    return found


@pytest.fixture
def student(data, config):
    return build_student(data, config, {"verb": 4, "noun": 6})


def plain(student, inputs, present, seeds):
    """Run every backbone on every clip, then mask: the slow and obvious way."""
    tokens = {}
    for m in M:
        seed_clips(student.backbones[m], seeds)
        tokens[m] = theta_average(student.backbones[m](inputs[m]), student.theta)
    return student.fusion(tokens, present, seeds)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("missing", ["ignore", "B.1", "B.2", "B.3", "B.4", "B.5"])
def test_running_present_clips_only_equals_the_plain_way_with_gradients(data, config, batch, missing, training):
    numbers = {"missing": missing, "attention_dropout": 0.2}
    student = build_student(data, config.model_copy(update=numbers), {"verb": 4, "noun": 6}).train(training)
    dropped = {m: batch.inputs[m][PRESENT[:, column]] for column, m in enumerate(M)}
    seeds = clip_seeds(0, 5, ["a", "b", "c", "d"])
    results = []
    for output in (student(dropped, PRESENT, seeds), plain(student, batch.inputs, PRESENT, seeds)):
        student.zero_grad()
        loss = sum((logits**2).sum() for logits in output.logits.values())
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        results.append((output.logits, gradients))
    (fast, fast_gradients), (slow, slow_gradients) = results
    for head in ("verb", "noun"):
        assert torch.allclose(fast[head], slow[head], atol=1e-5)
    assert fast_gradients.keys() == slow_gradients.keys()
    for name, gradient in fast_gradients.items():
        assert torch.allclose(gradient, slow_gradients[name], atol=1e-5), name


def test_modality_that_every_clip_lacks_runs_nothing_and_gets_no_gradient(student, batch):
    present = torch.tensor([[False, True, True]] * 4)
    output = student({m: batch.inputs[m] for m in ("audio", "detections")}, present)
    sum(logits.sum() for logits in output.logits.values()).backward()
    assert all(p.grad is None for p in student.backbones["video"].parameters())
    assert student.fusion.embedding.token_tokens["video"].grad.abs().sum() > 0
    assert all(p.grad is not None for p in student.backbones["audio"].parameters())


def test_every_parameter_gets_a_gradient(student, batch):
    output = student(batch.inputs, batch.present)
    labels = {"verb": torch.tensor([0, 1, 2, 3]), "noun": torch.tensor([0, 1, 2, 3])}
    cross_entropy(output.logits, labels).backward()
    assert [name for name, p in student.named_parameters() if p.grad is None] == []


def test_single_batch_is_overfitted(student, batch):
    torch.manual_seed(0)
    labels = {"verb": torch.tensor([0, 1, 2, 3]), "noun": torch.tensor([5, 4, 3, 2])}
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    for _ in range(60):
        loss = cross_entropy(student(batch.inputs, batch.present).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logits = student.eval()(batch.inputs, batch.present).logits
    assert all(torch.equal(logits[head].argmax(1), labels[head]) for head in labels)
    assert cross_entropy(logits, labels) < 0.1


def test_student_of_one_modality_has_no_learned_tokens(data, config):
    one = build_student(data, config.model_copy(update={"modalities": ("audio",)}), {"verb": 4})
    assert one.modalities == ("audio",)
    assert not [name for name, _ in one.named_parameters() if "token" in name and "fusion" in name]


def test_subsets_from_one_pass_of_the_backbones_equal_one_pass_each(student, table, data, batch):
    subsets = [("video", "audio", "detections"), ("audio",), ("video", "detections")]
    with ClipStream(table, data, M) as stream:
        found = subset_logits(student, stream, batch.rows, subsets, torch.device("cpu"))
    student.eval()
    for subset in subsets:
        present = torch.tensor([[m in subset for m in M]] * 4)
        with torch.inference_mode():
            expected = student({m: batch.inputs[m] for m in subset}, present).logits
        for head in ("verb", "noun"):
            assert torch.allclose(found.logits[subset][head], expected[head], atol=1e-5)


def test_paper_preset_has_the_published_number_of_parameters():
    """Tab. 2 and figures.md: 65.15 M for V+F+A, 29.64 M for V."""
    from karmma.data.config import DataConfig
    from karmma.distill.config import StudentConfig

    heads = {"verb": 97, "noun": 300}
    random = {"name": "swin3d_t", "weights": "none"}
    config = StudentConfig(video=random, flow=random)
    assert {config.video.name, config.audio.name} <= set(BACKBONES)
    with torch.device("meta"):
        counts = [
            sum(p.numel() for p in build_student(DataConfig(modalities=chosen), config, heads).parameters())
            for chosen in (("video", "flow", "audio"), ("video",))
        ]
    assert [f"{count / 1e6:.2f}" for count in counts] == ["65.15", "29.64"]
