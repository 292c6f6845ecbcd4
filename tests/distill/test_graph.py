"""The student's graph: every strategy, subset, batch and backbone; and who is at fault if there is none."""

import pytest
import torch
from karmma.data.errors import ExportError
from karmma.data.modality import MODALITIES, subsets
from karmma.data.noise import noise
from karmma.distill.agreement import Agreement, agreement
from karmma.distill.export import write_onnx, write_torch
from karmma.distill.graph import PRESENT, StudentGraph
from karmma.distill.student import build_student
from karmma.extract.backbone import Backbone

STRATEGIES = ("ignore", "B.1", "B.2", "B.3", "B.4", "B.5")
HEADS = {"verb": 4, "noun": 6}


@pytest.fixture
def build(data, config):
    """Build a tiny student of some modalities, ready to be exported."""

    def built(*modalities, **numbers):
        changed = {"flow": config.video, "modalities": modalities, **numbers}
        student = build_student(data, config.model_copy(update=changed), HEADS)
        return student.eval().requires_grad_(False)

    return built


def clips(student, present, seed=0):
    """Return clips as the student wants them, and as an export does: garbage in place of what is missing."""
    whole = {m: torch.from_numpy(noise(m, b.input_shape, len(present), seed)) for m, b in student.backbones.items()}
    there = {m: x[present[:, at]] for at, (m, x) in enumerate(whole.items())}
    for at, x in enumerate(whole.values()):
        x[~present[:, at]] = torch.nan if x.is_floating_point() else 255
    return there, {**whole, PRESENT: present}


def rows(student):
    return torch.tensor([[m in subset for m in student.modalities] for subset in [*subsets(student.modalities), ()]])


@pytest.mark.parametrize("missing", STRATEGIES)
def test_graph_equals_the_student_for_every_subset_alone_and_in_batches(build, missing):
    student = build(*MODALITIES, missing=missing)
    graph, every = StudentGraph(student), rows(student)
    for present in [every[:1], every[4:5], every[-2:-1], every[-1:], every[3:8], every]:
        there, whole = clips(student, present)
        wanted, found = student(there, present).logits, graph(**whole)
        assert list(found) == list(wanted)
        for head, logits in wanted.items():
            torch.testing.assert_close(found[head], logits, atol=1e-5, rtol=0)


def test_graph_takes_no_notice_of_the_theta_that_keeps_all_tokens(build):
    student = build("audio", "detections", theta=None)
    present = rows(student)
    there, whole = clips(student, present)
    torch.testing.assert_close(StudentGraph(student)(**whole)["verb"], student(there, present).logits["verb"])


# Files of every strategy and of every kind of backbone: the graph, which the fast tests hold against the student, is
# the same in both formats, so each case is written in one of them, and what differs most in both.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("modalities", "missing", "write"),
    [
        (("audio", "detections"), "ignore", write_torch), (("audio", "detections"), "ignore", write_onnx),
        (("audio", "detections"), "B.1", write_onnx), (("audio", "detections"), "B.2", write_torch),
        (("audio", "detections"), "B.3", write_onnx), (("audio", "detections"), "B.4", write_torch),
        (MODALITIES, "B.5", write_onnx),
    ],
)  # fmt: skip
def test_files_answer_as_the_student_under_every_strategy(build, tmp_path, modalities, missing, write):
    student = build(*modalities, missing=missing)
    found = agreement(student, write(student, dict.fromkeys(modalities, ""), tmp_path / "file.pt2"))
    assert found.n_clips == 2 ** len(modalities)
    assert found.difference < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "name", "shape", "write"),
    [
        ("video", "swin3d_t", {"frames": 8, "size": 56}, write_torch),  # windows that jut out, and are shifted
        ("video", "swin3d_t", {"frames": 8, "size": 56}, write_onnx),
        ("audio", "ast_t", {}, write_torch),
        ("audio", "ast_t", {}, write_onnx),
        ("detections", "stlt_9", {}, write_torch),
        ("video", "timm:vit_tiny_patch16_224", {}, write_onnx),
        ("flow", "timm:swin_tiny_patch4_window7_224", {"size": 64}, write_torch),
        ("video", "timm:eva02_tiny_patch14_224", {"size": 28}, write_onnx),
    ],
)
def test_every_kind_of_backbone_can_be_exported(data, config, tmp_path, modality, name, shape, write):
    chosen = {"modalities": (modality,), modality: type(config.video)(name=name, weights="none")}
    student = build_student(data.model_copy(update=shape), config.model_copy(update=chosen), {"verb": 4})
    student.eval().requires_grad_(False)
    found = agreement(student, write(student, {modality: name}, tmp_path / "file.pt2"))
    assert found.difference < 1e-4


def test_difference_is_that_of_the_worst_logit(build):
    student = build("audio", "detections")
    graph = StudentGraph(student)

    def answer(inputs):
        found = graph(**inputs)
        if not inputs[PRESENT].any(1).all():  # the clip that has nothing comes last
            found["noun"][-1, 5] += 0.5
        return found

    found = agreement(student, answer)
    assert found.n_clips == 4
    assert found.difference == pytest.approx(0.5, abs=1e-5)
    assert agreement(student, lambda inputs: {"verb": graph(**inputs)["verb"]}) == Agreement(float("inf"), 4)


class Counting(Backbone):
    """A backbone that asks how many clips there are, as no graph can."""

    def tokens(self, x):
        return x.new_ones(len(x), self.n_tokens, self.width).float()


def test_backbone_without_a_graph_is_named(build, tmp_path):
    student = build("audio", "detections")
    own = student.backbones["detections"]
    student.backbones["detections"] = Counting(own.input_shape, own.n_tokens, own.width)
    said = "no graph of counting, the backbone of detections, to export: Constraints violated"
    with pytest.raises(ExportError, match=said):
        write_torch(student, {"audio": "ast_micro", "detections": "counting"}, tmp_path / "file.pt2")
