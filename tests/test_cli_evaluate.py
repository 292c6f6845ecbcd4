"""`karmma evaluate` on evaluations that are there: what is printed, side by side, and what is refused."""

import json
from functools import partial

import pytest
from karmma import cli_evaluate
from karmma.data.clips import read_clip_table
from karmma.data.config import digest
from karmma.data.runs import RunFolder
from karmma.distill.results import FORMAT, Evaluation, RateRow, SubsetRow

ROWS = ["a,a.mp4,train,lift,ball", "b,b.mp4,val,push,cup", "c,c.mp4,test,lift,cup", "d,d.mp4,test,push,ball"]


@pytest.fixture
def evaluate(tmp_path, monkeypatch, give):
    """Run the command in a folder with a small table; return exit code, stdout and stderr."""
    (tmp_path / "t.csv").write_text("\n".join(["clip_id,video,split,verb,noun", *ROWS]) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_evaluate.out, "width", 100)

    return partial(give, "evaluate", "--table", "t.csv")


@pytest.fixture
def finished(tmp_path):
    """Return a function that makes a finished and evaluated run of some label and accuracy."""

    def make(name, label, accuracy, variant=None, failed=(), heads=("verb", "noun")):
        table = read_clip_table(tmp_path / "t.csv", ("verb", "noun"))
        run = RunFolder(tmp_path / "runs" / name)
        classes = {head: list(table.classes(head)) for head in heads}
        run.start({"kind": "student", "classes": classes, "clips": table.content_digest()})
        run.finish({"parameters": 1})
        made_from = digest([FORMAT, run.config, run.result, table.content_digest(), [[], {}], 1])
        rows = []
        for group, subset, gain in (("all", "V+A", 0.0), ("all", "V", -0.1), ("tail", "V+A", 0.1), ("tail", "V", 0.0)):
            found = {"verb": accuracy + gain, "noun": None, "action": accuracy + gain}
            rows.append(SubsetRow(group, subset, 2, 1, found, {**found, "noun": 0.0}, found, found, found))
        spread = {"verb": 0.0, "noun": None, "action": 0.02}
        rates = tuple(RateRow(at / 10, dict(rows[0].accuracy), spread) for at in (0, 9))
        common = {"verb": 0.5, "noun": None, "action": 0.5}
        evaluation = Evaluation(
            name, label, variant or name, "test", 1, 5, "c" * 16, common, tuple(rows), rates, (),
            {"verb": [], "noun": []}, {clip_id: "cannot be read" for clip_id in failed}, made_from,
        )  # fmt: skip
        evaluation.write(run.path / "evaluation" / "test", {})
        (run.path / "evaluation" / "test.tex").write_text("")
        return run.path

    return make


def test_one_run_is_shown_by_subset_group_and_rate(evaluate, finished):
    code, out, err = evaluate(finished("student-1", "KARMMA_S", 0.423))
    assert code == 0
    assert "Nothing to do: this was evaluated already." in err
    for text in ("42.3", "32.3", "52.3", "commonest", "tail", "90%", "42.3 ± 2.0"):
        assert text in out, text
    assert "test.json" in err


def test_latest_student_is_taken(evaluate, finished):
    finished("student-1", "KARMMA_S", 0.4)
    code, _, err = evaluate()
    assert code == 0
    assert "Run: runs/student-1" in err


def test_several_runs_stand_side_by_side_with_seeds_averaged(evaluate, finished, tmp_path):
    runs = [finished(f"student-{at}", "KARMMA_S", value, "same") for at, value in enumerate((0.4, 0.5))]
    code, out, err = evaluate(*runs, finished("student-9", "Baseline", 0.3))
    assert code == 0
    assert "45.0 ± 7.1" in out
    assert "2 runs" in out
    assert "average rank" in out
    table = (tmp_path / "runs" / "comparison-test.csv").read_text()
    assert table.count("KARMMA_S") == 2
    assert "comparison-test.tex" in err


def test_table_that_changed_since_training_is_told(evaluate, finished, tmp_path):
    run = finished("student-1", "KARMMA_S", 0.4)
    described = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**described, "clips": "0" * 16}))
    _, _, err = evaluate(run, "--split", "none")
    assert "is not, or no longer, the table that this run was trained from" in err


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("nowhere",), 1, "nowhere: no run here (no config.json)"),
        (("runs/student-1", "--split", "tset"), 1, "Unknown split 'tset'. Did you mean 'test'?"),
        (("runs/student-1", "--views", "0"), 2, "greater than or equal to 1"),
        (("runs/student-1", "--challenge", "s.zip", "--sls", "2,9,3"), 1, "--sls 2,9,3: expected three levels"),
        (("runs/student-1", "runs/student-2", "--challenge", "s.zip"), 2, "A submission is of one run"),
        (("runs/unfinished",), 1, "this run did not finish"),
    ],
)
def test_what_cannot_be_evaluated_is_said(evaluate, finished, args, code, said):
    finished("student-2", "KARMMA_S", 0.4)
    path = finished("student-1", "KARMMA_S", 0.4)
    RunFolder(path.with_name("unfinished")).start({"kind": "student"})
    found, _, err = evaluate(*args)
    assert found == code
    assert said in err
    assert "Traceback" not in err


def test_run_without_its_checkpoint_is_one_line(evaluate, finished, tmp_path):
    run = finished("student-1", "KARMMA_S", 0.4)
    (tmp_path / "t.csv").write_text("\n".join(["clip_id,video,split,verb,noun", *ROWS, "e,e.mp4,test,lift,cup"]) + "\n")
    described = json.loads((run / "config.json").read_text())
    data = {"modalities": ["video"]}
    settings = {"modalities": None, "missing": "B.5", "modality_dropout": 0.5}
    (run / "config.json").write_text(json.dumps({**described, "data": data, "settings": settings, "teacher": "none"}))
    _, _, err = evaluate(run)
    assert "best.safetensors: no such checkpoint. Train the run again." in err
    assert "Traceback" not in err


@pytest.mark.parametrize("described", [{"kind": "student"}, [1], {"kind": "student", "classes": {"verb": ["a"]}}])
def test_config_of_no_run_is_one_line(evaluate, finished, described):
    run = finished("student-1", "KARMMA_S", 0.4)
    (run / "config.json").write_text(json.dumps(described))
    code, _, err = evaluate(run)
    assert code == 1
    assert "config.json is not that of a student or teacher of this version" in err


def test_run_named_twice_is_one(evaluate, finished):
    run = finished("student-1", "KARMMA_S", 0.4)
    _, out, err = evaluate(run, f"{run}/../student-1")
    assert "average rank" not in out
    assert err.count("Run: ") == 1


def test_evaluation_of_another_version_is_made_anew(evaluate, finished):
    run = finished("student-1", "KARMMA_S", 0.4)
    path = run / "evaluation" / "test.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "unheard_of": 1}))
    _, _, err = evaluate(run)
    assert "Nothing to do" not in err
    assert "Traceback" not in err
