"""Caches and media in an object store: a real S3 server on loopback, and what lies there is what lies on a disk."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr
from karmma.data.batches import TokenReader
from karmma.data.clips import read_clips
from karmma.data.config import DataConfig
from karmma.data.errors import CacheError, ConfigError, InstallationError, MediaError
from karmma.data.leases import Leases
from karmma.data.modality import ABSENT, PRESENT
from karmma.data.packs import split_pack
from karmma.data.places import StoredFile, exists, is_folder, is_local, names, place, sizes, under
from karmma.data.publish import create, publish, publish_folder, read_json_files, remove
from karmma.data.raw import read_clip
from karmma.data.sample import write_sample
from karmma.data.stores import TokenStore
from karmma.data.views import draw_view


@pytest.fixture
def requests_of(monkeypatch):
    """Return a list that every request to the store is written to, as the name of its operation."""
    import s3fs

    asked: list[str] = []
    call = s3fs.S3FileSystem._call_s3

    async def noted(self, method, *args, **options):
        asked.append(method)
        return await call(self, method, *args, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", noted)
    return asked


def test_place_tells_folders_from_addresses(bucket):
    assert is_local(place("some/folder"))
    assert not is_local(place(f"{bucket}/x"))
    assert str(under(Path("/data"), f"{bucket}/a.mp4")) == f"{bucket}/a.mp4"
    assert under(Path("/data"), "a.mp4") == Path("/data/a.mp4")
    with pytest.raises(ConfigError, match=r"nonsense://x: .*Use a folder, s3:// or gs://"):
        place("nonsense://x")


def test_protocol_whose_package_is_missing_says_what_to_install():
    with pytest.raises(InstallationError, match=r"pip install 'karmma\[gs\]'"):
        place("gs://bucket/cache")


def test_file_is_published_by_one_put_however_large(bucket, requests_of):
    publish(place(f"{bucket}/large"), bytes(110 * 2**20))
    assert requests_of.count("put_object") == 1
    assert not [name for name in requests_of if "multipart" in name or name == "upload_part"]
    assert sizes(place(bucket))["large"] == 110 * 2**20


def test_of_many_who_create_a_file_one_succeeds(bucket):
    file = place(f"{bucket}/leases/one")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: create(file, str(number).encode()), range(8)))
    assert won.count(True) == 1
    assert file.read_bytes() == str(won.index(True)).encode()


def test_folder_appears_with_its_mark_last_and_goes_as_a_whole(bucket, requests_of):
    written: list[str] = []

    def fill(folder: Path) -> None:
        for name in ("zarr.json", "tokens/zarr.json", "a"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)

    store = place(f"{bucket}/x.zarr")
    send = store.fs.pipe_file
    store.fs.pipe_file = lambda path, *args, **options: (written.append(path), send(path, *args, **options))
    try:
        publish_folder(store, fill)
    finally:
        del store.fs.pipe_file
    assert written[-1].endswith("x.zarr/zarr.json")
    assert set(sizes(store)) == {"zarr.json", "tokens/zarr.json", "a"}
    assert read_json_files(store / "none") == {}
    remove(store)
    assert not store.exists()
    remove(store)


def test_lease_has_one_owner_and_a_dead_one_is_taken_over(bucket):
    folder = place(f"{bucket}/leases")
    with Leases(folder, beat_s=0.1, lease_s=0.8) as first, Leases(folder, beat_s=0.1, lease_s=0.8) as second:
        assert first.take("shard")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:  # its number moves
            assert not second.take("shard")
            time.sleep(0.1)
        first._closing.set()  # as if it had died
        first._heart.join()
        until = time.monotonic() + 10
        while not second.take("shard"):
            assert time.monotonic() < until
            time.sleep(0.1)
        assert second.is_held("shard")
        assert not first.is_held("shard")
        first.give_back("shard")
        assert second.is_held("shard")
    assert names(folder) == []


@pytest.fixture
def tokens(bucket, tmp_path):
    """The same ten clips in shards of four on a disk and in the store; clip 1 absent."""
    values = np.random.default_rng(0).standard_normal((10, 5, 8)).astype(np.float16)
    values[1] = np.nan
    stores = []
    for path in (tmp_path / "x.zarr", place(f"{bucket}/cache/x.zarr")):
        store = TokenStore.create(path, (10, 1, 5, 8), 4, {"identity": {"theta": 5}})
        for shard in range(3):
            part = values[4 * shard : 4 * shard + 4]
            store.write_shard(shard, 0, part, np.where(np.isnan(part[:, 0, 0]), ABSENT, PRESENT).astype(np.uint8))
        stores.append(TokenStore.open(path))
    return stores


def test_tokens_in_the_store_are_those_on_disk(tokens, requests_of):
    here, there = tokens
    rows = np.array([7, 1, 0, 9, 4])
    assert np.array_equal(there.read(rows, 0), here.read(rows, 0), equal_nan=True)
    group = zarr.open_group(str(there.path), mode="r", storage_options=dict(there.path.storage_options))
    assert np.array_equal(group["tokens"][:], here.tokens[:], equal_nan=True)
    requests_of.clear()
    there.read_written(rows, 0)
    # Four clips, the absent one is not asked for; then the three indices again: nobody has made a shard anew meanwhile.
    assert requests_of == ["get_object"] * 7
    plan = [np.array([3, 2]), np.array([8])]
    for one, other in zip(*(TokenReader({"audio": s}, np.arange(10)).batches(plan, 0) for s in tokens), strict=True):
        assert np.array_equal(one.tokens["audio"].numpy(), other.tokens["audio"].numpy())


def test_damage_in_the_store_is_named(tokens):
    _, there = tokens
    shard = there.path / "tokens/c/0/0/0/0"
    whole = shard.read_bytes()
    publish(shard, whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CacheError, match=r"x.zarr/tokens/c/0/0/0/0: its index fails the checksum"):
        TokenStore.open(there.path).read(np.array([0]), 0)
    shard.unlink()
    with pytest.raises(CacheError, match="this shard is missing"):
        TokenStore.open(there.path).read(np.array([0]), 0)


def test_store_that_does_not_answer_is_one_line(monkeypatch):
    where = place("s3://bucket/cache")
    from upath import UPath

    # Nobody listens there; and the second asked for is a second too long.
    options = {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 1}, "key": "k", "secret": "s"}
    silent = UPath(str(where), endpoint_url="http://127.0.0.1:9", skip_instance_cache=True, **options)
    with pytest.raises(CacheError, match=r"cache/file: cannot be written: .*127.0.0.1:9"):
        publish(silent / "file", b"x")
    with pytest.raises(MediaError, match=r"cache/clip.mp4: cannot be opened: .*Give the command again"):
        StoredFile(silent / "clip.mp4")


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Two clips with sound and boxes, and their sources in every form that a table may name."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=4)
    frames = folder / "frames"
    frames.mkdir()
    import av

    with av.open(str(folder / "videos/clip_0000.mp4")) as film, h5py.File(folder / "pack.h5", "w") as pack:
        for number, frame in enumerate(film.decode(video=0), 1):
            frame.to_image().save(frames / f"frame_{number:06d}.jpg")
        jpegs = [np.frombuffer(path.read_bytes(), np.uint8) for path in sorted(frames.iterdir())]
        pictures = pack.create_dataset("frames", len(jpegs), h5py.vlen_dtype(np.uint8))
        for at, jpeg in enumerate(jpegs):
            pictures[at] = jpeg
        sound = pack.create_dataset("sound", data=np.sin(np.arange(32000) / 20).astype(np.float32))
        sound.attrs["sample_rate"] = 16000
    return folder


def uploaded(folder: Path, address: str) -> str:
    """Copy a folder into the store."""
    target = place(address)
    target.fs.put(f"{folder}/", target.path, recursive=True)
    return address


def test_media_of_every_kind_are_read_from_the_store_as_from_a_disk(sample, bucket, tmp_path):
    boxes = sorted(path.relative_to(sample) for path in (sample / "boxes").iterdir())[0]
    rows = [
        "clip_id,video,start_s,stop_s,split,verb,audio,detections,video_fps",
        f"film,videos/clip_0000.mp4,0,1.2,train,a,videos/clip_0000.mp4,{boxes},",
        f"folder,frames,0,1.2,train,a,pack.h5::sound,{boxes},24",
        f"pack,pack.h5::frames,0,1.2,train,a,,{boxes},24",
        f"star,vid*/clip_0000.mp4,0,1.2,train,a,videos/clip_0001.mp4,{boxes},",
        "gone,videos/none.mp4,0,1.2,train,a,none.wav,none.json,",
    ]
    (tmp_path / "clips.csv").write_text("\n".join(rows) + "\n")
    kinds = ("video", "flow", "audio", "detections")
    settings = {"table": tmp_path / "clips.csv", "heads": ("verb",), "frames": 4, "size": 32, "modalities": kinds}
    here = DataConfig(**settings, media=sample)
    there = DataConfig(**settings, media=uploaded(sample, f"{bucket}/clips"))
    tables = read_clips(here), read_clips(there)
    for row, clip_id in enumerate(tables[0].clip_ids):
        view = draw_view(str(clip_id), 1, here)
        one, other = (read_clip(table.clip(row), view, kinds, here) for table in tables)
        for kind in kinds:
            assert other[kind].state == one[kind].state, (clip_id, kind, one[kind].reason, other[kind].reason)
            assert np.array_equal(other[kind].array, one[kind].array)
    assert other["video"].reason == one["video"].reason.replace(str(sample), f"{bucket}/clips")


def test_stored_file_reads_no_more_than_it_must(bucket, requests_of):
    publish(place(f"{bucket}/film"), bytes(8 * 2**20))
    with StoredFile(place(f"{bucket}/film")) as file:
        assert file.seek(-5, 2) == 8 * 2**20 - 5
        assert file.read() == bytes(5)
        file.seek(0)
        file.read(1000)
        file.read(1000)
    assert requests_of.count("get_object") == 2


def test_pack_in_the_store_keeps_the_name_within_it(bucket):
    file, name = split_pack(place(bucket) / "packs/rgb.h5::P01/P01_06")
    assert (str(file), name) == (f"{bucket}/packs/rgb.h5", "P01/P01_06")
    assert not exists(file)
    assert not is_folder(file)


def test_shard_made_anew_between_two_readings_never_gives_another_clips_tokens(tokens):
    """An absent clip takes no room in a shard: once it is there, every other one lies elsewhere."""
    whole = np.arange(160, dtype=np.float16).reshape(4, 5, 8)
    for store in tokens:
        before = store.read(np.array([3]), 0)
        store.write_shard(0, 0, whole, np.full(4, PRESENT, np.uint8))
        if store is tokens[0]:  # an open file is still the one that it was; one that is opened anew is the new one
            assert np.array_equal(store.read(np.array([3]), 0), before)
            store._files._open.clear()
        else:
            with pytest.raises(CacheError, match="was made anew while it was read"):
                store.read(np.array([3]), 0)
        assert np.array_equal(store.read(np.array([3]), 0)[0], whole[3])
