"""The inventory: what a cache holds, how large and complete it is, and what no run refers to."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.drafts import open_store
from karmma.data.errors import CacheError
from karmma.data.identity import token_identity
from karmma.data.inventory import prune, take_inventory, unused
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.runs import RunFolder
from karmma.data.stores import LogitStore
from karmma.data.transfer import fill_rows

TEACHER, OTHER = "t" * 16, "u" * 16


def read_table(folder, n_clips=6, stop=2):
    rows = [f"c{n},v.mp4,0,{stop},train,{'ab'[n % 2]}" for n in range(n_clips)]
    (folder / "clips.csv").write_text("clip_id,video,start_s,stop_s,split,verb\n" + "\n".join(rows) + "\n")
    return read_clip_table(folder / "clips.csv", ("verb",))


def add_tokens(cache: Cache, modality: str, theta: int) -> str:
    """Add a store of six clips in shards of four; c1 is absent, c5 failed."""
    fields = token_identity(modality, DataConfig(), {"name": "swin", "weights": "abcdef0123456789"}, theta, "float32")
    store = open_store(cache, modality, digest(fields), fields, (6, 1, theta, 4), 4)
    states = {1: ABSENT, 5: FAILED}

    def read(rows):
        return [(states.get(row, PRESENT), np.ones((theta, 4)), "broken" * (row == 5)) for row in rows.tolist()]

    fill_rows(cache, store, (modality, store.path.stem, 0), cache.row_digests(), read, {})
    return store.path.stem


def add_logits(cache: Cache, teacher: str, tokens: dict[str, str]) -> None:
    about = {"teacher": teacher, "run": "teacher-1", "classes": {"verb": ["a", "b"]}, "inputs": {}, "tokens": tokens}
    logits, state = {"verb": np.ones((6, 1, 2))}, np.array([[PRESENT]] * 5 + [[0]])
    LogitStore.write(cache.logits_path(teacher), logits, state, cache.row_digests(), about)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Two sets of audio tokens, one of detections, and logits of two teachers, made from one set of audio each."""
    folder = tmp_path_factory.mktemp("filled")
    cache = Cache(folder / "cache")
    cache.add_clips(read_table(folder))
    names = [add_tokens(cache, *key) for key in (("audio", 2), ("audio", 3), ("detections", 2))]
    add_logits(cache, TEACHER, {"audio": names[0]})
    add_logits(cache, OTHER, {"audio": names[1]})
    return cache.path, names


@pytest.fixture
def cache(filled, tmp_path):
    """A copy of the cache that a test may change; `names` are the digests of its tokens."""
    shutil.copytree(filled[0], tmp_path / "cache")
    cache = Cache.open(tmp_path / "cache")
    cache.names = filled[1]
    return cache


@pytest.fixture
def write_run(tmp_path):
    """Return a function that writes a run folder, finished if it has a result."""

    def written(name, config, result=None):
        run = RunFolder(tmp_path / "runs" / name)
        run.start(config)
        if result is not None:
            run.finish(result)
        return run

    (tmp_path / "runs").mkdir()
    return written


def contents(cache: Cache) -> dict[str, bytes]:
    return {str(path.relative_to(cache.path)): path.read_bytes() for path in cache.path.rglob("*") if path.is_file()}


def names_of(stores) -> set[str]:
    return {store.name for store in stores}


def test_every_store_is_listed_with_what_it_was_made_from(cache):
    stores = take_inventory(cache)
    kinds = [store.kind for store in stores]
    assert kinds == ["audio", "audio", "detections", "logits", "logits"]
    assert {store.name for store in stores} == {*cache.names, TEACHER, OTHER}
    by_name = {store.name: store for store in stores}
    assert by_name[cache.names[1]].made_from == "swin (abcdef01), float32, theta 3"
    assert by_name[cache.names[1]].shape == (6, 1, 3, 4)
    assert by_name[TEACHER].made_from == "teacher-1: verb 2"
    assert by_name[cache.names[0]].counts == {"present": 4, "absent": 1, "failed": 1}
    assert by_name[TEACHER].counts == {"present": 5}
    assert [store.is_complete for store in stores] == [True, True, True, False, False]


def test_bytes_are_those_on_disk_and_all_of_a_cache_but_its_row_order_is_in_some_store(cache):
    files, stores = contents(cache), take_inventory(cache)
    for store in stores:
        assert store.n_bytes == sum(len(data) for path, data in files.items() if store.name in path)
    assert sum(store.n_bytes for store in stores) == sum(map(len, files.values())) - len(files["clips.parquet"])


def test_inventory_can_be_said_as_json(cache):
    said = json.loads(json.dumps([asdict(store) for store in take_inventory(cache)]))
    assert said[0]["counts"] == {"present": 4, "absent": 1, "failed": 1}
    assert (said[0]["n_current"], said[0]["n_due"]) == (6, 6)


def test_clips_added_to_the_table_make_every_store_incomplete(cache, tmp_path):
    cache.add_clips(read_table(tmp_path, n_clips=8))
    found = {store.name: (store.n_current, store.n_due, store.is_complete) for store in take_inventory(cache)}
    assert found == dict.fromkeys(cache.names, (6, 8, False)) | dict.fromkeys((TEACHER, OTHER), (5, 8, False))


def test_clips_whose_times_changed_and_shards_that_are_damaged_count_as_not_there(cache, tmp_path):
    file = cache.tokens_path("detections", cache.names[2]) / "tokens/c/0/0/0/0"
    file.write_bytes(file.read_bytes()[:-1])
    assert {store.name: store.n_current for store in take_inventory(cache)}[cache.names[2]] == 2
    cache.add_clips(read_table(tmp_path, stop=3))
    assert [store.n_current for store in take_inventory(cache)] == [0] * 5


def test_cache_without_any_store_has_an_empty_inventory(tmp_path):
    cache = Cache(tmp_path / "cache")
    cache.add_clips(read_table(tmp_path))
    assert take_inventory(cache) == []


def test_unused_is_exactly_what_no_run_refers_to(cache, write_run, tmp_path):
    write_run("teacher-1", {"kind": "teacher", "tokens": {"audio": cache.names[0]}}, {"teacher": TEACHER})
    write_run("student-1", {"kind": "student", "teacher": "none"}, {})
    found = unused(cache, take_inventory(cache), tmp_path / "runs")
    assert names_of(found) == {cache.names[1], cache.names[2], OTHER}


def test_tokens_behind_the_logits_of_a_students_teacher_are_in_use_though_its_own_run_is_gone(
    cache, write_run, tmp_path
):
    write_run("student-1", {"kind": "student", "teacher": OTHER}, {})
    found = unused(cache, take_inventory(cache), tmp_path / "runs")
    assert names_of(found) == {cache.names[0], cache.names[2], TEACHER}


def test_run_that_has_not_finished_keeps_what_it_trains_on(cache, write_run, tmp_path):
    write_run("teacher-1", {"kind": "teacher", "tokens": {"detections": cache.names[2]}})
    write_run("student-1", {"kind": "student", "teacher": TEACHER})
    found = unused(cache, take_inventory(cache), tmp_path / "runs")
    assert names_of(found) == {cache.names[1], OTHER}


@pytest.mark.parametrize("text", ["", '{"tokens": {"audio"', "[]", "5", '{"tokens": 5}', '{"tokens": ["a"]}'])
@pytest.mark.parametrize("file", ["config.json", "result.json"])
def test_run_whose_files_are_damaged_stops_it_and_is_named(cache, write_run, tmp_path, file, text):
    run = write_run("teacher-1", {"kind": "teacher", "tokens": {"audio": cache.names[0]}}, {"teacher": TEACHER})
    (run.path / file).write_text(text if file == "config.json" else text.replace("tokens", "teacher"))
    with pytest.raises(CacheError, match=f"teacher-1/{file}"):
        unused(cache, take_inventory(cache), tmp_path / "runs")


def test_pruned_stores_are_gone_with_their_receipts_and_all_else_is_untouched(cache):
    before = contents(cache)
    doomed = [store for store in take_inventory(cache) if store.name in (cache.names[1], OTHER)]
    freed = prune(cache, doomed)
    after = contents(cache)
    assert after == {path: data for path, data in before.items() if not {cache.names[1], OTHER} & {*path_parts(path)}}
    assert freed == sum(map(len, before.values())) - sum(map(len, after.values()))
    assert names_of(take_inventory(cache)) == {cache.names[0], cache.names[2], TEACHER}
    assert not cache.tokens_path("audio", cache.names[1]).exists()
    assert not cache.receipts("audio", cache.names[1]).exists()


def path_parts(path: str) -> list[str]:
    return [part.removesuffix(".zarr") for part in path.split("/")]


@pytest.mark.parametrize("n_done", [1, 2, 3])
def test_pruning_that_was_stopped_at_any_step_is_taken_up_by_the_next(cache, monkeypatch, n_done):
    from karmma.data import inventory

    doomed, steps = [store for store in take_inventory(cache) if store.kind == "audio"], iter(range(n_done))
    remove = inventory.remove

    def stopped(path):
        if next(steps, None) is None:
            raise KeyboardInterrupt
        remove(path)

    monkeypatch.setattr(inventory, "remove", stopped)
    with pytest.raises(KeyboardInterrupt):
        prune(cache, doomed)
    monkeypatch.setattr(inventory, "remove", remove)
    left = take_inventory(cache)
    assert names_of(left) >= {cache.names[2], TEACHER, OTHER}
    prune(cache, [store for store in left if store.kind == "audio"])
    assert not [path for path in contents(cache) if "audio/" in path]


def test_what_a_killed_pruning_was_removing_is_no_store(cache):
    """A folder is first renamed, so that half of it never bears its name."""
    path = cache.receipts("audio", cache.names[0])
    path.rename(path.with_name(f".{path.name}.0a1b2c3d-1.tmp"))
    assert list(cache.identities("audio")) == [cache.names[1]]
    assert all(not store.name.startswith(".") for store in take_inventory(cache))


def test_damaged_store_is_named_in_one_line(cache):
    (cache.logits_path(TEACHER) / "verb/c/0/0/0").write_bytes(b"nothing")
    with pytest.raises(CacheError, match=TEACHER):
        take_inventory(cache)
