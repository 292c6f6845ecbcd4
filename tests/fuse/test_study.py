"""The journal of a sweep: who claims which trial, what becomes of those of the dead, and what is ended early."""

import csv
import multiprocessing
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import optuna
import pytest
from karmma.data.config import DataConfig
from karmma.fuse.config import SweepConfig, TeacherConfig
from karmma.fuse.space import Space
from karmma.fuse.study import ATTEMPTS, Study
from karmma.fuse.sweep_report import write_results
from optuna.storages.journal import JournalFileOpenLock

SPACE = {"alpha": "0..1", "tau": "0.1,0.2,0.3"}


def study(folder, **sweep):
    space = Space(sweep.pop("space", SPACE), DataConfig(), TeacherConfig())
    return Study(folder, space, SweepConfig(**{"sampler": "random", **sweep}), seed=3, n_warmup=1)


def all_claimed(folder, n_workers, total, **sweep):
    """Claim and complete trials by several processes at once; return number -> what was chosen."""
    forking = multiprocessing.get_context("fork")
    found = forking.SimpleQueue()

    def worker():
        with study(folder, **sweep) as mine:
            while claims := mine.claim(2, total):
                found.put([(claim.number, claim.chosen) for claim in claims])
                for claim in claims:
                    mine.complete(claim, claim.number / 100)
        found.put(None)

    for _ in range(n_workers):
        forking.Process(target=worker, daemon=True).start()
    claimed, n_over = [], 0
    while n_over < n_workers:
        claims = found.get()
        claimed += claims or []
        n_over += claims is None
    assert sorted(number for number, _ in claimed) == list(range(total))
    return dict(claimed)


def test_any_number_of_workers_make_the_same_trials_each_once_and_no_more(tmp_path):
    assert all_claimed(tmp_path / "one", 1, 7) == all_claimed(tmp_path / "three", 3, 7)


def test_grid_is_worked_off_once_in_its_order(tmp_path):
    space = {"alpha": "0,1", "tau": "0.1,0.2"}
    found = all_claimed(tmp_path, 2, 4, sampler="grid", space=space)
    assert [found[number] for number in range(4)] == Space(space, DataConfig(), TeacherConfig()).grid()


def test_another_sampler_and_more_trials(tmp_path):
    random, tpe = (all_claimed(tmp_path / sampler, 1, 13, sampler=sampler) for sampler in ("random", "tpe"))
    assert [random[number] == tpe[number] for number in range(13)] == [True] * 10 + [False] * 3  # ten to learn from
    all_claimed(tmp_path / "a", 1, 3)
    with study(tmp_path / "a") as again:
        assert again.is_over(3)
        assert not again.is_over(4)
        (claim,) = again.claim(5, 4)
        assert claim.number == 3


def test_trial_of_the_living_is_left_alone_and_given_back_ones_go_on(tmp_path):
    with study(tmp_path) as one, study(tmp_path) as other:
        (claim,) = one.claim(1, 1)
        assert other.claim(1, 1) == []
        assert not other.is_over(1)
        one.put_back([claim])
        (again,) = other.claim(1, 1)
        assert (again.number, again.chosen) == (0, claim.chosen)
        assert other.is_held(again)
        assert not one.is_held(claim)
        other.complete(again, 0.5)
        assert one.is_over(1)
        assert one.trials()[0].value == 0.5


def test_trial_whose_processes_are_killed_again_and_again_is_given_up(tmp_path):
    script = (
        "import os, sys\nfrom pathlib import Path\nfrom karmma.data.config import DataConfig\n"
        "from karmma.fuse.config import SweepConfig, TeacherConfig\nfrom karmma.fuse.space import Space\n"
        "from karmma.fuse.study import Study\n"
        f"space = Space({SPACE!r}, DataConfig(), TeacherConfig())\n"
        f"study = Study(Path({str(tmp_path)!r}), space, SweepConfig(sampler='random'), 3, 1)\n"
        "claims = study.claim(1, 2)\n"
        "os.write(1, repr([(claim.number, claim.chosen) for claim in claims]).encode())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    said = []
    for _ in range(ATTEMPTS):
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        said.append(ended.stdout)
    assert said[0].startswith("[(0, ")
    assert len(set(said)) == 1
    with study(tmp_path) as after:
        (claim,) = after.claim(1, 2)
        assert claim.number == 1
        trial = after.trials()[0]
        assert trial.state.name == "FAIL"
        said = "its process died 3 times after epoch -1, at last of this: killed, perhaps because memory was short"
        assert trial.user_attrs["reason"] == said


def test_trial_worse_than_the_others_at_its_epoch_is_ended(tmp_path):
    with study(tmp_path, pruner="median") as mine:
        for claim in mine.claim(5, 5):
            for epoch in range(4):
                assert mine.report(claim, epoch, 0.2 * epoch)
            mine.complete(claim, 0.6)
        good, bad = mine.claim(2, 7)
        assert [mine.report(good, epoch, 0.3 * epoch) for epoch in range(3)] == [True] * 3
        assert [mine.report(bad, epoch, 0.1 * epoch) for epoch in range(3)] == [True, False, False]
        assert mine.report(good, 2, 0.0)  # taken up again, an epoch is reported a second time: the first one counts
        mine.prune(bad)
        assert mine.trials()[bad.number].state.name == "PRUNED"
        mine.complete(good, 0.9)
        table, plot = write_results(tmp_path, mine.space, mine.trials())
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert [row["trial"] for row in rows] == ["5", "0", "1", "2", "3", "4", "6"]
    assert [(row["state"], row["value"], row["epochs"]) for row in rows[::6]] == [
        ("complete", "0.9", "3"),
        ("pruned", "0.2", "3"),
    ]
    assert plot.read_text().count("<use ") > 6 * 3
    with study(tmp_path / "none", pruner="none") as mine:
        claims = mine.claim(6, 6)
        assert all(mine.report(claim, 3, claim.number) for claim in reversed(claims))


def test_first_epochs_end_nothing(tmp_path):
    with study(tmp_path, pruner="median") as mine:
        for claim in mine.claim(8, 8):
            assert mine.report(claim, 0, -claim.number)
            mine.complete(claim, -claim.number)


def test_halving_lets_the_better_ones_go_on(tmp_path):
    with study(tmp_path, pruner="halving") as mine:
        good, bad = mine.claim(2, 2)
        assert [mine.report(good, epoch, 0.9) for epoch in range(3)] == [True] * 3
        assert not mine.report(bad, 1, 0.1)


def test_grid_goes_on_where_its_process_died_between_two_trials(tmp_path, monkeypatch):
    space = {"alpha": "0,1", "tau": "0.1,0.2"}
    with study(tmp_path, sampler="grid", space=space) as mine:
        with monkeypatch.context() as patched:
            patched.setattr(optuna.Study, "ask", lambda self: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mine.claim(1, 4)
        assert [trial.state.name for trial in mine.trials()] == ["WAITING"]
    found = all_claimed(tmp_path, 1, 4, sampler="grid", space=space)
    assert [found[number] for number in range(4)] == Space(space, DataConfig(), TeacherConfig()).grid()


def test_lock_and_half_a_line_that_the_dead_have_left_hold_up_nobody(tmp_path, monkeypatch):
    """Under a relative path too, where a lock that is a link would point nowhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("karmma.fuse.study.JournalFileOpenLock", partial(JournalFileOpenLock, grace_period=3))
    folder = Path("runs/sweep")
    with study(folder) as mine:
        (claim,) = mine.claim(1, 3)
        mine.complete(claim, 0.5)
    with open(folder / "journal.log", "ab") as journal:
        journal.write(b'{"op_code":4,"worker')
    (folder / "journal.log.lock").touch()
    with study(folder) as mine:
        (second,) = mine.claim(1, 3)
        mine.complete(second, 0.25)
    with study(folder) as mine:
        assert [trial.value for trial in mine.trials()] == [0.5, 0.25]


def test_what_a_process_died_of_is_said_of_the_trial_that_is_given_up(tmp_path):
    for _ in range(ATTEMPTS):
        with study(tmp_path) as mine:
            (claim,) = mine.claim(1, 2)
            mine.note([claim], "the disk is full")
    with study(tmp_path) as mine:
        mine.claim(1, 1)
        assert mine.trials()[0].user_attrs["reason"].endswith("at last of this: the disk is full")
