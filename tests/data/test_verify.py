"""Verification: whatever changes in a cache, its file and its clips are named, and nothing that is sound is."""

import json
import shutil
from contextlib import suppress
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from karmma.data import verify as module
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.drafts import open_store
from karmma.data.errors import CacheError
from karmma.data.identity import token_identity
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.shards import RECEIPT
from karmma.data.stores import LogitStore, TokenStore
from karmma.data.transfer import fill_rows
from karmma.data.verify import Damage, FirstSight, count_shards, verify

# Ten clips in shards of four, two views of those that train; shard 1 holds c4 to c7.
N_CLIPS, STATES = 10, {1: ABSENT, 5: FAILED}
SECOND_SHARD = ("c4", "c5", "c6", "c7")


def rows_of(view):
    """Return the reader of made-up rows: tokens [3, 4] by a formula, clip 1 absent, clip 5 failed."""

    def read(rows):
        for row in rows.tolist():
            tokens = np.sin(np.arange(12) + 7 * row + 100 * view).reshape(3, 4)
            yield STATES.get(row, PRESENT), tokens if row not in STATES else None, "broken" if row == 5 else ""

    return read


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A cache of made-up tokens and logits."""
    folder = tmp_path_factory.mktemp("sound")
    rows = [f"c{i},v.mp4,{'train' if i < 6 else 'val'},{'ab'[i % 2]}" for i in range(N_CLIPS)]
    (folder / "clips.csv").write_text("clip_id,video,split,verb\n" + "\n".join(rows) + "\n")
    cache, data = Cache(folder / "cache"), DataConfig()
    cache.add_clips(read_clip_table(folder / "clips.csv", ("verb",)))
    identity = token_identity("audio", data, {"name": "made up", "weights": "0" * 16}, 3, "float32")
    name, digests = digest(identity), cache.row_digests()
    store = open_store(cache, "audio", name, identity, (N_CLIPS, 2, 3, 4), 4)
    for view in range(2):
        asked = np.where(np.arange(N_CLIPS) < (N_CLIPS, 6)[view], digests, "")
        fill_rows(cache, store, ("audio", name, view), asked, rows_of(view), {})
    logits = {"verb": np.sin(np.arange(20, dtype=np.float32)).reshape(N_CLIPS, 1, 2)}
    about = {"teacher": "t" * 16, "run": "far", "classes": {"verb": ["a", "b"]}, "inputs": {}, "tokens": {}}
    LogitStore.write(cache.logits_path("t" * 16), logits, np.ones((N_CLIPS, 1)), digests, about)
    return cache.path


@pytest.fixture
def cache(sound, tmp_path):
    """A copy of the cache that a test may spoil."""
    shutil.copytree(sound, tmp_path / "cache")
    return Cache.open(tmp_path / "cache")


def store_of(cache: Cache) -> Path:
    (name,) = cache.identities("audio")
    return cache.tokens_path("audio", name)


def receipt_file(cache: Cache, shard: int = 1) -> Path:
    return cache.receipts("audio", store_of(cache).stem) / "view0" / f"{shard}.json"


def shard_files(cache: Cache, shard: int = 1) -> tuple[Path, Path]:
    """Return the files of tokens and of states of a shard of view 0."""
    return store_of(cache) / f"tokens/c/{shard}/0/0/0", store_of(cache) / f"state/c/{shard}/0"


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0x10
    file.write_bytes(data)


def test_sound_cache_has_no_damage_and_every_shard_is_counted(cache):
    steps = count()
    assert list(verify(cache, lambda: next(steps))) == []
    assert count_shards(cache) == next(steps) == 3 + 2


@pytest.mark.parametrize("kind", [0, 1], ids=["tokens", "state"])
def test_any_flipped_byte_of_a_shard_is_noticed_with_its_file_and_its_clips(cache, kind):
    file = shard_files(cache)[kind]
    for at in range(0, file.stat().st_size, 1 + 4 * (kind == 0)):
        flip(file, at)
        (found,) = verify(cache)
        assert str(file) in str(found), at
        assert found.clips == SECOND_SHARD, at
        assert found.shard == ("audio", store_of(cache).stem, 0, 1)
        flip(file, at)
    assert list(verify(cache)) == []


@pytest.mark.parametrize("kind", [0, 1], ids=["tokens", "state"])
@pytest.mark.parametrize("spoil", ["cut", "emptied", "lengthened", "deleted"])
def test_file_of_another_length_or_none_is_noticed_with_its_clips(cache, kind, spoil):
    file = shard_files(cache)[kind]
    text = file.read_bytes()
    file.write_bytes({"cut": text[:-1], "emptied": b"", "lengthened": text + b"\0", "deleted": b""}[spoil])
    if spoil == "deleted":
        file.unlink()
    (found,) = verify(cache)
    assert str(file) in str(found)
    assert found.clips == SECOND_SHARD


def test_damage_in_a_view_of_training_clips_names_no_others(cache):
    flip(store_of(cache) / "tokens/c/1/1/0/0", 0)
    (found,) = verify(cache)
    assert (found.clips, found.shard[2:]) == (("c4", "c5"), (1, 1))


def test_shards_that_changed_places_are_noticed_with_the_clips_of_both(cache):
    first, second = shard_files(cache, 0)[0], shard_files(cache, 1)[0]
    texts = first.read_bytes(), second.read_bytes()
    first.write_bytes(texts[1])
    second.write_bytes(texts[0])
    assert [found.clips for found in verify(cache)] == [("c0", "c1", "c2", "c3"), SECOND_SHARD]


def test_shard_put_in_the_place_of_another_with_its_states_and_receipt_is_noticed(cache):
    first, second = ((*shard_files(cache, shard), receipt_file(cache, shard)) for shard in (0, 1))
    for source, target in zip(first, second, strict=True):
        shutil.copyfile(source, target)
    (found,) = verify(cache)
    assert found.shard[3] == 1


@pytest.mark.parametrize("text", ["", '{"by', "[]", "5", "null", "{}", '{"rows": 5}'])
def test_damaged_receipt_is_noticed_with_its_clips_and_only_that_shard_counts_as_lost(cache, text):
    receipt_file(cache).write_text(text)
    (found,) = verify(cache)
    assert "1.json" in str(found) or str(shard_files(cache)[0]) in str(found)
    assert found.clips == SECOND_SHARD
    assert found.shard == ("audio", store_of(cache).stem, 0, 1)
    assert list(cache.valid_receipts("audio", store_of(cache).stem, 0)) == [0, 2]


@pytest.mark.parametrize("key", sorted(RECEIPT))
@pytest.mark.parametrize("value", [None, "gone"])
def test_receipt_that_lacks_what_it_must_say_is_damage_and_no_crash(cache, key, value):
    receipt = json.loads(receipt_file(cache).read_text())
    receipt[key] = value
    receipt_file(cache).write_text(json.dumps({k: v for k, v in receipt.items() if (k, v) != (key, "gone")}))
    assert [found.shard[3] for found in verify(cache)] == [1]
    assert 1 not in cache.valid_receipts("audio", store_of(cache).stem, 0)
    assert cache.receipt("audio", store_of(cache).stem, 0, 1) is None


@pytest.mark.parametrize(
    "junk",
    ["notes.txt", "tokens/x", "tokens/audio/.DS_Store", "logits/x.txt", "receipts/tokens/audio/x", "VIEW/notes.json",
     "VIEW/0.json.bak", "VIEW/../viewer/0.json", "VIEW/../view0.old/0.json"],
)  # fmt: skip
def test_files_that_are_not_the_caches_own_are_no_damage(cache, junk):
    file = Path(str(cache.path / junk).replace(str(cache.path / "VIEW"), str(receipt_file(cache).parent)))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("{}")
    assert list(verify(cache)) == []
    assert count_shards(cache) == 5


@pytest.mark.parametrize("spoil", ["changed", "no JSON", "deleted"])
def test_identity_that_is_not_what_its_name_says_is_noticed(cache, spoil):
    file = receipt_file(cache).parent.parent / "identity.json"
    text = file.read_text()
    file.write_text({"changed": text.replace('"theta": 3', '"theta": 4'), "no JSON": text[:-9]}.get(spoil, ""))
    if spoil == "deleted":
        file.unlink()
    assert str(file) in "\n".join(map(str, verify(cache)))


@pytest.mark.parametrize("name", ["zarr.json", "tokens/zarr.json", "state/zarr.json"])
@pytest.mark.parametrize("text", ["{", None])
def test_store_whose_description_is_damaged_is_named_and_others_say_so_in_one_line(cache, name, text):
    file = store_of(cache) / name
    file.unlink() if text is None else file.write_text(text)
    assert str(store_of(cache)) in "\n".join(map(str, verify(cache)))
    with pytest.raises(CacheError, match=store_of(cache).name):
        TokenStore.open(store_of(cache))


@pytest.mark.parametrize("name", ["verb/c/0/0/0", "state/c/0/0", "made_from/c/0"])
def test_any_flipped_byte_of_logits_is_noticed_with_their_clips(cache, name):
    file = cache.logits_path("t" * 16) / name
    for at in range(0, file.stat().st_size, 4):
        flip(file, at)
        found = list(verify(cache))
        assert found, at
        assert str(cache.logits_path("t" * 16)) in str(found[0]), at
        flip(file, at)
    assert list(verify(cache)) == []
    flip(file, file.stat().st_size // 2)
    assert "c0" in next(verify(cache)).clips


@pytest.mark.parametrize("spoil", ["deleted chunk", "deleted array", "no JSON", "other classes"])
def test_logits_that_are_incomplete_or_called_otherwise_are_noticed(cache, spoil):
    path = cache.logits_path("t" * 16)
    if spoil == "deleted chunk":
        (path / "verb/c/0/0/0").unlink()
    elif spoil == "deleted array":
        shutil.rmtree(path / "verb")
    else:
        text = (path / "zarr.json").read_text()
        changed = {"no JSON": text[:-20], "other classes": text.replace('"a"', '"z"')}[spoil]
        assert changed != text
        (path / "zarr.json").write_text(changed)
    assert str(path) in "\n".join(map(str, verify(cache)))


def test_row_order_is_never_read_wrong_whichever_of_its_bytes_is_flipped(cache):
    file, good = cache.path / "clips.parquet", cache.clip_ids
    for at in range(0, file.stat().st_size, 3):
        flip(file, at)
        with suppress(CacheError):
            assert Cache.open(cache.path).clip_ids == good, at
        flip(file, at)
    flip(file, file.stat().st_size // 3)
    with pytest.raises(CacheError, match=r"clips\.parquet"):
        Cache.open(cache.path)


def test_damage_is_one_line_that_names_five_clips_at_most():
    some, many = (Damage(Path("x"), "fails its checksum", tuple(f"c{i}" for i in range(n))) for n in (5, 7))
    assert str(some) == "x: fails its checksum; 5 clips: c0, c1, c2, c3, c4"
    assert str(many) == "x: fails its checksum; 7 clips: c0, c1, c2, c3, c4, ..."


def first_sight(cache, *rows, sound=None):
    """Have the shards of some rows looked at, as a training does before it reads them."""
    check = FirstSight(cache, {"audio": TokenStore.open(store_of(cache))}, sound)
    check("audio", np.array(rows), 0)
    return check


def test_first_sight_refuses_damage_in_the_shards_that_are_read_and_in_no_other(cache, monkeypatch):
    monkeypatch.setattr(module, "LOOK_AGAIN_S", 0.01)
    flip(shard_files(cache)[0], 5)
    with pytest.raises(CacheError, match=r"tokens/c/1/0/0/0: fails its checksum; 4 clips: c4, c5, c6, c7\. Run karmma"):
        first_sight(cache, 1, 6)
    check = first_sight(cache, 0, 3, 9)
    flip(shard_files(cache, 0)[0], 5)
    check("audio", np.array([0]), 0)  # once is enough


def test_first_sight_of_several_trainings_that_share_what_they_saw_looks_once(cache):
    sound = set()
    first_sight(cache, 0, sound=sound)
    flip(shard_files(cache, 0)[0], 5)
    first_sight(cache, 1, sound=sound)


@pytest.mark.parametrize("gone", ["receipt", "tokens"])
def test_first_sight_of_a_shard_that_is_being_made_anew_looks_again(cache, monkeypatch, gone):
    file = receipt_file(cache) if gone == "receipt" else shard_files(cache)[0]
    data = file.read_bytes()
    file.unlink()
    monkeypatch.setattr(module.time, "sleep", lambda seconds: file.write_bytes(data))
    first_sight(cache, 5)
