"""Sweeps over a made-up cache: together as apart, killed and gone on with, and settings that can be trained again."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from karmma.data.batches import TokenReader
from karmma.data.errors import ConfigError, RunError, StaleCacheError
from karmma.data.modality import ABSENT, PRESENT
from karmma.data.runs import RunFolder
from karmma.data.settings import read_toml
from karmma.fuse.config import SweepConfig, TeacherConfig
from karmma.fuse.space import Space
from karmma.fuse.stage import train_teacher
from karmma.fuse.study import Study
from karmma.fuse.sweep import sweep_teacher
from karmma.fuse.trials import Work, objective, train_all

SETTINGS = {
    "embed_dim": 16, "ffn_dim": 16, "n_layers": 1, "n_attention_heads": 2, "attention_dropout": 0.3, "epochs": 4,
    "warmup_epochs": 1, "batch_size": 5, "max_lr": 1e-2, "threads": 1, "modality_dropout": 0.4, "device": "cpu",
}  # fmt: skip
CONFIG = TeacherConfig(**SETTINGS)
RATES = {"max_lr": "1e-3,1e-2,3e-2", "alpha": "0.3,0.7"}


def swept(made, name, space=RATES, config=CONFIG, **sweep):
    """Train all trials of a grid in this process; return the folder and the trials."""
    asked = SweepConfig(space=space, sampler="grid", **{"pruner": "none", **sweep})
    data = made.data.model_copy(update={"runs": made.data.runs / name})
    folder = data.runs / "sweep"
    space = Space(asked.space, data, config)
    train_all(Work(folder, made.table, data, config, asked, len(space.grid())))
    with Study(folder, space, asked, 0) as study:
        return folder, study.trials()


def left(folder):
    """Return what trials left that must not differ: weights, results, and records but for their times."""
    found = {}
    for run in sorted(folder.glob("trial-*")):
        records = RunFolder.open(run).metrics()
        for record in records:
            del record["clips_per_s"], record["waiting_share"]
        found[run.name] = records, RunFolder.open(run).result, (run / "best.safetensors").read_bytes()
    return found


def contents(cache):
    """Return every file of a cache with its bytes and the time when it was written."""
    files = (path for path in cache.path.rglob("*") if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_trials_trained_together_are_those_trained_apart_and_each_batch_is_read_once(made, monkeypatch):
    read = []
    batches = TokenReader.batches

    def counted(self, plan, view):
        for batch in batches(self, plan, view):
            read.append(len(batch.rows))
            yield batch

    monkeypatch.setattr(TokenReader, "batches", counted)
    before = contents(made.cache)
    apart, trials = swept(made, "apart")
    n_apart = len(read)
    together, others = swept(made, "together", together=6)
    assert len(left(apart)) == 6
    assert left(apart) == left(together)
    assert n_apart == 6 * (len(read) - n_apart) > 0
    assert [trial.value for trial in trials] == [trial.value for trial in others]
    for trial, (_, result, _) in zip(trials, left(apart).values(), strict=True):
        assert trial.value == result["val"]["action"]
    assert contents(made.cache) == before


def test_trials_with_other_batches_go_apart(made):
    space = {"batch_size": "5,8", "alpha": "0.3,0.7"}
    apart, _ = swept(made, "apart", space)
    together, _ = swept(made, "together", space, together=4)
    assert left(apart) == left(together)
    assert len({len(records) for records, *_ in left(apart).values()}) == 1


def test_trial_that_diverges_or_does_not_fit_fails_with_its_reason_and_the_others_go_on(made):
    _, alone = swept(made, "alone", {"max_lr": "1e-2,1e-3"})
    _, trials = swept(made, "some", {"max_lr": "1e-2,1e30,1e-3"}, together=3)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert "the loss is nan. Lower max_lr" in trials[1].user_attrs["reason"]
    assert [trials[0].value, trials[2].value] == [trial.value for trial in alone]
    _, trials = swept(made, "heads", {"n_attention_heads": "2,3"}, together=2)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "FAIL"]
    assert "width 16 is not divisible by 3 attention heads" in trials[1].user_attrs["reason"]


def test_trial_not_worth_going_on_with_leaves_its_record_and_nothing_to_resume(made, monkeypatch):
    report = Study.report

    def harsh(self, claim, epoch, value):
        report(self, claim, epoch, value)
        return claim.number != 1 or epoch < 1

    monkeypatch.setattr(Study, "report", harsh)
    folder, trials = swept(made, "harsh", {"max_lr": "1e-2,1e-3,2e-3"}, together=3)
    assert [trial.state.name for trial in trials] == ["COMPLETE", "PRUNED", "COMPLETE"]
    run = RunFolder.open(folder / "trial-0001")
    assert run.result == {"pruned": 1}
    assert [record["epoch"] for record in run.metrics()] == [0, 1]
    assert not (run.path / "state.safetensors").exists()


def test_trials_write_no_logits_and_load_no_backbone(made):
    """In a process of its own, which says what it has imported by the end."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom karmma.data.clips import read_clip_table\n"
        "from karmma.data.config import DataConfig\nfrom karmma.fuse.config import SweepConfig, TeacherConfig\n"
        "from karmma.fuse.trials import Work, train_all\n"
        f"data = DataConfig(cache=Path({str(made.cache.path)!r}), modalities=('video', 'audio'))\n"
        f"table = read_clip_table(Path({str(made.table.path)!r}), data.heads)\n"
        f"folder, config = Path({str(made.data.runs)!r}), TeacherConfig(**{SETTINGS!r})\n"
        "train_all(Work(folder, table, data, config, SweepConfig(space={'alpha': '0.3,0.7'}, sampler='grid'), 2))\n"
        "print([n for n in sys.modules if n.startswith(('timm', 'torchvision', 'karmma.extract', 'karmma.distill'))])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"
    assert len(list(made.data.runs.glob("trial-*/result.json"))) == 2
    assert not (made.cache.path / "logits").exists()


def command(made, runs, *options):
    """Return `karmma sweep` over the made-up cache, as a user gives it."""
    lines = [f"{name} = {json.dumps(value)}" for name, value in SETTINGS.items()]
    settings = made.data.cache.parent / "karmma.toml"
    settings.write_text("[data]\ntable = 'clips.csv'\nmodalities = ['video', 'audio']\n[teacher]\n" + "\n".join(lines))
    karmma = str(Path(sys.executable).with_name("karmma"))
    places = ("--cache", str(made.data.cache), "--runs", str(runs))
    return [karmma, "sweep", "max_lr=1e-3..3e-2,log", "--config", str(settings), *places, *options]


def test_trials_of_other_modalities_are_judged_on_the_same_clips(made):
    """A quarter of the validation clips has no sound: for a teacher of sound alone they count as wrong."""
    deaf = made.add("audio", 1, theta=None, states={2: PRESENT, 16: ABSENT})
    (video,) = made.cache.identities("video")
    config = CONFIG.model_copy(update={"tokens": {"audio": deaf, "video": video}})
    folder, trials = swept(made, "modalities", {"modality": "video+audio,audio,video"}, config)
    results = [RunFolder.open(folder / f"trial-{number:04d}").result for number in range(3)]
    shares = [trial.value / result["val"]["action"] for trial, result in zip(trials, results, strict=True)]
    assert shares == [1, 0.75, 1]


def test_trial_whose_state_is_damaged_fails_with_its_file(made, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("karmma.fuse.trials._Judge.goes_on", interrupted)
        with pytest.raises(KeyboardInterrupt):
            swept(made, "damaged", {"alpha": "0.3,0.7"})
    (state,) = made.data.runs.glob("damaged/sweep/trial-*/state.safetensors")
    state.write_bytes(state.read_bytes()[:50])
    _, trials = swept(made, "damaged", {"alpha": "0.3,0.7"})
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE"]
    assert f"{state}: damaged" in trials[0].user_attrs["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_sweep_that_is_killed_in_the_middle_goes_on_and_ends_as_if_it_had_not_been(made, tmp_path, how):
    chosen = ("--sampler", "random", "--pruner", "none", "--trials", "5")
    options = (*chosen, "--save-minutes", "0", "--epochs", "20", "--workers", "2")
    plain = subprocess.run(command(made, tmp_path / "plain", *options), capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    asked = command(made, tmp_path / "killed", *options)
    running = subprocess.Popen(asked, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    give_up = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("sweep-*/trial-*/state.safetensors")):
        assert time.monotonic() < give_up
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, how)
    assert running.wait() == (130 if how == signal.SIGINT else -signal.SIGKILL)
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (one,), (two,) = ((tmp_path / name).glob("sweep-*") for name in ("plain", "killed"))
    assert one.name == two.name
    assert left(one) == left(two)
    assert (one / "trials.csv").read_bytes() == (two / "trials.csv").read_bytes()
    assert not list(two.glob("trial-*/state.safetensors"))


@pytest.mark.slow
def test_best_settings_train_the_best_trial_again_and_the_same_call_again_trains_nothing(made, tmp_path):
    asked = command(made, tmp_path / "runs", "alpha=0.3,0.7", "--trials", "4")
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs").glob("sweep-*")
    rows = list(csv.DictReader((folder / "trials.csv").read_text().splitlines()))
    assert len(rows) == 4
    assert float(rows[0]["value"]) == max(float(row["value"]) for row in rows if row["state"] == "complete")
    assert (folder / "trials.svg").read_text().count("</svg>") == 1
    assert f"{float(rows[0]['max_lr']):.4g}" in done.stdout
    best = read_toml(folder / "best.toml")["teacher"]
    assert (best["max_lr"], best["alpha"]) == (float(rows[0]["max_lr"]), float(rows[0]["alpha"]))

    again = subprocess.run(asked, capture_output=True, text=True)
    assert again.stdout == done.stdout
    assert "epochs/s" not in again.stderr

    karmma = asked[0]
    options = ["--config", str(folder / "best.toml")]
    taught = subprocess.run([karmma, "train-teacher", *options], capture_output=True, text=True, cwd=tmp_path)
    assert taught.returncode == 0, taught.stderr
    (teacher,) = (tmp_path / "runs").glob("teacher-*")
    trial = RunFolder.open(folder / f"trial-{int(rows[0]['trial']):04d}")
    assert RunFolder.open(teacher).result["val"] == trial.result["val"]
    assert (teacher / "best.safetensors").read_bytes() == (trial.path / "best.safetensors").read_bytes()


@pytest.mark.slow
def test_theta_is_swept_where_the_cache_has_all_tokens_and_refused_where_it_has_averages(made):
    grid = SweepConfig(space={"theta": "none,2"}, sampler="grid")
    with pytest.raises(StaleCacheError, match=r"with theta 3, this run asks for theta 2: averages of averages"):
        sweep_teacher(made.table, made.data, CONFIG, grid)
    whole = made.add("video", 0, theta=None)
    data = made.data.model_copy(update={"modalities": ("video",)})
    config = CONFIG.model_copy(update={"tokens": {"video": whole}})
    report = sweep_teacher(made.table, data, config, grid)
    values = {trial.params["theta"]: trial.value for trial in report.trials}
    for theta, value in (("none", None), ("2", 2)):
        alone = train_teacher(made.table, data, config.model_copy(update={"theta": value}))
        assert values[theta] == objective(alone.result["val"])


@pytest.mark.slow
def test_sweep_of_which_nothing_comes_says_why(made):
    every = SweepConfig(space={"n_attention_heads": "3,5"}, sampler="grid")
    with pytest.raises(RunError, match=r"no trial came to its end\. The first that failed: .* not divisible by 3"):
        sweep_teacher(made.table, made.data, CONFIG, every)
    with pytest.raises(ConfigError, match="Nothing to vary"):
        sweep_teacher(made.table, made.data, CONFIG, SweepConfig())
