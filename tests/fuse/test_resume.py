"""A training that was interrupted, and one on two ranks, against the one that was left alone."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from karmma.data.errors import RunError
from karmma.data.runs import RunFolder
from karmma.data.stores import LogitStore
from karmma.fuse.config import TeacherConfig
from karmma.fuse.stage import train_teacher

SETTINGS = {
    "embed_dim": 16, "ffn_dim": 16, "n_layers": 2, "n_attention_heads": 2, "attention_dropout": 0.3, "epochs": 6,
    "warmup_epochs": 2, "batch_size": 5, "max_lr": 1e-2, "threads": 1, "modality_dropout": 0.4, "device": "cpu",
}  # fmt: skip
CONFIG = TeacherConfig(**SETTINGS)


def command(made, runs, *options):
    """Return the command that trains on the made-up cache, as a user gives it."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in SETTINGS.items()]
    settings = made.data.cache.parent / "karmma.toml"
    settings.write_text("[data]\ntable = 'clips.csv'\nmodalities = ['video', 'audio']\n[teacher]\n" + "\n".join(lines))
    karmma = [str(Path(sys.executable).with_name("karmma"))]
    places = ("--cache", str(made.data.cache), "--runs", str(runs))
    return [*karmma, "train-teacher", "--config", str(settings), *places, *options]


def test_resume_without_anything_to_go_on_with_begins(made):
    report = train_teacher(made.table, made.data, CONFIG.model_copy(update={"resume": True, "epochs": 1}))
    assert RunFolder.open(report.run).metrics()[0]["epoch"] == 0


def test_run_that_was_interrupted_is_never_overwritten_in_silence(made, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("karmma.fuse.training.Training.is_save_due", property(interrupted))
        with pytest.raises(KeyboardInterrupt):
            train_teacher(made.table, made.data, CONFIG)
    with monkeypatch.context() as patched:
        patched.setattr("karmma.fuse.teacher.Teacher.conclude", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_teacher(made.table, made.data, CONFIG)
    (run,) = made.data.runs.glob("teacher-*")
    before = (run / "state.safetensors").read_bytes()
    with pytest.raises(RunError, match="interrupted in epoch 6"):
        train_teacher(made.table, made.data, CONFIG)
    assert (run / "state.safetensors").read_bytes() == before
    assert train_teacher(made.table, made.data, CONFIG.model_copy(update={"resume": True})).result["parameters"] > 0


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_dropout_included(made, tmp_path):
    """Batches of 5 clips do not divide by two, the last of an epoch has a single clip, and a clip lacks its audio."""
    plain = train_teacher(made.table, made.data, CONFIG)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    runs = tmp_path / "two"
    done = subprocess.run([*ranks, *command(made, runs)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (RunFolder.open(folder / plain.run.name) for folder in (made.data.runs, runs))
    for alone, together in zip(one.metrics(), two.metrics(), strict=True):
        for name in ("loss", "ce", "info_nce", "lr"):
            assert together[name] == pytest.approx(alone[name], abs=1e-5)
        for name, value in alone["val"].items():
            assert together["val"][name] == pytest.approx(value, abs=1e-5)
    assert two.result["epoch"] == one.result["epoch"]
    assert done.stderr.count("Wrote") == 1  # one rank speaks
    rows = np.arange(24)
    stores = [LogitStore.open(made.cache.logits_path(run.result["teacher"])) for run in (one, two)]
    assert stores[0].path != stores[1].path
    for head in ("verb", "noun"):
        alone, together = (store.read(rows, 0)[head] for store in stores)
        assert np.allclose(alone, together, atol=1e-3)
