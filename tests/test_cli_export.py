"""`karmma export`: what it writes and prints, and whatever cannot be exported, in one line."""

import json
from functools import partial

import pytest
from karmma.data.config import DataConfig
from karmma.distill import export
from karmma.distill.config import StudentConfig
from karmma.distill.graph import StudentGraph


@pytest.fixture
def run(write_student_run):
    data = DataConfig(frames=2, max_boxes=2)
    one = {"name": "stlt_micro", "weights": "none"}
    config = StudentConfig(detections=one, modalities=("detections",), embed_dim=8, ffn_dim=8, n_attention_heads=1)
    return write_student_run(data, config, {"verb": 2})


@pytest.fixture
def command(tmp_path, monkeypatch, give, run):
    """Run `karmma export` beside the folder of runs; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    return partial(give, "export")


@pytest.fixture
def off_by(monkeypatch):
    """Stand in for the writer of torch files; say by how much its file answers otherwise."""

    def install(value):
        def write(student, names, path):
            path.write_bytes(b"a program")
            return lambda inputs: {head: x + value for head, x in StudentGraph(student)(**inputs).items()}

        monkeypatch.setitem(export.WRITERS, "torch", write)

    return install


def test_export_writes_a_program_and_prints_the_largest_difference(command, run):
    code, out, err = command("runs/student-made", "--format", "torch")
    assert code == 0
    assert {"student.pt2", "student.pt2.json"} <= {path.name for path in run.path.iterdir()}
    about = json.loads((run.path / "student.pt2.json").read_text())
    assert about["agreement"]["difference"] < 1e-5
    assert out.startswith("runs/student-made/student.pt2: ")
    assert (
        f"2 clips compared with the student, largest difference of a logit {about['agreement']['difference']:.1e}"
        in out
    )
    assert "Nothing to do" not in err
    code, again, err = command("runs/student-made", "--format", "torch")
    assert (code, again) == (0, out)
    assert "Nothing to do: runs/student-made/student.pt2 was exported already." in err


def test_latest_student_is_exported_where_no_run_is_named(command, tmp_path, off_by):
    off_by(0.0)
    code, _, err = command("--output", "deep/er/mine.pt2")
    assert code == 0
    assert "Run: runs/student-made" in err
    assert (tmp_path / "deep" / "er" / "mine.pt2").read_bytes() == b"a program"
    assert (tmp_path / "deep" / "er" / "mine.pt2.json").exists()


def test_export_that_answers_otherwise_ends_with_1_and_leaves_no_file(command, run, off_by):
    off_by(0.002)
    code, out, err = command("runs/student-made")
    assert (code, out) == (1, "")
    assert "ExportError: runs/student-made/student.pt2: not written: a logit of the export is 2.0e-03" in err
    assert not list(run.path.glob("*student*"))


def test_export_to_a_hub_folder(command, tmp_path):
    code, _, err = command("runs/student-made", "--format", "hub", "--output", "shared", "--license", "mit")
    assert code == 0
    assert "Wrote shared: model.safetensors, config.json and README.md" in err
    assert "license: mit" in (tmp_path / "shared" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["torch", "onnx", "hub"])
def test_teacher_is_not_exported(command, run, kind):
    (run.path / "config.json").write_text(json.dumps({**run.config, "kind": "teacher"}))
    code, _, err = command("runs/student-made", "--format", kind)
    assert code == 1
    assert "RunError: runs/student-made: a teacher's run, expected a student's" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("nowhere",), 1, "RunError: nowhere: no run here"),
        (("--runs", "nowhere"), 1, "RunError: nowhere: no finished student here. Run karmma distill"),
        (("--format", "tflite"), 2, "'tflite' is not one of"),
        (("--format", "onnx", "--license", "mit"), 2, "--license goes into a model card"),
        (("--output", "runs"), 1, "ConfigError: runs: a folder is there. Name a file with --output."),
    ],
)
def test_what_cannot_be_exported_is_said(command, args, code, said):
    found, _, err = command(*args)
    assert found == code
    assert said in err


def test_run_that_did_not_finish_is_said(command, run):
    (run.path / "result.json").unlink()
    code, _, err = command("runs/student-made")
    assert code == 1
    assert "this run did not finish" in err
