"""HDF5: what is exported comes back the same, and what others have written is taken in or refused in one line."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.drafts import open_store
from karmma.data.errors import CacheError
from karmma.data.exchange import export_tokens, import_logits, import_tokens
from karmma.data.foreign import open_foreign
from karmma.data.identity import token_identity
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.selection import n_missing
from karmma.data.stores import LogitStore, TokenStore
from karmma.data.transfer import fill_rows
from karmma.data.verify import verify

IDS = [f"c{n}" for n in range(6)]
CLASSES = {"verb": ["a", "b"], "noun": ["x", "y", "z"]}
IDENTITY = token_identity("audio", DataConfig(), {"name": "made up", "weights": "0" * 16}, 3, "float32")
NAME, TEACHER = digest(IDENTITY), "t" * 16


def numbers(*shape, start=0.0):
    return np.sin(np.arange(np.prod(shape)) + start).reshape(shape)


def read_table(folder, stop=2):
    rows = [f"c{n},v.mp4,0,{stop},train,{'ab'[n % 2]},{'xyz'[n % 3]}" for n in range(6)]
    (folder / "clips.csv").write_text("clip_id,video,start_s,stop_s,split,verb,noun\n" + "\n".join(rows) + "\n")
    return read_clip_table(folder / "clips.csv", tuple(CLASSES))


@pytest.fixture
def table(tmp_path):
    return read_table(tmp_path)


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Two views of six clips in shards of four: c1 absent, c3 failed, c5 not in view 1; logits of all but c4."""
    folder = tmp_path_factory.mktemp("filled")
    cache = Cache(folder / "cache")
    cache.add_clips(read_table(folder))
    store, states = open_store(cache, "audio", NAME, IDENTITY, (6, 2, 3, 4), 4), {1: ABSENT, 3: FAILED}
    for view in range(2):

        def read(rows, view=view):
            for n in rows.tolist():
                tokens = numbers(3, 4, start=7 * n + 100 * view) if n not in states else None
                yield states.get(n, PRESENT), tokens, "broken" if n == 3 else ""

        asked = np.where(np.arange(6) < 6 - view, cache.row_digests(), "")
        fill_rows(cache, store, ("audio", NAME, view), asked, read, {})
    state = np.where(np.arange(6) == 4, 0, PRESENT)[:, None]
    shapes = {head: (6, 1, len(names)) for head, names in CLASSES.items()}
    logits = {head: np.where(state[..., None], numbers(*n), np.nan).astype(np.float32) for head, n in shapes.items()}
    about = {"teacher": TEACHER, "run": "teacher-1", "classes": CLASSES, "inputs": {}, "tokens": {"audio": NAME}}
    LogitStore.write(cache.logits_path(TEACHER), logits, state, cache.row_digests(), about)
    return cache.path


@pytest.fixture
def cache(filled, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(filled, tmp_path / "cache")
    return Cache.open(tmp_path / "cache")


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a file as anybody may: datasets by path, '/' written as '__'."""

    def written(ids=IDS, **datasets):
        path = tmp_path / "foreign.h5"
        with h5py.File(path, "w") as file:
            file.create_dataset("clip_id", data=ids, dtype=h5py.string_dtype())
            for name, values in datasets.items():
                texts = isinstance(values, list)
                file.create_dataset(name.replace("__", "/"), data=values, dtype=h5py.string_dtype() if texts else None)
        return path

    return written


def take(path: Path, folder: Path, table) -> Cache:
    """Import all of a file into the cache in `folder`."""
    cache = Cache(folder)
    with open_foreign(path, table) as foreign:
        for modality in foreign.modalities:
            import_tokens(cache, foreign, modality, 4)
        if foreign.has_logits:
            import_logits(cache, foreign, "far")
    return Cache.open(folder)


def contents(cache: Cache) -> dict[str, bytes]:
    files = (path for part in ("tokens", "logits") for path in sorted((cache.path / part).rglob("*")))
    return {str(path.relative_to(cache.path)): path.read_bytes() for path in files if path.is_file()}


def only_store(cache: Cache, modality: str = "video") -> TokenStore:
    (name,) = cache.identities(modality)
    return TokenStore.open(cache.tokens_path(modality, name))


def test_what_is_exported_comes_back_with_its_identity_and_its_bytes(cache, table, tmp_path):
    assert export_tokens(cache, {"audio": NAME}, TEACHER, tmp_path / "x.h5") == 6
    other = take(tmp_path / "x.h5", tmp_path / "other", table)
    assert other.identities("audio") == {NAME: IDENTITY}
    assert contents(other) == contents(cache)
    for view in range(2):
        assert np.array_equal(other.held("audio", NAME, view), cache.held("audio", NAME, view))
    assert list(other.failures("audio", NAME, IDS)) == ["c3"]
    assert list(verify(other)) == []


def test_exported_file_is_as_documented_to_plain_h5py(cache, tmp_path):
    export_tokens(cache, {"audio": NAME}, TEACHER, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert [text.decode() for text in file["clip_id"]] == IDS
        assert file["state/audio"][:].T.tolist() == [[1, 2, 1, 3, 1, 1], [1, 2, 1, 3, 1, 0]]
        assert np.isnan(file["tokens/audio"][:, 0]).all(axis=(1, 2)).tolist() == [n in (1, 3) for n in range(6)]
        assert np.allclose(file["tokens/audio"][2, 1], numbers(3, 4, start=114), atol=1e-3)
        assert [text.decode() for text in file["classes/noun"]] == ["x", "y", "z"]
        assert np.isnan(file["logits/verb"][4]).all()


def test_import_fills_only_what_the_cache_lacks_and_a_second_one_changes_nothing(cache, table, tmp_path):
    export_tokens(cache, {"audio": NAME}, None, tmp_path / "x.h5")
    before = contents(cache)
    cache.drop_receipt("audio", NAME, 0, 1)
    take(tmp_path / "x.h5", cache.path, table)
    assert contents(cache) == before
    assert cache.failures("audio", NAME, IDS) == {"c3": "broken"}
    receipts = list(cache.valid_receipts("audio", NAME, 0).values())
    take(tmp_path / "x.h5", cache.path, table)
    assert list(cache.valid_receipts("audio", NAME, 0).values()) == receipts


def test_rows_made_from_other_times_than_the_table_now_has_are_not_exported_as_current(cache, tmp_path):
    later = read_table(tmp_path, stop=3)
    cache.add_clips(later)  # as extracting another modality does
    assert n_missing(cache, later, "audio", NAME) == 6
    export_tokens(cache, {"audio": NAME}, TEACHER, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5") as file:
        assert not (file["state/audio"][:] == PRESENT).any()
        assert np.isnan(file["logits/verb"][:]).all()


@pytest.mark.parametrize("kind", ["damaged", "only begun"])
def test_store_that_is_damaged_or_empty_is_not_exported_and_no_file_is_left(cache, tmp_path, kind):
    file = cache.tokens_path("audio", NAME) / "tokens/c/0/0/0/0"
    file.write_bytes(file.read_bytes()[::-1])
    for view in range(2 * (kind == "only begun")):
        shutil.rmtree(cache.receipts("audio", NAME) / f"view{view}")
    with pytest.raises(CacheError, match=NAME):
        export_tokens(cache, {"audio": NAME}, None, tmp_path / "x.h5")
    assert [path.name for path in tmp_path.iterdir() if "x.h5" in path.name] == []


@pytest.mark.parametrize("part", ["tokens/audio", "state/audio", "clip_id", "identity"])
def test_exported_file_that_was_changed_is_not_taken_for_the_original(cache, table, tmp_path, part):
    export_tokens(cache, {"audio": NAME}, None, tmp_path / "x.h5")
    with h5py.File(tmp_path / "x.h5", "a") as file:
        about = file["tokens/audio"].attrs
        if part == "identity":
            about["identity"] = about["identity"].replace('"theta": 3', '"theta": 4')
        else:
            file[part][...] = file[part][:][::-1]
    with pytest.raises(CacheError, match=r"x\.h5.* checksum"):
        take(tmp_path / "x.h5", tmp_path / "other", table)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", ">f4"])
@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 2, 3, 4)], ids=len)
def test_features_of_every_shape_and_float_become_tokens(write, table, tmp_path, kind, shape):
    values = numbers(*shape)
    values[2] = np.nan
    other = take(write(tokens__video=values.astype(kind)), tmp_path / "other", table)
    store, rows = only_store(other), np.arange(6)
    whole = values.reshape(store.tokens.shape)
    assert store.tokens.shape == (6, *(1, 1, *shape[1:])[-3:])
    for view in range(store.n_views):
        assert store.state(rows, view).tolist() == [1, 1, 2, 1, 1, 1]
        assert np.allclose(store.read(rows, view), whole[:, view], atol=1e-3, equal_nan=True)
    assert n_missing(other, table, "video", store.path.stem) == 0


def test_clips_are_joined_by_id_and_unknown_ones_left_out(write, table, tmp_path):
    path = write(["c5", "stranger", "c0", "c3"], tokens__video=numbers(4, 8), state__video=np.array([1, 1, 1, 3]))
    store = only_store(take(path, tmp_path / "other", table))
    assert store.state(np.arange(6), 0).tolist() == [1, 0, 0, 3, 0, 1]
    assert np.allclose(store.read(np.array([5, 0]), 0)[:, 0], numbers(4, 8)[::2], atol=1e-3)


def test_values_that_float16_cannot_hold_and_half_a_row_of_nan_fail_with_the_clips_name(write, table, tmp_path):
    values = numbers(6, 8)
    values[1, 2], values[4, 3], values[5, 0] = 1e6, np.nan, np.inf
    other = take(write(tokens__video=values), tmp_path / "other", table)
    reasons = other.failures("video", only_store(other).path.stem, IDS)
    assert (list(reasons), "float16 cannot hold" in reasons["c1"]) == (["c1", "c4", "c5"], True)


@pytest.mark.parametrize("change", ["ids", "state"])
def test_corrected_file_with_the_same_values_is_not_taken_for_the_wrong_one(write, table, tmp_path, change):
    values, state = numbers(6, 8), np.ones(6, np.uint8)
    wrong = take(write(tokens__video=values, state__video=state), tmp_path / "other", table)
    first = set(wrong.identities("video"))
    state = np.array([2, 1, 1, 1, 1, 1]) if change == "state" else state
    ids = IDS[::-1] if change == "ids" else IDS
    right = take(write(ids, tokens__video=values, state__video=state), tmp_path / "other", table)
    (name,) = set(right.identities("video")) - first
    store = TokenStore.open(right.tokens_path("video", name))
    assert store.state(np.arange(6), 0).tolist() == state.tolist()
    assert np.allclose(store.read(np.array([5]), 0)[0, 0], values[ids.index("c5")], atol=1e-3)


GOOD, LOGITS = numbers(6, 8), {"logits__verb": numbers(6, 2), "logits__noun": numbers(6, 3)}
# Datasets of files that are of another form, and what the one line has to name.
REFUSED = [
    ({"tokens__video": np.ones((6, 8), int)}, "tokens/video is int64"),
    ({"tokens__video": numbers(5, 8)}, r"tokens/video is float64 \[5, 8\]"),
    *(({"tokens__video": numbers(6, *n)}, "tokens/video") for n in ((), (1, 1, 1, 2), (0,), (0, 8), (0, 3, 8))),
    ({"tokens__video__x": GOOD}, "tokens/video"),
    ({"tokens__rgb": GOOD}, "rgb"),
    ({"tokens": GOOD}, "tokens"),
    ({"other": GOOD}, "neither tokens nor logits"),
    ({"ids": [*IDS[:5], "c0"], "tokens__video": GOOD}, "1 clip"),
    ({"ids": list("uvwxyz"), "tokens__video": GOOD}, r"none of its 6 clips is in .*clips\.csv"),
    *(({"tokens__video": GOOD, "state__video": np.ones(n)}, "state/video") for n in (5, (6, 2), (6, 1, 1))),
    ({"tokens__video": GOOD, "state__video": np.full(6, 7)}, "state/video"),
    ({**LOGITS, "logits__verb": numbers(6, 3)}, "logits/verb"),
    ({**LOGITS, "logits__verb": numbers(5, 2)}, "logits/verb"),
    ({**LOGITS, "logits__noun": numbers(6, 2, 3)}, "logits/"),
    ({**LOGITS, "logits__noun": np.where(numbers(6, 3) > 0.9, np.inf, 0)}, "noun"),
    ({**LOGITS, "logits__noun": numbers(6, 3) * 1e60}, "noun"),
    ({"logits__verb": numbers(6, 2)}, "noun"),
    ({**LOGITS, "logits__verb": list("abcdef")}, "verb"),
    ({**LOGITS, "classes__verb": ["a", "c"]}, "no logits of the verb 'b'"),
    ({**LOGITS, "classes__verb": ["a", "b", "c"]}, "logits/verb"),
    ({name: values * np.nan for name, values in LOGITS.items()}, "logits"),
]


@pytest.mark.parametrize(("datasets", "said"), REFUSED, ids=[said for _, said in REFUSED])
def test_file_of_another_form_is_refused_in_one_line_and_leaves_no_store(write, table, tmp_path, datasets, said):
    with pytest.raises(CacheError, match=said) as raised:
        take(write(**datasets), tmp_path / "other", table)
    assert str(raised.value).count("\n") == str(raised.value).count("cannot be read as HDF5") == 0
    assert "foreign.h5" in str(raised.value)
    assert not list((tmp_path / "other").glob("*/**/*.zarr"))


@pytest.mark.parametrize("kind", ["cut", "no HDF5", "missing", "soft link", "external link", "external data"])
def test_file_that_is_damaged_or_leads_elsewhere_is_refused(write, table, tmp_path, kind):
    path = write(tokens__audio=numbers(6, 800))
    links = {"soft link": h5py.SoftLink("/tokens/audio"), "external link": h5py.ExternalLink("o.h5", "/tokens/audio")}
    with h5py.File(path, "a") as file:
        if kind in links:
            file["tokens/video"] = links[kind]
        elif kind == "external data":
            file.create_dataset("tokens/video", (6, 8), "f4", external=[(str(tmp_path / "clips.csv"), 0, 192)])
    if kind in ("cut", "no HDF5"):
        path.write_bytes(path.read_bytes()[:9000] if kind == "cut" else b"tokens")
    elif kind == "missing":
        path.unlink()
    with pytest.raises(CacheError, match=r"foreign\.h5") as raised:
        take(path, tmp_path / "other", table)
    assert "\n" not in str(raised.value)


def test_logits_are_put_into_the_tables_order_of_clips_and_classes(write, table, tmp_path):
    verb, noun = numbers(7, 3), numbers(7, 3, start=50)
    noun[1] = np.nan
    names = {"classes__verb": ["spin", "b", "a"], "classes__noun": ["z", "x", "y"]}
    path = write(["c9", *IDS[::-1]], logits__verb=verb, logits__noun=noun, **names)
    other = take(path, tmp_path / "other", table)
    (path,) = (other.path / "logits").glob("*.zarr")
    store, rows = LogitStore.open(path), np.arange(5)
    assert store.has(np.arange(6), 0).tolist() == [True] * 5 + [False]
    assert np.allclose(store.read(rows, 0)["verb"], verb[6:1:-1, [2, 1]])
    assert np.allclose(store.read(rows, 0)["noun"], noun[6:1:-1, [1, 2, 0]])
    assert (store.attributes["run"], store.attributes["classes"]) == ("far", CLASSES)
    assert store.is_made_from(rows, other.row_digests()[rows]).all()


@pytest.mark.parametrize("about", ["[]", "{", '{"teacher": "../../x"}', '{"teacher": "TMP/x"}', '{"teacher": 5}'])
def test_logits_that_claim_another_place_are_refused_and_it_is_not_touched(write, table, tmp_path, about):
    path = write(**LOGITS)
    (tmp_path / "x.zarr").mkdir()
    with h5py.File(path, "a") as file:
        file["logits"].attrs["about"] = about.replace("TMP", str(tmp_path))
    with pytest.raises(CacheError, match=r"foreign\.h5"):
        take(path, tmp_path / "other", table)
    assert list((tmp_path / "x.zarr").iterdir()) == []
