"""Run folders: finished or not, metrics, checkpoints without pickle."""

from functools import partial

import pytest
import torch
from karmma.data.errors import RunError
from karmma.data.leases import Leases
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
    for resume in (False, True):
        with pytest.raises(RunError, match="a finished run is here already"):
            run.require_free(resume)


def test_unfinished_run_starts_over_with_empty_metrics(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.log({"epoch": 0})
    run.start({})
    run.log({"epoch": 7})
    assert run.metrics() == [{"epoch": 7}]


def stepped(n_steps):
    """A model and its AdamW after some steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(n_steps):
        optimizer.zero_grad()
        model(torch.ones(1, 3) * (step + 1)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def test_state_brings_model_and_optimizer_back_bit_by_bit(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    assert run.load_state(*stepped(0)) is None
    model, optimizer = stepped(3)
    run.save_state(model, optimizer, {"epoch": 1, "sums": {"loss": 0.1}})
    other, its = stepped(0)
    assert run.load_state(other, its) == {"epoch": 1, "sums": {"loss": 0.1}}
    for networks in ((model, optimizer), (other, its)):
        networks[1].zero_grad()
        networks[0](torch.ones(1, 3)).sum().backward()
        networks[1].step()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_interrupted_run_is_only_gone_on_with_if_that_is_asked_for(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.require_free(resume=False)  # nothing was saved: nothing can be lost
    run.save_state(*stepped(1), {"epoch": 4})
    with pytest.raises(RunError, match=r"this run was interrupted in epoch 4\. Go on with --resume"):
        run.require_free(resume=False)
    run.require_free(resume=True)
    run.finish({})
    assert not (run.path / "state.safetensors").exists()


def test_records_from_before_the_epoch_to_go_on_with_stay(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    for epoch in range(3):
        run.log({"epoch": epoch, "loss": 1.0 / (1 + epoch), "val": {"action": None, "verb": 0.5}})
    again = RunFolder(run.path)
    again.start({}, first_epoch=2)
    assert [record["epoch"] for record in again.metrics()] == [0, 1]
    again.log({"epoch": 2, "loss": 9.0, "val": {}})
    assert scalars(run.path, "loss") == {0: 1.0, 1: 0.5, 2: 9.0}
    assert scalars(run.path, "val/verb") == {0: 0.5, 1: 0.5}


def scalars(path, name):
    """Return what TensorBoard shows under a name: epoch -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(name)}


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


def test_record_that_was_half_written_is_not_counted(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    run.log({"epoch": 0})
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "lo')
    assert run.metrics() == [{"epoch": 0}]
    run.start({}, first_epoch=1)
    run.log({"epoch": 1})
    assert run.metrics() == [{"epoch": 0}, {"epoch": 1}]


def test_damaged_checkpoint_and_state_are_named(tmp_path):
    run = RunFolder(tmp_path / "r")
    run.start({})
    model, optimizer = stepped(2)
    run.save_state(model, optimizer, {"epoch": 1})
    run.save_checkpoint("best", model.state_dict(), {})
    for name in ("state", "best"):
        path = run.path / f"{name}.safetensors"
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"best.safetensors: damaged: .*Remove the run's folder"):
        run.load_checkpoint("best")
    with pytest.raises(RunError, match=r"state.safetensors: damaged"):
        run.load_state(model, optimizer)
    with pytest.raises(RunError, match=r"state.safetensors: damaged"):
        run.require_free(resume=False)


def test_run_is_trained_by_one_process_at_a_time(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("karmma.data.runs.Leases", partial(Leases, beat_s=0.1, lease_s=0.5))
    run = RunFolder(tmp_path / "r")
    with run.held():
        with pytest.raises(RunError, match="another process is training this run"), run.held():
            pass
        assert "watching for a minute if it lives" in caplog.text
    with run.held():
        pass
