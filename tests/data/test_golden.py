"""Caches of every released format, as they were written then, are read for good.

`python tests/data/test_golden.py` writes the cache of the present format; it is run once, when a format is released.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.config import digest
from karmma.data.drafts import ShardDraft, open_store
from karmma.data.errors import CacheError
from karmma.data.identity import FORMAT
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.plan import ShardTask
from karmma.data.stores import LogitStore, TokenStore
from karmma.data.verify import verify

GOLDEN = Path(__file__).parent / "golden"
CLIPS = [f"clip_{row}" for row in range(5)]
STATE = [PRESENT, ABSENT, PRESENT, FAILED, PRESENT]
IDENTITY = {"modality": "audio", "backbone": {"name": "golden", "weights": "0"}, "precision": "float32", "theta": 2}
LOGITS = np.arange(20, dtype=np.float32).reshape(5, 1, 4) / 3


def values(row: int) -> np.ndarray:
    """Return the tokens [2, 3] of a row."""
    return (np.arange(6).reshape(2, 3) + 10 * row).astype(np.float16) / 4


def write_golden(folder: Path) -> None:
    """Write five clips in shards of two: one absent, one failed; and the logits of a teacher."""
    cache = Cache(folder)
    cache.add_rows(CLIPS, [json.dumps([clip, "a.mp4", 0.0, 1.0, {}]) for clip in CLIPS], ["{}"] * 5)
    identity = {**IDENTITY, "format": FORMAT, "input": {}, "dtype": "float16"}
    name, digests = digest(identity), cache.row_digests()
    store = open_store(cache, "audio", name, identity, (5, 1, 2, 3), 2)
    for shard, first in enumerate(range(0, 5, 2)):
        draft = ShardDraft(cache, store, ShardTask("audio", name, 0, shard, first, tuple(digests[first : first + 2])))
        for at, state in enumerate(STATE[first : first + 2]):
            draft.put(at, state, values(first + at), CLIPS[first + at], "cannot be read" if state == FAILED else "")
        draft.publish({})
    about = {"classes": {"verb": ["a", "b", "c", "d"]}, "run": "teacher-golden", "tokens": {"audio": name}}
    LogitStore.write(cache.logits_path("golden"), {"verb": LOGITS}, np.ones((5, 1)), digests, about)


@pytest.mark.parametrize("folder", sorted(GOLDEN.glob("*")), ids=lambda folder: folder.name)
def test_cache_of_a_released_format_is_read(folder):
    cache = Cache.open(folder)
    assert cache.clip_ids == CLIPS
    ((modality, name), _) = next(iter(cache.all_identities().items()))
    store = TokenStore.open(cache.tokens_path(modality, name))
    found = store.read(np.arange(5), 0)
    assert store.state(np.arange(5), 0).tolist() == STATE
    for row, state in enumerate(STATE):
        assert np.array_equal(found[row], values(row)) if state == PRESENT else np.isnan(found[row]).all()
    assert np.array_equal(LogitStore.open(cache.logits_path("golden")).read(np.arange(5), 0)["verb"], LOGITS[:, 0])
    assert not list(verify(cache))
    assert cache.failures(modality, name, CLIPS) == {"clip_3": "cannot be read"}


def test_there_is_a_golden_cache_of_the_present_format():
    assert (GOLDEN / f"format_{FORMAT}").is_dir()


def test_shards_and_identity_written_now_are_those_of_the_golden_cache(tmp_path):
    write_golden(tmp_path)
    files = [path for path in tmp_path.glob("tokens/*/*/*/c/**/*") if path.is_file()]
    written = {path.relative_to(tmp_path): path.read_bytes() for path in files}
    assert len(written) == 6
    assert written == {path: (GOLDEN / f"format_{FORMAT}" / path).read_bytes() for path in written}


def test_format_of_the_future_is_refused(tmp_path):
    shutil.copytree(GOLDEN / f"format_{FORMAT}", tmp_path / "cache")
    for meta in (tmp_path / "cache").glob("*/**/*.zarr/zarr.json"):
        text = meta.read_text()
        assert f'"format": {FORMAT}' in text
        meta.write_text(text.replace(f'"format": {FORMAT}', f'"format": {FORMAT + 1}'))
    cache = Cache.open(tmp_path / "cache")
    ((modality, name), _) = next(iter(cache.all_identities().items()))
    for store, path in ((TokenStore, cache.tokens_path(modality, name)), (LogitStore, cache.logits_path("golden"))):
        with pytest.raises(CacheError, match=rf"has format {FORMAT + 1}, this version reads up to {FORMAT}\. Install"):
            store.open(path)


if __name__ == "__main__":
    write_golden(GOLDEN / f"format_{FORMAT}")
