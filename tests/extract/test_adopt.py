"""Adoption: tokens of an older identity are taken over if what is made now is the same, and refused by a number."""

import shutil

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.drafts import open_store
from karmma.data.errors import CacheError
from karmma.data.identity import PREPROCESSING
from karmma.data.publish import publish_json
from karmma.data.sample import plan_clips
from karmma.data.sample_media import draw_boxes
from karmma.data.stores import TokenStore
from karmma.data.transfer import StoredRows, fill_rows
from karmma.data.verify import verify
from karmma.extract import adopt
from karmma.extract.adopt import adopt_tokens
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.frozen import build_frozen
from karmma.extract.stage import extract_tokens

KIND = "detections"  # the modality that needs no film
CONFIG = ExtractConfig(
    detections=BackboneConfig(name="stlt_micro", weights="none"),
    theta=7, batch_size=3, shard_rows=3, threads=1, readers=1, views=2,
)  # fmt: skip


def write_table(folder, n_clips, stop=1.5):
    """Write clips of the sample without their films: c1 has no boxes, those of c2 are damaged."""
    rows = []
    for number, plan in enumerate(plan_clips(n_clips, seed=0)):
        file = folder / f"boxes/{number}.json"
        if not file.exists():
            publish_json(file, draw_boxes(plan))
        split = "train" if number < 5 else "val"
        rows.append(f"c{number},v.mp4,0,{stop},{split},{plan.verb},{'' if number == 1 else f'boxes/{number}.json'}")
    (folder / "boxes/2.json").write_text("{")
    (folder / "clips.csv").write_text("clip_id,video,start_s,stop_s,split,verb,detections\n" + "\n".join(rows) + "\n")


def settings(folder, **changes) -> DataConfig:
    given = {"table": folder / "clips.csv", "cache": folder / "cache", "heads": ("verb",), "modalities": (KIND,)}
    return DataConfig(**{**given, "frames": 4, "size": 32, "max_boxes": 3, **changes})


@pytest.fixture(scope="module")
def older(tmp_path_factory):
    """A folder of clips and a cache that was extracted when our preprocessing had another version."""
    folder = tmp_path_factory.mktemp("older")
    write_table(folder, 7)
    data = settings(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("karmma.data.identity.PREPROCESSING", 1)
        extract_tokens(read_clip_table(data.table, data.heads), data, CONFIG)
    return folder


@pytest.fixture
def data(older, tmp_path):
    """A copy that a test may change, and the settings of today."""
    shutil.copytree(older, tmp_path, dirs_exist_ok=True)
    return settings(tmp_path)


def take(data, name, config=CONFIG, n_sample=16):
    return adopt_tokens(Cache.open(data.cache), read_clip_table(data.table, data.heads), name, data, config, n_sample)


def older_name(cache: Cache) -> str:
    (name,) = [name for name, fields in cache.identities(KIND).items() if fields["input"]["preprocessing"] == 1]
    return name


def altered(cache: Cache, change) -> str:
    """Add a store of another old identity, its tokens those of the older one after `change`; return its digest."""
    name = older_name(cache)
    identity = cache.identities(KIND)[name]
    identity = {**identity, "input": {**identity["input"], "preprocessing": 0}}
    theirs = TokenStore.open(cache.tokens_path(KIND, name))
    shape = (theirs.n_clips, theirs.n_views, theirs.k, theirs.width)
    store = open_store(cache, KIND, digest(identity), identity, shape, 3)
    for view in range(2):
        rows = StoredRows(cache, KIND, name, view)

        def read(at, rows=rows):
            for row, (state, tokens, reason) in zip(at.tolist(), rows.read(at), strict=True):
                yield state, change(tokens.astype(np.float32), row), reason

        fill_rows(cache, store, (KIND, digest(identity), view), cache.held(KIND, name, view), read, {})
    return digest(identity)


def shards(cache: Cache, name: str) -> dict[str, bytes]:
    folder = cache.tokens_path(KIND, name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.glob("*/c/**/*") if path.is_file()}


def holds_nothing_new(cache: Cache, *old: str) -> bool:
    return not any(cache.n_views(KIND, name) for name in cache.identities(KIND) if name not in old)


def test_older_tokens_are_all_there_under_the_identity_of_today_and_extract_has_nothing_to_do(data):
    cache = Cache.open(data.cache)
    name = older_name(cache)
    before = shards(cache, name)
    found = take(data, name)
    assert found.changes == [f"input.preprocessing is 1, asked for {PREPROCESSING}"]
    assert (found.n_rows, found.name) == (7 + 5, digest(cache.identities(KIND)[found.name]))
    assert found.least_cosine >= 0.9999
    assert shards(cache, found.name) == shards(cache, name) == before
    report = extract_tokens(read_clip_table(data.table, data.heads), data, CONFIG)
    assert (report.n_written, report.stores[KIND].stem) == (0, found.name)
    assert dict(report.counts[KIND]) == {"present": 5 + 3, "absent": 2, "failed": 2}
    assert list(report.failures[KIND]) == ["c2"]
    receipt = cache.receipt(KIND, found.name, 0, 0)
    assert (receipt["adopted_from"], receipt["least_cosine"]) == (name, found.least_cosine)
    assert list(verify(cache)) == []


def test_clips_that_came_later_are_all_that_is_left_to_extract(data, tmp_path):
    write_table(tmp_path, 9)
    found = take(data, older_name(Cache.open(data.cache)), n_sample=2)
    assert (found.n_rows, found.n_sampled) == (12, 2)
    assert extract_tokens(read_clip_table(data.table, data.heads), data, CONFIG).n_written == 2


CHANGES = {
    "one token of one clip": lambda tokens, row: np.concatenate([tokens[1:2], tokens[1:]]) if row == 5 else tokens,
    "twice as large": lambda tokens, row: 2 * tokens,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_tokens_that_are_really_different_are_refused_with_the_cosine(data, change):
    cache = Cache.open(data.cache)
    name = altered(cache, change)
    with pytest.raises(CacheError, match=rf"{name} are not what is made now: .*cosine\D*\d\.\d+.*preprocessing is 0"):
        take(data, name)
    assert holds_nothing_new(cache, name, older_name(cache))
    assert list(verify(cache)) == []


def test_views_that_are_drawn_otherwise_now_are_refused_though_the_clean_view_is_the_same(data):
    cache = Cache.open(data.cache)
    with pytest.raises(CacheError, match=r"not what is made now: .*view_seed is 0, asked for 5"):
        take(settings(data.table.parent, view_seed=5), older_name(cache))
    assert holds_nothing_new(cache, older_name(cache))


def test_tokens_that_are_not_finite_now_agree_with_nothing(data, monkeypatch):
    def spoiled(*args):
        backbone = build_frozen(*args)
        next(backbone.parameters()).data.fill_(np.nan)
        build_frozen.cache_clear()
        return backbone

    monkeypatch.setattr(adopt, "build_frozen", spoiled)
    with pytest.raises(CacheError, match="not what is made now"):
        take(data, older_name(Cache.open(data.cache)))


def test_clip_that_cannot_be_read_any_more_is_named_in_one_line(data, tmp_path):
    (tmp_path / "boxes/0.json").unlink()
    with pytest.raises(CacheError, match=r"boxes/0\.json") as raised:
        take(data, older_name(Cache.open(data.cache)))
    assert len(str(raised.value).splitlines()) == 1


def test_unknown_digest_is_refused_with_the_nearest(data):
    name = older_name(Cache.open(data.cache))
    with pytest.raises(CacheError, match=rf"no tokens '{name[:-1]}'. Did you mean '{name}'\?"):
        take(data, name[:-1])


def test_tokens_that_have_the_identity_of_today_are_not_adopted(data, monkeypatch):
    monkeypatch.setattr("karmma.data.identity.PREPROCESSING", 1)
    with pytest.raises(CacheError, match="have the identity asked for already"):
        take(data, older_name(Cache.open(data.cache)))


def test_tokens_of_another_shape_are_refused_with_what_differs(data):
    with pytest.raises(CacheError, match=r"another shape .*theta is 7, asked for 3"):
        take(data, older_name(Cache.open(data.cache)), CONFIG.model_copy(update={"theta": 3}))


def test_store_without_any_clip_as_the_table_has_it_is_refused(data, tmp_path):
    write_table(tmp_path, 7, stop=1.0)
    with pytest.raises(CacheError, match=r"holds no clip of .*clips\.csv to compare with"):
        take(data, older_name(Cache.open(data.cache)))


def test_damaged_shard_is_not_adopted(data):
    cache = Cache.open(data.cache)
    name = older_name(cache)
    file = cache.tokens_path(KIND, name) / "tokens/c/1/0/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    with pytest.raises(CacheError, match="shard 1 of view 0 is not what its receipt says"):
        take(data, name)
    assert holds_nothing_new(cache, name)
