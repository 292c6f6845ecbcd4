"""Run folders: finished or not, metrics, checkpoints without pickle."""

import pytest
import torch
from karmma.data.errors import RunError
from karmma.data.runs import RunFolder, finished_runs


def test_run_goes_from_started_to_finished(tmp_path):
    run = RunFolder(tmp_path / "teacher-1")
    run.start({"seed": 0})
    run.log({"epoch": 0, "loss": 1.5})
    run.log({"epoch": 1, "loss": 1.25})
    with pytest.raises(RunError, match="did not finish"):
        RunFolder.open(run.path)
    run.finish({"val": {"action": 0.5}})
    again = RunFolder.open(run.path)
    assert again.config == {"seed": 0}
    assert again.result == {"val": {"action": 0.5}}
    assert [record["loss"] for record in again.metrics()] == [1.5, 1.25]


def test_finished_run_is_never_started_over(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.finish({})
    with pytest.raises(RunError, match="a finished run is here already"):
        run.start({})


def test_unfinished_run_starts_over_with_empty_metrics(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.log({"epoch": 0})
    run.start({})
    run.log({"epoch": 7})
    assert run.metrics() == [{"epoch": 7}]


def test_checkpoint_comes_back_bit_by_bit(tmp_path):
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3).T, "b": torch.tensor(3)}
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.save_checkpoint("best", tensors, {"epoch": 3})
    found = run.load_checkpoint("best")
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert b'"epoch\\": 3' in (run.path / "best.safetensors").read_bytes()[:300]
    with pytest.raises(RunError, match=r"last\.safetensors: no such checkpoint"):
        run.load_checkpoint("last")


def test_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(RunError, match="no run here"):
        RunFolder.open(tmp_path)


def test_finished_runs_are_listed_the_latest_last(tmp_path):
    for name in ("student-b", "student-a", "teacher-c"):
        run = RunFolder(tmp_path / name)
        run.start({})
        run.finish({})
    RunFolder(tmp_path / "student-unfinished").start({})
    assert [run.path.name for run in finished_runs(tmp_path, "student")] == ["student-b", "student-a"]
