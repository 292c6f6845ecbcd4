"""The commands under `karmma cache` on extracted caches: what is printed, the exit code, and the files left."""

import io
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import dask.array
import h5py
import numpy as np
import pytest
import xarray
import zarr
from karmma import cli, cli_options
from karmma.data.cache import Cache
from karmma.data.sample import write_sample
from karmma.data.stores import LogitStore, TokenStore

N_CLIPS = 12
SETTINGS = """preset = "tiny"
[data]
table = "clips.csv"
heads = ["verb"]
modalities = ["audio", "detections"]
frames = 4
size = 32
audio_segment_s = 0.256
audio_mels = 24
audio_steps = 32
[extract]
theta = 7
batch_size = 3
shard_rows = 6
readers = 1
"""
QUICK = ("--epochs", "1", "--warmup-epochs", "0", "--embed-dim", "16", "--ffn-dim", "16", "--threads", "1")


def run(capsys, *args, stdin=""):
    """Run a command in this process; return exit code, stdout and stderr."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["karmma", *map(str, args)])
        patch.setattr("sys.stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as ended:
            cli.main()
    said = capsys.readouterr() if capsys else None
    return ended.value.code, said and said.out, said and said.err


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """A folder of clips, settings and the cache that `karmma extract` made of them."""
    folder = tmp_path_factory.mktemp("extracted")
    write_sample(folder, n_clips=N_CLIPS)
    (folder / "karmma.toml").write_text(SETTINGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(None, "extract")[0] == 0
    return folder


@pytest.fixture
def here(extracted, tmp_path, monkeypatch):
    """A working folder with a cache of its own, and a terminal that is wide enough."""
    for name in ("videos", "boxes"):
        (tmp_path / name).symlink_to(extracted / name)
    for name in ("clips.csv", "karmma.toml"):
        shutil.copy(extracted / name, tmp_path)
    shutil.copytree(extracted / "cache", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for console in (cli_options.out, cli_options.err):
        monkeypatch.setattr(console, "width", 200)
    return tmp_path


def stores(cache: Path) -> dict[str, str]:
    """Return modality -> digest of a cache that has one set of each."""
    return {modality: name for modality, name in Cache.open(cache).all_identities()}


def contents(folder: Path, part: str = "tokens") -> dict[str, bytes]:
    files = (path for path in sorted((folder / part).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def one_line(said: str) -> bool:
    return len(said.strip().splitlines()) == 1 and "Traceback" not in said


def test_zarr_dask_and_xarray_open_an_extracted_cache_as_it_is(extracted):
    """Warnings are errors here: foreign files in a group would give one."""
    for modality, name in stores(extracted / "cache").items():
        path = extracted / f"cache/tokens/{modality}/{name}.zarr"
        store, rows = TokenStore.open(path), np.arange(N_CLIPS)
        tokens, state = store.read(rows, 0), store.state(rows, 0)
        group = zarr.open_group(str(path), mode="r")
        assert {key for key, _ in group.members(max_depth=None)} == {"tokens", "state"}
        assert group["tokens"].metadata.dimension_names == ("clip", "view", "token", "width")
        assert np.array_equal(dask.array.from_zarr(str(path / "tokens"))[:, 0].compute(), tokens, equal_nan=True)
        for opened in (xarray.open_zarr, partial(xarray.open_dataset, engine="zarr")):
            dataset = opened(str(path), consolidated=False)
            assert dict(dataset.sizes) == {"clip": N_CLIPS, "view": 1, "token": store.k, "width": store.width}
            assert dataset["tokens"].dims == ("clip", "view", "token", "width")
            assert dataset["state"].dims == ("clip", "view")
            assert np.array_equal(dataset["tokens"].values[:, 0], tokens, equal_nan=True)
            assert np.array_equal(dataset["state"].values[:, 0], state)


def test_info_says_what_is_there_made_from_what_how_large_and_how_complete(here, capsys):
    (code, out, _), names = run(capsys, "cache", "info"), stores(here / "cache")
    for word in (*names, *names.values(), f"cache: {N_CLIPS} clips", "ast_micro", "stlt_micro", "theta 7", "all"):
        assert word in out, word
    said = json.loads(run(capsys, "cache", "info", "--json")[1])
    assert (code, said["clips"]) == (0, N_CLIPS)
    files = {path: len(data) for path, data in contents(here, "cache").items()}
    for store in said["stores"]:
        assert store["complete"]
        assert sum(store["counts"].values()) == N_CLIPS
        assert Path(store["path"]).resolve() == here / f"cache/tokens/{store['kind']}/{store['name']}.zarr"
        assert store["n_bytes"] == sum(size for path, size in files.items() if store["name"] in path)
    lines = (here / "clips.csv").read_text().splitlines()
    (here / "clips.csv").write_text("\n".join([*lines, lines[1].replace("clip_0000,", "again,")]) + "\n")
    assert run(capsys, "extract", "--modality", "detections")[0] == 0
    found = {s["kind"]: s for s in json.loads(run(capsys, "cache", "info", "--json")[1])["stores"]}
    assert (found["audio"]["complete"], found["audio"]["n_current"], found["audio"]["n_due"]) == (False, 12, 13)
    assert found["detections"]["complete"]
    assert "12 of 13" in run(capsys, "cache", "info")[1]


def test_damage_of_every_kind_is_named_with_exit_code_4_and_dropped_shards_are_made_again_the_same(here, capsys):
    code, out, err = run(capsys, "cache", "verify")
    assert (code, out, "4 shards and all logits are sound" in err) == (0, "", True)
    before, (audio, detections) = contents(here / "cache"), stores(here / "cache").values()
    flipped = here / f"cache/tokens/audio/{audio}.zarr/state/c/0/0"
    cut = here / f"cache/tokens/audio/{audio}.zarr/tokens/c/1/0/0/0"
    deleted = here / f"cache/tokens/detections/{detections}.zarr/tokens/c/0/0/0/0"
    flipped.write_bytes(bytes([flipped.read_bytes()[0] ^ 1]) + flipped.read_bytes()[1:])
    cut.write_bytes(cut.read_bytes()[:-7])
    deleted.unlink()
    (here / f"cache/receipts/tokens/detections/{detections}/view0/1.json").write_text('{"bytes": 12')
    code, out, err = run(capsys, "cache", "verify")
    assert (code, "4 damaged" in err) == (4, True)
    files = [*(str(file.relative_to(here)) for file in (flipped, cut, deleted)), detections]
    for file, clip_id in zip(files, ("clip_0000", "clip_0006", "clip_0000", "clip_0006"), strict=True):
        assert any(file in line and clip_id in line for line in out.splitlines()), file
    assert run(capsys, "cache", "verify", "--drop")[0] == 4
    assert run(capsys, "extract")[0] == 0
    assert contents(here / "cache") == before
    assert run(capsys, "cache", "verify")[0] == 0


@pytest.mark.parametrize("command", ["info", "verify", "prune", "export", "merge"])
@pytest.mark.parametrize("kind", ["nothing", "an empty folder", "a file"])
def test_what_is_no_cache_is_refused_in_one_line(here, capsys, command, kind):
    if kind == "an empty folder":
        (here / "none").mkdir()
    elif kind == "a file":
        (here / "none").write_text("no cache")
    before = contents(here, "cache")
    options = {"export": ["x.h5", "--cache", "none"], "merge": ["none"]}.get(command, ["--cache", "none"])
    code, out, err = run(capsys, "cache", command, *options)
    assert (code, out, one_line(err)) == (1, "", True)
    assert "none: no cache here. Run karmma extract" in err
    assert (contents(here, "cache"), (here / "x.h5").exists()) == (before, False)


def test_parts_made_without_a_shared_disk_are_merged_by_two_processes_to_the_bytes_of_one_run(here, capsys):
    for part in (1, 2):
        options = ("--part", f"{part}/2", "--cache", f"part{part}", "--modality", "detections")
        assert run(capsys, "extract", *options)[0] == 0
    command = [sys.executable, "-c", "from karmma.cli import main; main()", "cache", "merge", "--cache", "third"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    merging = [subprocess.Popen([*command, f"part{part}"], cwd=here, env=environment, stdout=-1) for part in (1, 2)]
    try:
        assert [process.wait(timeout=120) for process in merging] == [0, 0]
    finally:
        for process in merging:
            process.kill()
            process.communicate()
    assert run(capsys, "cache", "merge", "part1", "--cache", "part2")[0] == 0
    for merged in ("third", "part2"):
        assert contents(here / merged) == contents(here / "cache", "tokens/detections")
    code, out, err = run(capsys, "cache", "merge", "part1", "--cache", "third")
    assert (code, err.count(" 0 clips of "), stores(here / "third")["detections"] in out) == (0, 1, True)


def test_older_tokens_are_adopted_and_extract_then_has_nothing_to_do(here, capsys, monkeypatch):
    name, before = stores(here / "cache")["detections"], contents(here / "cache")
    monkeypatch.setattr("karmma.data.identity.PREPROCESSING", 99)
    code, _, err = run(capsys, "cache", "adopt", name, "--sample", "3")
    assert ("differs: input.preprocessing is" in err, f". 12 rows of {name} are now " in err) == (True, True)
    assert code == 0
    assert run(capsys, "extract", "--modality", "detections")[2].startswith("Nothing to do")
    assert before.items() <= contents(here / "cache").items()
    code, _, err = run(capsys, "cache", "adopt", name[:-1])
    assert (code, one_line(err), f"Did you mean '{name}'?" in err) == (1, True, True)


@pytest.fixture
def run_config(here):
    """The config of a run that uses the audio tokens; those of detections are in use by none."""
    (here / "runs/teacher-1").mkdir(parents=True)
    config = {"kind": "teacher", "tokens": {"audio": stores(here / "cache")["audio"]}}
    (here / "runs/teacher-1/config.json").write_text(json.dumps(config))
    return here / "runs/teacher-1/config.json"


@pytest.mark.parametrize(("answer", "gone"), [("n\n", 0), ("y\n", 1), ("", 0), ("--yes", 1)])
def test_prune_asks_first_and_removes_exactly_what_no_run_refers_to(here, run_config, capsys, answer, gone):
    options = [answer] if answer == "--yes" else []
    before, (audio, name) = contents(here, "cache"), stores(here / "cache").values()
    code, out, err = run(capsys, "cache", "prune", *options, stdin=answer)
    assert code == (0 if answer else 1)
    assert (name in out, audio in out) == (True, False)
    assert contents(here, "cache") == {path: data for path, data in before.items() if not gone or name not in path}
    n_bytes = sum(len(data) for path, data in before.items() if name in path)
    assert (f"Removed 1 stores, {n_bytes / 1000:.1f} kB" in err) == bool(gone)
    if gone:
        assert "Nothing to do" in run(capsys, "cache", "prune", "--yes")[2]


def test_prune_removes_nothing_where_a_runs_config_is_damaged(here, run_config, capsys):
    before = contents(here, "cache")
    run_config.write_text('{"kind": "teacher", "tokens"')
    code, _, err = run(capsys, "cache", "prune", "--yes")
    assert (code, one_line(err), "teacher-1/config.json" in err) == (1, True, True)
    assert contents(here, "cache") == before


def test_export_and_import_give_the_same_tokens_and_both_name_what_they_did(here, capsys):
    code, _, err = run(capsys, "cache", "export", "out/x.h5")
    assert (code, "Wrote out/x.h5: audio, detections of 12 clips" in err) == (0, True)
    code, _, err = run(capsys, "cache", "import", "out/x.h5", "--cache", "other")
    assert (code, f"audio: 12 rows are now tokens {stores(here / 'cache')['audio']}." in err) == (0, True)
    assert contents(here / "other") == contents(here / "cache")


@pytest.mark.parametrize(("option", "name"), [("--tokens", "typo"), ("--teacher", "typo"), ("--modality", "flow")])
def test_export_of_what_is_not_there_is_refused_and_leaves_no_file(here, capsys, option, name):
    code, _, err = run(capsys, "cache", "export", "x.h5", option, name)
    assert (code, one_line(err), name in err) == (1, True, True)
    assert not list(here.glob("*x.h5*"))


def write_foreign(path: Path, **datasets) -> None:
    """Write what somebody else's code may have written: clips in reverse order and one that nobody here knows."""
    with h5py.File(path, "w") as file:
        file["clip_id"] = [*(f"clip_{n:04d}" for n in reversed(range(N_CLIPS))), "stranger"]
        for name, values in datasets.items():
            file[name.replace("__", "/")] = values


def test_clips_that_fail_at_import_are_named_and_end_with_exit_code_3(here, capsys):
    values = np.ones((N_CLIPS + 1, 8))
    values[0, 0] = 1e9
    write_foreign(here / "far.h5", tokens__video=values)
    code, _, err = run(capsys, "cache", "import", "far.h5", "--cache", "other")
    assert (code, "1 clips of far.h5 are not in" in err, "clip_0011" in err) == (3, True, True)


@pytest.mark.slow
def test_features_from_elsewhere_train_a_teacher(here, capsys):
    values = np.sin(np.arange((N_CLIPS + 1) * 3 * 8)).reshape(-1, 3, 8)
    values[2] = np.nan
    write_foreign(here / "far.h5", tokens__video=values.astype(np.float32), tokens__audio=values[:, 0])
    options = ("--cache", "other", "--modality", "video", "--modality", "audio")
    assert run(capsys, "cache", "import", "far.h5", *options)[0] == 0
    code, _, err = run(capsys, "train-teacher", *options, *QUICK)
    assert (code, "Modalities: V+A" in err) == (0, True)
    (path,) = (here / "other/logits").glob("*.zarr")
    assert LogitStore.open(path).states[:, 0].tolist() == [2 if n == 9 else 1 for n in range(N_CLIPS)]
    before = contents(here / "other", "logits")
    file = path / "verb/c/0/0/0"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    code, out, _ = run(capsys, "cache", "verify", "--cache", "other")
    assert (code, str(path.relative_to(here)) in out) == (4, True)
    assert run(capsys, "cache", "verify", "--cache", "other", "--drop")[0] == 4
    assert run(capsys, "train-teacher", *options, *QUICK)[0] == 0
    assert contents(here / "other", "logits") == before
    assert "Nothing to do" in run(capsys, "cache", "prune", "--cache", "other")[2]


@pytest.mark.slow
def test_foreign_teachers_logits_distil_a_student(here, capsys):  # the paper's KARMMA_[43] -> S
    write_foreign(here / "KARMMA_[43].h5", logits__verb=np.sin(np.arange((N_CLIPS + 1) * 4)).reshape(-1, 4))
    code, _, err = run(capsys, "cache", "import", "KARMMA_[43].h5")
    assert (code, "12 logits are now teacher " in err) == (0, True)
    (path,) = (here / "cache/logits").glob("*.zarr")
    code, _, err = run(capsys, "distill", "--teacher", "KARMMA_[43]", *QUICK, "--theta", "7")
    assert (code, f"Modalities: A+D, teacher: {path.stem}" in err) == (0, True)
    (student,) = here.glob("runs/student-*")
    assert json.loads((student / "config.json").read_text())["teacher"] == path.stem
    assert json.loads((student / "metrics.jsonl").read_text().splitlines()[0])["kl"] > 0
    assert (run(capsys, "cache", "prune", "--yes")[0], path.exists(), stores(here / "cache")) == (0, True, {})
    code, _, err = run(capsys, "distill", "--teacher", "KARMMA_[44]")
    assert (code, one_line(err), "no logits of a teacher 'KARMMA_[44]'" in err) == (1, True, True)
