"""What data sets need: against arithmetic by hand, and the table of the docs."""

import json
from pathlib import Path

import pytest
import torch
from karmma.data.config import DataConfig
from karmma.distill.blueprint import teacher_blueprint
from karmma.distill.config import StudentConfig
from karmma.distill.needs import DATA_SETS, DataSet, need, side_by_side
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.fuse.config import TeacherConfig
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

DOCS = Path(__file__).parents[2] / "docs/planning.md"
DATA = DataConfig(frames=4, size=32, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32)
MICRO = BackboneConfig(name="ast_micro", weights="none")
SMALL = DataSet("small", 100, 20, ("audio",), {"verb": 3, "noun": 5})


def needed(views=1, tflops=1.0, epochs=2, data_set=SMALL):
    extract = ExtractConfig(audio=MICRO, theta=7, views=views)
    teacher = TeacherConfig(embed_dim=16, ffn_dim=16, epochs=epochs)
    student = StudentConfig(audio=MICRO, theta=7, embed_dim=16, ffn_dim=16, epochs=epochs, variant="delta")
    return need(data_set, DATA, extract, teacher, student, tflops)


def needed_gflops():
    """Operations of one clip in the head and in the backbone, counted of the modules themselves."""
    data = DATA.model_copy(update={"modalities": ("audio",)})
    extract, teacher = ExtractConfig(audio=MICRO, theta=7), TeacherConfig(embed_dim=16, ffn_dim=16)
    with torch.device("meta"):
        model = teacher_blueprint(data, extract, teacher, SMALL.n_classes).build()
        backbone, tokens = model.backbones["audio"], torch.empty(1, 7, 96)
        present = torch.ones(1, 1, dtype=torch.bool, device="cpu")
        found = []
        for module, inputs in (
            (model.fusion, ({"audio": tokens}, present)),
            (backbone, (torch.empty(1, *DATA.input_shape("audio")),)),
        ):
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                module.eval()(*inputs)
            found.append(counter.get_total_flops() / 1e9)
    return found


def test_sizes_are_those_of_arithmetic_by_hand():
    found = needed(views=3)
    assert found.n_clips == 120
    assert found.tokens_gb == pytest.approx(7 * 96 * 2 * (3 * 100 + 20) / 1e9)
    assert found.logits_gb == pytest.approx((3 + 5) * 4 * 3 * (100 + 20) / 1e9)


def test_hours_go_with_clips_views_epochs_and_rate():
    one = needed()
    assert needed(tflops=10).extract_h == pytest.approx(one.extract_h / 10)
    assert needed(views=3).extract_h == pytest.approx(one.extract_h * 320 / 120)
    assert needed(epochs=6).teacher_h == pytest.approx(3 * one.teacher_h)
    assert needed(epochs=6).student_h == pytest.approx(3 * one.student_h)
    assert one.student_h > one.teacher_h > 0
    head, backbone = 1e9 * needed_gflops()[0], 1e9 * needed_gflops()[1]
    assert one.extract_h == pytest.approx(backbone * 120 / 1e12 / 3600)
    assert one.teacher_h == pytest.approx(3 * head * 100 * 2 / 1e12 / 3600)
    # So many clips an hour, of so many bytes: what is read in the hours that a teacher's training takes.
    read_gb = 2 * 100 * 7 * 96 * 2 / 1e9
    assert one.read_gb_s * one.teacher_h * 3600 == pytest.approx(read_gb)


@pytest.mark.slow
def test_table_of_the_docs_is_what_the_command_finds_today():
    stages = (DataConfig(), ExtractConfig(), TeacherConfig(), StudentConfig())
    rows = side_by_side([need(each, *stages, 50.0) for each in DATA_SETS])
    rows.insert(1, ["---"] * len(rows[0]))
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    assert f"<!-- begin plan -->\n{table}<!-- end plan -->" in DOCS.read_text()


def test_command_counts_the_table_too(give, sample, monkeypatch):
    small = ("--set", "teacher.embed_dim=16", "--set", "student.embed_dim=16")
    monkeypatch.setattr("karmma.distill.needs.DATA_SETS", (SMALL,))
    code, said, _ = give("doctor", "--plan", "--json", "--config", sample / "karmma.toml", *small)
    assert code == 0
    own, other = json.loads(said)["needs"]
    assert own["name"] == str(sample / "clips.csv")
    assert other["n_clips"] == 120
    code, said, _ = give("doctor", "--plan", "--config", sample / "karmma.toml", *small)
    assert code == 0
    assert "tokens in the cache (GB)" in said
