"""Exported files: the same logits as the student for any subset of modalities, no pickle, and errors in one line."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from karmma.data.errors import CacheError, ConfigError, ExportError, InstallationError, RunError
from karmma.distill import export
from karmma.distill.export import export_student, write_onnx
from karmma.distill.graph import PRESENT, StudentGraph
from karmma.distill.student import build_student

HEADS = {"verb": 4, "noun": 6}


@pytest.fixture
def build(data, config):
    """Build a tiny student of some modalities, ready to be exported."""

    def built(*modalities, **numbers):
        changed = {"flow": config.video, "modalities": modalities, **numbers}
        student = build_student(data, config.model_copy(update=changed), HEADS)
        return student.eval().requires_grad_(False)

    return built


@pytest.fixture
def run(write_student_run, data, config):
    """A finished run of a student of sound and boxes."""
    return write_student_run(data, config.model_copy(update={"modalities": ("audio", "detections")}), HEADS)


@pytest.fixture
def unequal(monkeypatch):
    """Writers whose files answer otherwise than the student; say by how much."""

    def off_by(value):
        def writer(student, names, path):
            path.write_bytes(b"a program")

            def answer(inputs):
                return {head: logits + value for head, logits in StudentGraph(student)(**inputs).items()}

            return answer

        monkeypatch.setitem(export.WRITERS, "torch", writer)

    return off_by


def test_torch_program_answers_as_the_student_and_holds_no_pickle_and_no_path(run):
    report = export_student(run, "torch")
    assert (report.path, report.was_there) == (run.path / "student.pt2", False)
    assert report.agreement.n_clips == 4
    assert report.agreement.difference < 1e-5
    about = json.loads(report.about.read_text())
    assert report.about.name == "student.pt2.json"
    assert about["inputs"]["audio"]["dtype"] == "float32"
    assert about["inputs"]["audio"]["made"] == run.config["inputs"]["audio"]
    assert about["outputs"]["noun"] == {"dtype": "float32", "shape": ["batch", 6]}
    assert about["classes"] == run.config["classes"]
    with zipfile.ZipFile(report.path) as archive:
        for name in archive.namelist():
            value = archive.read(name)
            assert not value.startswith(b"PK"), name  # torch.save
            assert not name.endswith((".pt", ".pkl")) or not value
            if name.endswith("_config.json"):
                assert not any(each["use_pickle"] for each in json.loads(value)["config"].values())
            assert b"graph.py" not in value, name


def test_pickle_that_torch_leaves_no_choice_about_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt2", "w") as archive:
        archive.writestr("a/data/weights/model.pt", b"PK")
    with pytest.raises(ExportError, match=r"would pickle 1 part\(s\) of the file, such as a/data/weights/model.pt"):
        export._refuse_pickles(tmp_path / "a.pt2")


def test_onnx_file_answers_as_the_student_in_onnxruntime(run):
    import onnxruntime

    report = export_student(run, "onnx")
    assert report.path == run.path / "student.onnx"
    assert report.agreement.n_clips == 4
    assert 0 <= report.agreement.difference < 1e-5
    session = onnxruntime.InferenceSession(report.path)
    about = json.loads(report.about.read_text())
    assert {each.name: list(each.shape) for each in session.get_inputs()} == {
        name: each["shape"] for name, each in about["inputs"].items()
    }
    assert {each.name: list(each.shape) for each in session.get_outputs()} == {
        head: each["shape"] for head, each in about["outputs"].items()
    }
    written = report.path.read_bytes()
    assert b"graph.py" not in written
    sound = np.zeros((2, *about["inputs"]["audio"]["shape"][1:]), np.float32)
    boxes = np.full((2, *about["inputs"]["detections"]["shape"][1:]), np.nan, np.float32)
    only_sound = {"audio": sound, "detections": boxes, PRESENT: np.array([[True, False]] * 2)}
    assert all(np.isfinite(logits).all() for logits in session.run(None, only_sound))


@pytest.mark.slow
def test_torch_program_is_read_where_there_is_no_karmma(run, tmp_path):
    report = export_student(run, "torch")
    code = (
        "import json, sys, torch\n"
        "about = json.load(open(sys.argv[1] + '.json'))\n"
        "program = torch.export.load(sys.argv[1]).module()\n"
        "for n in (1, 7):\n"
        "    inputs = {name: torch.zeros(n, *each['shape'][1:], dtype=getattr(torch, each['dtype']))"
        " for name, each in about['inputs'].items()}\n"
        "    print({head: list(logits.shape) for head, logits in program(**inputs).items()})\n"
        "assert 'karmma' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, report.path], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.splitlines() == ["{'verb': [1, 4], 'noun': [1, 6]}", "{'verb': [7, 4], 'noun': [7, 6]}"]


def test_same_export_again_is_left_as_it_is_and_another_is_not(run, unequal):
    unequal(0.0)
    first = export_student(run, "torch")
    before = first.path.stat().st_mtime_ns
    again = export_student(run, "torch")
    assert again.was_there
    assert again.agreement == first.agreement
    assert again.path.stat().st_mtime_ns == before
    run.finish({**run.result, "epoch": 1})
    assert not export_student(run, "torch").was_there
    first.path.write_bytes(b"cut")
    assert not export_student(run, "torch").was_there


@pytest.mark.parametrize(("value", "said"), [(0.01, "is 1.0e-02 from"), (np.nan, "is inf from")])
def test_export_that_answers_otherwise_is_not_written(run, unequal, value, said):
    unequal(value)
    with pytest.raises(ExportError, match=f"student.pt2: not written: a logit of the export {said} the student's"):
        export_student(run, "torch")
    assert not [path.name for path in run.path.iterdir() if "student" in path.name]


def test_file_that_was_there_survives_an_export_that_answers_otherwise(run, unequal, tmp_path):
    (tmp_path / "mine.pt2").write_text("mine")
    unequal(1.0)
    with pytest.raises(ExportError, match="not written"):
        export_student(run, "torch", tmp_path / "mine.pt2")
    assert (tmp_path / "mine.pt2").read_text() == "mine"


def test_runs_that_hold_no_student_are_refused(run):
    described = run.config
    for changed, said in (
        ({"kind": "teacher"}, "a teacher's run, expected a student's"),
        ({"kind": "other"}, "not that of a student of this version: 'kind'"),
        ({"settings": {"no": "such field"}}, "not that of a student of this version: 1 validation error"),
        (
            {"classes": {**described["classes"], "verb": ["a", "b"]}},
            "other labels: its weights are for .*verb 4.* names ",
        ),
        (
            {"settings": {**described["settings"], "embed_dim": 8}},
            "tensors are not those that its config.json describes",
        ),
    ):
        (run.path / "config.json").write_text(json.dumps({**described, **changed}))
        with pytest.raises(RunError, match=said):
            export_student(run, "torch")


def test_missing_and_damaged_checkpoints_are_said(run):
    checkpoint = run.path / "best.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(RunError, match=r"best.safetensors: damaged"):
        export_student(run, "torch")
    checkpoint.unlink()
    with pytest.raises(RunError, match=r"best.safetensors: no such checkpoint"):
        export_student(run, "torch")


def test_places_that_cannot_be_written_are_said(run, tmp_path, unequal):
    unequal(0.0)
    with pytest.raises(ConfigError, match=r"a folder is there. Name a file with --output"):
        export_student(run, "torch", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        export_student(run, "torch", tmp_path / "file" / "student.pt2")


@pytest.mark.parametrize("library", ["onnx", "onnxruntime", "onnxscript"])
def test_onnx_without_its_libraries_says_what_to_install(build, monkeypatch, tmp_path, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InstallationError, match=rf"ONNX needs {library}. Install it: pip install 'karmma\[export\]'"):
        write_onnx(build("audio"), {"audio": "ast_micro"}, tmp_path / "file.onnx")


def test_what_onnx_cannot_hold_is_said(build, data, config, monkeypatch, tmp_path):
    one = config.model_copy(update={"modalities": ("audio",)})
    with pytest.raises(ExportError, match=r"head 'audio' is also the name of an input. Use --format torch"):
        write_onnx(build_student(data, one, {"audio": 4}), {"audio": "ast_micro"}, tmp_path / "file.onnx")
    monkeypatch.setattr(export, "ONNX_BYTES", 1000)
    with pytest.raises(ExportError, match=r"the weights are 0.\d GB, one file holds 2. Use --format torch"):
        write_onnx(build("audio"), {"audio": "ast_micro"}, tmp_path / "file.onnx")


def test_what_onnxruntime_says_no_to_is_one_line(build, monkeypatch, tmp_path):
    monkeypatch.setattr(export, "traced", lambda *_: type("Bad", (), {"save": lambda _, path, **__: path.touch()})())
    with pytest.raises(ExportError, match=r"onnxruntime cannot run the export: .*Use --format torch"):
        write_onnx(build("audio"), {"audio": "ast_micro"}, tmp_path / "file.onnx")
