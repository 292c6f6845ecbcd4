"""Logits that come back to where they came from: none is lost, and none is taken that was changed on the way."""

import h5py
import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.errors import CacheError
from karmma.data.exchange import export_tokens, import_logits
from karmma.data.foreign import open_foreign
from karmma.data.stores import LogitStore

TEACHER = "0123456789abcdef"
VALUES = np.random.default_rng(0).standard_normal((4, 1, 2)).astype(np.float32)


def table_of(path, n):
    rows = [f"c{row},a.mp4,{row},{row + 1},train,{'ab'[row % 2]}" for row in range(n)]
    path.write_text("\n".join(["clip_id,video,start_s,stop_s,split,verb", *rows]) + "\n")
    return read_clip_table(path, ("verb",))


@pytest.fixture
def cache(tmp_path):
    """A teacher's logits of four clips, and the file that they were exported to."""
    cache = Cache(tmp_path / "cache")
    cache.add_clips(table_of(tmp_path / "all.csv", 4))
    about = {"classes": {"verb": ["a", "b"]}, "run": "teacher-x", "tokens": {}, "inputs": {}, "teacher": TEACHER}
    LogitStore.write(cache.logits_path(TEACHER), {"verb": VALUES}, np.ones((4, 1)), cache.row_digests(), about)
    export_tokens(cache, {}, TEACHER, tmp_path / "x.h5")
    return cache


def test_logits_come_back_as_they_were(cache, tmp_path):
    with open_foreign(tmp_path / "x.h5", read_clip_table(tmp_path / "all.csv", ("verb",))) as foreign:
        assert import_logits(cache, foreign, "x") == (TEACHER, 4)
    assert np.array_equal(LogitStore.open(cache.logits_path(TEACHER)).values("verb"), VALUES)


def test_table_of_some_clips_does_not_take_the_logits_of_the_others_away(cache, tmp_path):
    with (
        open_foreign(tmp_path / "x.h5", table_of(tmp_path / "some.csv", 2)) as foreign,
        pytest.raises(CacheError, match=r"has logits of 2 \(clip, view\) that the file does not have, such as c2"),
    ):
        import_logits(cache, foreign, "x")
    assert np.array_equal(LogitStore.open(cache.logits_path(TEACHER)).values("verb"), VALUES)


@pytest.mark.parametrize("part", ["logits/verb", "clip_id", "classes/verb"])
def test_logits_that_were_changed_are_not_the_teachers(cache, tmp_path, part):
    with h5py.File(tmp_path / "x.h5", "r+") as file:
        file[part][...] = file[part][:][::-1]
    with (
        open_foreign(tmp_path / "x.h5", read_clip_table(tmp_path / "all.csv", ("verb",))) as foreign,
        pytest.raises(CacheError, match="its logits fail their checksum"),
    ):
        import_logits(Cache(tmp_path / "other"), foreign, "x")
