"""Merging: caches made apart come together by clip id, and nothing here gets worse by it."""

import json
from pathlib import Path

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.drafts import open_store
from karmma.data.errors import CacheError
from karmma.data.identity import token_identity
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.stores import LogitStore, TokenStore
from karmma.data.transfer import fill_rows, merge
from karmma.data.verify import verify

IDENTITY = token_identity("audio", DataConfig(), {"name": "made up", "weights": "0" * 16}, 3, "float32")
NAME, TEACHER = digest(IDENTITY), "t" * 16
ALL = tuple(range(10))


def tokens_of(number, view):
    """Return tokens [3, 4] that only clip and view decide."""
    return np.sin(np.arange(12) + 7 * number + 100 * view).reshape(3, 4).astype(np.float16)


@pytest.fixture
def make(tmp_path):
    """Return a function that makes a cache of the clips c<number>, in shards of four unless it is told otherwise."""

    def made(name, numbers=ALL, *, done=None, states=None, stops=None, n_views=1, shard_rows=4):
        rows = [f"c{n},v.mp4,0,{(stops or {}).get(n, 2)},train,{'ab'[n % 2]}" for n in numbers]
        text = "clip_id,video,start_s,stop_s,split,verb\n" + "\n".join(rows) + "\n"
        (tmp_path / f"{name}.csv").write_text(text)
        cache = Cache(tmp_path / name)
        cache.add_clips(read_clip_table(tmp_path / f"{name}.csv", ("verb",)))
        shape, done = (len(numbers), n_views, 3, 4), numbers if done is None else done
        store = open_store(cache, "audio", NAME, IDENTITY, shape, shard_rows)
        asked = np.where(np.isin(numbers, done), cache.row_digests(), "")
        for view in range(n_views):

            def read(at, view=view):
                for n in (numbers[row] for row in at):
                    state = (states or {}).get(n, PRESENT)
                    reason = f"broken in {name}" if state == FAILED else ""
                    yield state, tokens_of(n, view) if state == PRESENT else None, reason

            fill_rows(cache, store, ("audio", NAME, view), asked, read, {"seconds": 1})
        return cache

    return made


def contents(cache: Cache, part: str = "tokens") -> dict[str, bytes]:
    files = (path for path in sorted((cache.path / part).rglob("*")) if path.is_file())
    return {str(path.relative_to(cache.path)): path.read_bytes() for path in files}


def times(cache: Cache) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in cache.path.rglob("*") if path.is_file()}


def store_of(cache: Cache) -> TokenStore:
    return TokenStore.open(cache.tokens_path("audio", NAME))


def state_of(cache: Cache, view: int = 0) -> dict[str, int]:
    found = store_of(cache).state(np.arange(cache.n_clips), view)
    return dict(zip(cache.clip_ids, found.tolist(), strict=True))


def write_logits(cache: Cache, numbers=ALL, teacher: str = TEACHER) -> LogitStore:
    """Write logits [n, 1, 2] that only the clip decides; clip 2 has none."""
    logits = np.array([[[np.cos(n), np.sin(n)]] for n in numbers], np.float32)
    state = np.array([[0 if n == 2 else PRESENT] for n in numbers])
    logits[state == 0] = np.nan
    about = {"teacher": teacher, "run": "far", "classes": {"verb": ["a", "b"]}, "inputs": {}, "tokens": {}}
    return LogitStore.write(cache.logits_path(teacher), {"verb": logits}, state, cache.row_digests(), about)


def flip(file: Path, at: int = 5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("n_views", [1, 2])
def test_two_parts_merged_into_a_third_or_into_one_of_them_are_the_bytes_of_one_clean_run(make, n_views, tmp_path):
    clean = make("clean", n_views=n_views)
    one = make("one", done=(0, 1, 2, 3, 8, 9), n_views=n_views)
    two = make("two", done=(4, 5, 6, 7), n_views=n_views)
    third = Cache(tmp_path / "third")
    assert merge(third, one) == {f"audio/{NAME}": 6 * n_views}
    assert merge(third, two) == {f"audio/{NAME}": 4 * n_views}
    assert merge(two, one) == {f"audio/{NAME}": 6 * n_views}
    for cache in (third, two):
        assert contents(cache) == contents(clean)
        assert list(cache.valid_receipts("audio", NAME, n_views - 1)) == [0, 1, 2]
        assert list(verify(cache)) == []


def test_clips_in_another_order_and_other_shards_are_joined_by_id(make):
    here, other = make("here", (3, 1, 2, 0), done=()), make("other", (0, 9, 1, 3, 2, 5), shard_rows=3)
    assert merge(here, other) == {f"audio/{NAME}": 6}
    assert here.clip_ids == ["c3", "c1", "c2", "c0", "c9", "c5"]
    found = store_of(here).read(np.arange(6), 0)
    assert np.array_equal(found, [tokens_of(n, 0) for n in (3, 1, 2, 0, 9, 5)])
    assert store_of(here).shard_rows == 4
    assert np.array_equal(here.held("audio", NAME, 0), here.row_digests())


def test_clips_with_other_times_are_not_taken_over_and_stay_as_they_are_here(make):
    here = make("here", (0, 1, 2), done=(0, 1))
    before = contents(here), here.sources.copy()
    other = make("other", (0, 1, 2), stops={0: 5, 2: 5})
    assert merge(here, other) == {f"audio/{NAME}": 0}
    assert (contents(here), here.sources) == before
    assert state_of(here) == {"c0": PRESENT, "c1": PRESENT, "c2": 0}


def test_rows_that_are_there_stay_though_the_other_cache_failed_or_has_other_values(make):
    here = make("here")
    before = contents(here)
    assert merge(here, make("other", states=dict.fromkeys(ALL, FAILED))) == {f"audio/{NAME}": 0}
    assert merge(here, make("third", states=dict.fromkeys(ALL, ABSENT))) == {f"audio/{NAME}": 0}
    assert contents(here) == before


def test_failed_row_is_taken_anew_where_the_other_cache_did_not_fail(make):
    here = make("here", states={0: FAILED, 1: FAILED, 2: FAILED})
    taken = merge(here, make("other", states={1: FAILED, 2: ABSENT}))
    assert taken == {f"audio/{NAME}": 2}
    assert [state_of(here)[f"c{n}"] for n in (0, 1, 2)] == [PRESENT, FAILED, ABSENT]
    assert here.failures("audio", NAME, here.clip_ids) == {"c1": "broken in here"}


def test_states_and_reasons_come_along_to_the_clips_new_place(make):
    here = make("here", (7, 8), done=())
    merge(here, make("other", states={8: FAILED, 3: ABSENT}))
    assert state_of(here) == {f"c{n}": {8: FAILED, 3: ABSENT}.get(n, PRESENT) for n in ALL}
    (receipt, *_) = here.valid_receipts("audio", NAME, 0).values()
    assert receipt["failures"] == [{"row": 1, "clip_id": "c8", "reason": "broken in other"}]
    assert receipt["merged_from"].endswith("other")


@pytest.mark.parametrize("kind", ["tokens/c/1/0/0/0", "state/c/1/0"])
def test_damaged_shard_of_the_other_cache_is_refused_and_the_cache_is_intact(make, kind):
    here, other = make("here", done=(0, 1)), make("other")
    before = state_of(here)
    flip(store_of(other).path / kind, 2)
    with pytest.raises(CacheError, match=r"other/.*: shard 1 of view 0 is not what its receipt says"):
        merge(here, other)
    assert list(verify(here)) == []
    assert state_of(here) == before
    assert np.array_equal(store_of(here).read(np.arange(2), 0), [tokens_of(n, 0) for n in (0, 1)])


def test_damaged_shard_here_is_refused_rather_than_published_again(make):
    here = make("here", done=(0, 1))
    flip(store_of(here).path / "tokens/c/0/0/0/0")
    with pytest.raises(CacheError, match=r"here/.*: shard 0 of view 0 is not what its receipt says"):
        merge(here, make("other"))
    assert [damage.shard for damage in verify(here)] == [("audio", NAME, 0, 0)]


def test_second_merge_and_a_merge_with_itself_take_and_write_nothing(make):
    here, other = make("here", (0, 1), states={1: FAILED}), make("other", states={5: FAILED, 6: ABSENT})
    write_logits(other)
    merge(here, other)
    before = times(here)
    for again in (other, here):
        assert set(merge(Cache.open(here.path), again).values()) <= {0}
    assert times(here) == before


def test_other_cache_is_only_read(make, tmp_path):
    other = make("other", (0, 1))
    before = times(other)
    merge(Cache(tmp_path / "here"), other)
    assert times(other) == before


def test_store_that_a_killed_extraction_had_only_begun_hinders_nothing(make):
    here, other = make("here", done=()), make("other")
    begun = {**IDENTITY, "theta": 5}
    other.write_identity("audio", digest(begun), begun)
    assert merge(here, other)[f"audio/{NAME}"] == 10
    assert state_of(here) == dict.fromkeys(here.clip_ids, PRESENT)


def test_logits_come_along_and_are_joined_by_id(make):
    here, other = make("here", (3, 11, 0)), make("other", (0, 1, 2, 3))
    write_logits(other, (0, 1, 2, 3))
    assert merge(here, other)[f"logits/{TEACHER}"] > 0
    assert here.clip_ids == ["c3", "c11", "c0", "c1", "c2"]
    found = LogitStore.open(here.logits_path(TEACHER))
    assert found.has(np.arange(5), 0).tolist() == [True, False, True, True, False]
    assert np.allclose(found.read(np.array([0, 2, 3]), 0)["verb"], [[np.cos(n), np.sin(n)] for n in (3, 0, 1)])
    assert found.is_made_from(np.array([0, 2, 3]), here.row_digests()[[0, 2, 3]]).all()
    assert found.attributes["run"] == "far"
    assert list(verify(here)) == []


def test_logits_of_clips_with_other_times_are_told_from_those_of_this_table(make):
    here, other = make("here", (0, 1)), make("other", (0, 1), stops={1: 5})
    write_logits(other, (0, 1))
    merge(here, other)
    found = LogitStore.open(here.logits_path(TEACHER))
    assert found.is_made_from(np.arange(2), here.row_digests()).tolist() == [True, False]


def test_damaged_logits_are_refused_and_not_given_a_new_checksum(make):
    here, other = make("here"), make("other")
    path = write_logits(other).path
    file = path / "verb/c/0/0/0"
    flip(file, file.stat().st_size // 2)
    with pytest.raises(CacheError, match=TEACHER):
        merge(here, other)
    assert not here.logits_path(TEACHER).exists()
    assert list(verify(here)) == []


def test_logits_of_a_teacher_who_is_known_here_stay(make):
    here, other = make("here", (0, 1)), make("other", (0, 1))
    write_logits(here, (0, 1))
    before = contents(here, "logits")
    write_logits(other, (5, 6))
    merge(here, other)
    assert contents(here, "logits") == before


def test_receipts_of_merged_shards_say_what_a_receipt_has_to(make):
    here = make("here", done=())
    merge(here, make("other"))
    receipt = json.loads((here.receipts("audio", NAME) / "view0/2.json").read_text())
    assert (receipt["first_row"], receipt["counts"]) == (8, {"present": 2})
    assert receipt["rows"] == here.row_digests()[8:].tolist()
