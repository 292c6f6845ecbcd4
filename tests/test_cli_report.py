"""`karmma report --efficiency`: the published figures from an empty folder, and whatever else it is asked for."""

from functools import partial
from pathlib import Path

import pytest
from karmma import cli_report


@pytest.fixture
def report(tmp_path, monkeypatch, give):
    """Run the command in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_report.out, "width", 200)

    return partial(give, "report")


@pytest.mark.slow
def test_empty_folder_reproduces_the_published_figures(report, tmp_path):
    code, out, err = report("--efficiency", "--repeats", "0")
    assert code == 0
    for parameters in ("11.25 M trained", "65.15 M trained", " 29.64 "):
        assert parameters in out, parameters
    for gflops in ("567.961391", "358.166716", "178.340794", "1165.14"):
        assert gflops in out, gflops
    assert "with the classes of EPIC-KITCHENS-100" in err
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {f"efficiency.{k}" for k in ("json", "csv", "svg")}


def test_classes_thetas_and_folder_are_those_asked_for(report, tmp_path):
    asked = ("--classes", "action=174", "--theta", "none", "--modality", "video", "--into", "here")
    code, out, _ = report("--efficiency", "--repeats", "0", "--preset", "tiny", *asked)
    assert code == 0
    assert "action 174" in out
    assert "GFLOPs at Theta none" in out
    assert "GFLOPs at Theta 300" not in out
    assert (tmp_path / "here" / "efficiency.svg").exists()
    assert not (tmp_path / "runs").exists()


def test_classes_of_a_table_are_counted(report, tmp_path):
    rows = [f"c{k},c{k}.mp4,train,{verb},{k}" for k, verb in enumerate(("push", "pull", "lift"))]
    (tmp_path / "t.csv").write_text("\n".join(["clip_id,video,split,verb,noun", *rows]) + "\n")
    code, out, err = report("--efficiency", "--repeats", "0", "--preset", "tiny", "--table", "t.csv")
    assert code == 0
    assert "verb 3, noun 3" in out
    assert "EPIC" not in err


def test_names_of_heads_are_shown_as_they_are(report):
    options = ("--repeats", "0", "--preset", "tiny", "--modality", "audio", "--theta", "48")
    code, out, _ = report("--efficiency", *options, "--classes", "[/x]=5", "--classes", "[red]y=6")
    assert code == 0
    assert "[/x] 5, [red]y 6" in out


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        ((), 1, "runs: no finished student here. Run karmma distill"),
        (("--efficiency", "--theta", "many"), 1, "--theta many: expected a number of tokens from 1 on, or none."),
        (("--efficiency", "--classes", "verb"), 1, "--classes verb: expected head=classes, at most a million"),
        (("--efficiency", "--classes", "a=1", "--classes", "a=2"), 1, "--classes a=1 a=2: a head is named twice."),
        (("--efficiency", "--classes", "a=1", "some-run"), 2, "Runs have classes of their own"),
        (("--efficiency", "--into", "a-file/here"), 1, "a-file/here: Not a directory"),
        (("--efficiency", "--device", "meta", "--repeats", "1", "--preset", "tiny"), 1, "nothing is computed there"),
        (("--efficiency", "nowhere"), 1, "nowhere: no run here"),
    ],
)
def test_what_cannot_be_reported_is_said(report, args, code, said):
    Path("a-file").write_text("")
    found, _, err = report(*args)
    assert found == code
    assert said in err
