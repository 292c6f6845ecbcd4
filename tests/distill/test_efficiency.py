"""What models cost: the published figures to the last digit, and the count against counts of other kinds."""

import json
import os
import signal
from dataclasses import replace
from math import floor

import pytest
import torch
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError, MemoryShortError, RunError
from karmma.data.runs import RunFolder
from karmma.distill import measuring
from karmma.distill.blueprint import EPIC, run_blueprint, student_blueprint, teacher_blueprint
from karmma.distill.config import StudentConfig
from karmma.distill.efficiency import count
from karmma.distill.efficiency_report import write_efficiency
from karmma.distill.measuring import measure
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.fuse.config import TeacherConfig
from torch.utils.flop_counter import FlopCounterMode

THETAS = (None, 500, 300, 100)


@pytest.fixture(scope="module")
def paper():
    """Teacher and student as every default says: the paper's."""
    return {
        "teacher": count(teacher_blueprint(DataConfig(), ExtractConfig(), TeacherConfig(), EPIC), THETAS),
        "student": count(student_blueprint(DataConfig(), StudentConfig(), EPIC), THETAS),
    }


def rows(found):
    return {row.subset: row for row in found.rows}


def test_parameters_are_the_published_ones(paper):
    assert f"{paper['teacher'].trained / 1e6:.2f}" == "11.25"
    assert f"{paper['student'].trained / 1e6:.2f}" == "65.15"
    assert f"{rows(paper['student'])['V'].alone / 1e6:.2f}" == "29.64"
    assert paper["teacher"].frozen == 3 * 87_638_984
    assert paper["student"].frozen == 0


@pytest.mark.parametrize(
    ("model", "subset", "published"),
    [
        ("teacher", "V", 567.961388),
        ("teacher", "V+F", 1137.010955),
        ("teacher", "V+F+A", 1707.166449),
        ("student", "V", 176.378806),
        ("student", "V+F", 353.031127),
        ("student", "V+F+A", 358.166719),
        ("student", "V+A", 181.281226),
        ("student", "A", 4.672219),
    ],
)
def test_gflops_of_every_bar_of_figure_5_are_the_published_ones(paper, model, subset, published):
    assert rows(paper[model])[subset].gflops == pytest.approx(published, abs=1e-5, rel=0)


@pytest.mark.parametrize("clip_token", [False, True], ids=["784 tokens", "785 tokens"])
def test_gflops_of_table_4_are_the_published_ones_truncated(clip_token):
    swin = BackboneConfig(name="swin3d_b", weights="none", clip_token=clip_token)
    data = DataConfig(modalities=("video", "audio"))
    found = count(teacher_blueprint(data, ExtractConfig(video=swin, audio=swin), TeacherConfig(), EPIC), THETAS)
    printed = {theta: floor(gflops["V+A"]) for theta, gflops in found.by_theta.items()}
    assert printed == {"none": 1165, "500": 1147, "300": 1137, "100": 1128}
    assert rows(found)["V+A"].gflops == pytest.approx(1137.010955, abs=1e-5, rel=0)


def test_what_stands_in_for_a_missing_modality_is_counted_apart(paper):
    student = rows(paper["student"])
    assert student["V"].gflops_as_run == pytest.approx(178.3, abs=0.05)  # figures.md
    assert student["V+F+A"].gflops_as_run == student["V+F+A"].gflops
    assert all(row.gflops_as_run == row.gflops for row in paper["teacher"].rows)  # it ignores


@pytest.fixture
def blueprint(data, config):
    return student_blueprint(data, config, {"verb": 4, "noun": 6})


@pytest.mark.parametrize("missing", ["ignore", "B.1", "B.2", "B.3", "B.4", "B.5"])
def test_count_equals_one_pass_of_the_whole_model_for_every_subset(blueprint, missing):
    blueprint = replace(blueprint, config=blueprint.config.model_copy(update={"missing": missing}))
    model = blueprint.build().eval()
    for row in count(blueprint).rows:
        present = torch.tensor([[m[0].upper() in row.subset for m in model.modalities]])
        inputs = {
            m: torch.zeros(1, *blueprint.data.input_shape(m))
            for m, has in zip(model.modalities, present[0], strict=True)
            if has
        }
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with FlopCounterMode(display=False) as counter:
                model(inputs, present)
        assert round(row.gflops_as_run * 1e9) == counter.get_total_flops(), row.subset


def test_count_of_a_tiny_fusion_is_the_one_by_hand(blueprint):
    """One modality of k tokens of width D, width E, one layer: every product written out, two operations each."""
    blueprint = replace(blueprint, backbones={"audio": blueprint.backbones["audio"]})
    model = blueprint.build()
    k, wide, e = 9, model.backbones["audio"].width, 16
    n = k + 1  # and CLS
    projected = k * wide * e
    attention = n * e * 3 * e + 2 * n * n * e + n * e * e
    feed_forward = 2 * n * e * e
    heads = 2 * (e * 2 * e + 2 * e * (4 + 6))  # CLS and the average
    with FlopCounterMode(display=False) as backbone, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model.backbones["audio"].eval()(torch.zeros(1, *blueprint.data.input_shape("audio")))
    by_hand = 2 * (projected + attention + feed_forward + heads) + backbone.get_total_flops()
    assert round(count(blueprint).rows[0].gflops * 1e9) == by_hand


def test_parameters_of_a_subset_alone_are_those_of_the_model_built_for_it(blueprint):
    for row in count(blueprint).rows:
        chosen = tuple(m for m in blueprint.backbones if m[0].upper() in row.subset)
        config = blueprint.config.model_copy(update={"modalities": chosen})
        alone = student_blueprint(blueprint.data, config, blueprint.n_classes).build()
        assert row.alone == sum(parameter.numel() for parameter in alone.parameters())


def finished(path, **config):
    run = RunFolder(path)
    path.mkdir(parents=True)
    run.start(config)
    run.finish({})
    return run


def teacher_run(path, data, made_by):
    return finished(
        path, kind="teacher", data=data.model_dump(mode="json"), settings=TeacherConfig().model_dump(mode="json"),
        made_by=made_by, classes={"verb": ["a", "b"]},
    )  # fmt: skip


MICRO = BackboneConfig(name="ast_micro", weights="none")


def test_finished_student_costs_what_its_settings_do(tmp_path, data, config):
    settings = config.model_dump(mode="json", exclude={"device", "threads", "readers"})
    run = finished(
        tmp_path / "student-1", kind="student", data=data.model_dump(mode="json"), settings=settings,
        classes={"verb": ["a", "b"], "noun": ["c"]},
    )  # fmt: skip
    found = count(run_blueprint(run, ExtractConfig()))
    assert found.name == "student-1"
    assert found.rows == count(student_blueprint(data, config, {"verb": 2, "noun": 1})).rows


def test_finished_teacher_costs_what_made_its_tokens_too(tmp_path, data):
    run = teacher_run(tmp_path / "teacher-1", data, {"audio": {"name": "ast_micro", "theta": 9}})
    found = count(run_blueprint(run, ExtractConfig(audio=MICRO)))
    only = data.model_copy(update={"modalities": ("audio",)})
    wanted = teacher_blueprint(only, ExtractConfig(audio=MICRO, theta=9), TeacherConfig(), {"verb": 2})
    assert found.rows == count(wanted).rows
    assert found.theta == 9


@pytest.mark.parametrize(
    ("made_by", "error", "said"),
    [
        ({"audio": {"name": "swin3d_b", "theta": 9}}, ConfigError, "are of swin3d_b, extract.audio names ast_micro"),
        (
            {"audio": {"name": "ast_micro", "theta": 9}, "video": {"name": "swin3d_b", "theta": None}},
            RunError,
            r"tokens of several Theta cannot be counted together \(audio 9, video none\)",
        ),
    ],
)
def test_teacher_whose_cost_cannot_be_known_says_why(tmp_path, data, made_by, error, said):
    run = teacher_run(tmp_path / "teacher-1", data, made_by)
    with pytest.raises(error, match=said):
        run_blueprint(run, ExtractConfig(audio=MICRO))


def test_token_for_the_whole_clip_is_counted_where_the_teacher_had_one(tmp_path, data):
    swin = BackboneConfig(name="swin3d_micro", weights="none")
    made = {"name": "swin3d_micro", "theta": None, "shape": [9, 96]}
    runs = {"with": {**made, "clip_token": True}, "without": made}
    found = {
        name: count(run_blueprint(teacher_run(tmp_path / name, data, {"video": one}), ExtractConfig(video=swin)))
        for name, one in runs.items()
    }
    assert found["with"].rows[0].gflops > found["without"].rows[0].gflops


def test_imported_tokens_are_counted_from_where_they_are_tokens(tmp_path, data):
    made_by = {
        "video": {"name": "imported", "theta": 5, "shape": [7, 12]},
        "audio": {"name": "ast_micro", "theta": 9, "shape": [9, 96]},
    }
    found = count(run_blueprint(teacher_run(tmp_path / "teacher-1", data, made_by), ExtractConfig(audio=MICRO)))
    only = teacher_run(tmp_path / "a", data, {"audio": made_by["audio"]})
    alone = count(run_blueprint(only, ExtractConfig(audio=MICRO)))
    assert found.imported == ("video",)
    costs = rows(found)
    assert costs["A"].gflops == alone.rows[0].gflops
    k, n, e, heads = 7, 8, 768, 2 * (768 * 1536 + 1536 * 2)
    layer = n * e * 3 * e + 2 * n * n * e + n * e * e + 2 * n * e * e
    assert round(costs["V"].gflops * 1e9) == 2 * (k * 12 * e + 2 * layer + heads)  # the fusion head alone


@pytest.mark.parametrize("lacks", ["made_by", "classes", "kind", "settings"])
def test_run_of_another_kind_or_version_is_refused_in_one_line(tmp_path, data, lacks):
    run = teacher_run(tmp_path / "run", data, {"audio": {"name": "ast_micro", "theta": 9}})
    config = {name: value for name, value in run.config.items() if name != lacks}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=rf"not that of a teacher or student of this version: '{lacks}'. Train"):
        run_blueprint(run, ExtractConfig(audio=MICRO))


def test_backbone_that_passes_a_parameter_on_is_counted(data):
    cait = BackboneConfig(name="timm:cait_xxs24_224", weights="none")
    data = data.model_copy(update={"modalities": ("video",), "size": 224})
    assert count(teacher_blueprint(data, ExtractConfig(video=cait), TeacherConfig(), EPIC)).rows[0].gflops > 1


@pytest.mark.slow
def test_measuring_process_that_is_killed_is_an_error_with_a_way_out(monkeypatch, blueprint):
    monkeypatch.setattr(measuring, "_measured", killed)
    with pytest.raises(MemoryShortError, match=r"student, V\+A\+D: .* was killed.*Report with --repeats 0"):
        measure(blueprint, count(blueprint), torch.device("cpu"), 1, lambda n: None)


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_files_hold_the_figures_and_a_plot(tmp_path, blueprint):
    found = count(blueprint, (None, 4))
    measured = replace(found, rows=tuple(replace(row, seconds=0.5, peak_bytes=2**20) for row in found.rows))
    json_file, csv_file, svg_file = write_efficiency([measured, replace(measured, name="other")], tmp_path)
    written = json.loads(json_file.read_text())
    assert written[0]["rows"][0]["gflops"] == found.rows[0].gflops
    assert set(written[1]["by_theta"]) == {"none", "4"}
    lines = csv_file.read_text().splitlines()
    assert lines[0] == "model,subset,alone,gflops,gflops_as_run,seconds,peak_bytes"
    assert len(lines) == 1 + 2 * 7
    assert svg_file.read_text().startswith("<svg")
    before = svg_file.read_bytes()
    write_efficiency([measured, replace(measured, name="other")], tmp_path)
    assert svg_file.read_bytes() == before


@pytest.mark.slow
def test_measured_memory_holds_the_model_and_grows_with_it(data, config):
    only = config.model_copy(update={"modalities": ("video",), "theta": 9})
    small = student_blueprint(data, only, {"verb": 4})
    large = replace(small, backbones={"video": BackboneConfig(name="swin3d_t", weights="none")})
    told = []
    found = [measure(each, count(each), torch.device("cpu"), 1, told.append) for each in (small, large)]
    assert told == [1, 1]
    assert all(model.rows[0].seconds > 0 for model in found)
    assert found[1].rows[0].peak_bytes > 4 * 27_000_000  # its weights in float32
    assert found[1].rows[0].peak_bytes > found[0].rows[0].peak_bytes + 3 * 27_000_000
    assert found[0].device == "cpu"
