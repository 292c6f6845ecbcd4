"""A teacher's logits computed again from its tokens."""

import numpy as np
import pytest
import torch
from karmma import cli, cli_options
from karmma.data.runs import RunFolder
from karmma.data.stores import LogitStore
from karmma.fuse.config import TeacherConfig
from karmma.fuse.logits import recompute
from karmma.fuse.stage import train_teacher

TINY = TeacherConfig(
    embed_dim=16, ffn_dim=16, n_layers=1, n_attention_heads=2, epochs=2, warmup_epochs=1, batch_size=4, threads=1
)


@pytest.fixture
def taught(made):
    return made, train_teacher(made.table, made.data, TINY)


def test_logits_computed_again_are_those_that_are_stored(taught):
    made, report = taught
    (found,) = recompute(made.cache, made.data.runs, 10)
    assert (found.teacher, found.n_clips, found.reason) == (report.logits.stem, 10, "")
    assert found.error < 1e-5


def shifted(report):
    """Change one stored logit, as a write of other weights would; checksums are made good."""
    store = LogitStore.open(report.logits)
    values = {head: store.values(head).copy() for head in store.heads}
    values["verb"][0, 0, 0] += 0.5
    about = {name: value for name, value in store.attributes.items() if name not in ("sha256", "format")}
    made_from = np.array([f"{number:08x}" if number else "" for number in store.made_from.tolist()])
    LogitStore.write(report.logits, values, store.states, made_from, about)


def test_logits_of_other_weights_are_found_out(taught):
    made, report = taught
    shifted(report)
    (found,) = recompute(made.cache, made.data.runs, 24)
    assert found.error == pytest.approx(0.5, abs=1e-4)


def test_teacher_whose_run_is_gone_is_named(taught, tmp_path):
    made, report = taught
    (found,) = recompute(made.cache, tmp_path / "elsewhere", 4)
    assert (found.n_clips, found.teacher) == (0, report.logits.stem)
    assert "is not there" in found.reason


@pytest.mark.parametrize("damaged", [False, True])
def test_verify_says_how_far_logits_are_off(taught, monkeypatch, capsys, damaged):
    made, report = taught
    if damaged:
        shifted(report)
    monkeypatch.setattr(cli_options.out, "width", 200)
    places = ("--cache", str(made.data.cache), "--runs", str(made.data.runs))
    monkeypatch.setattr("sys.argv", ["karmma", "cache", "verify", "--logits", "--sample", "24", *places])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr()
    assert "24 clips computed again, largest difference" in said.out
    assert ended.value.code == (4 if damaged else 0)
    assert ("run karmma train-teacher again" in said.out) == damaged


def test_weights_that_are_not_numbers_are_found_out(taught):
    made, report = taught
    run = RunFolder(report.run)
    run.save_checkpoint("best", {name: value * torch.nan for name, value in run.load_checkpoint("best").items()}, {})
    (found,) = recompute(made.cache, made.data.runs, 24)
    assert not found.error <= 1e9


def test_verify_of_no_logits_at_all_is_no_success(made, monkeypatch, capsys):
    places = ("--cache", str(made.data.cache), "--runs", str(made.data.runs))
    monkeypatch.setattr("sys.argv", ["karmma", "cache", "verify", "--logits", *places])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    assert "of 0 teachers' logits none could be computed again. Run karmma train-teacher." in capsys.readouterr().err


def test_sample_is_spread_over_the_clips(taught):
    made, _ = taught
    counts = [next(recompute(made.cache, made.data.runs, n)).n_clips for n in (1, 3, 100)]
    assert counts == [1, 3, 24]
