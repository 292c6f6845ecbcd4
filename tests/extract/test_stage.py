"""The extraction stage: nothing twice, rows appended, failures named, other settings beside the old ones."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig, digest
from karmma.data.errors import CacheError
from karmma.data.publish import MACHINE
from karmma.data.raw import read_clip
from karmma.data.sample import write_sample
from karmma.data.stores import TokenStore
from karmma.data.theta import theta_average
from karmma.data.views import draw_view
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.frozen import build_frozen
from karmma.extract.stage import extract_tokens

MICRO = {
    "video": BackboneConfig(name="swin3d_micro", weights="none"),
    "flow": BackboneConfig(name="swin3d_micro", weights="none"),
    "audio": BackboneConfig(name="ast_micro", weights="none"),
    "detections": BackboneConfig(name="stlt_micro", weights="none"),
}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=24)
    return folder


@pytest.fixture
def table(sample, tmp_path):
    """The first 8 clips of the sample, in a table that tests may change."""
    lines = (sample / "clips.csv").read_text().splitlines()
    (tmp_path / "videos").symlink_to(sample / "videos")
    (tmp_path / "boxes").symlink_to(sample / "boxes")
    (tmp_path / "clips.csv").write_text("\n".join(lines[:9]) + "\n")
    (tmp_path / "all.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "clips.csv"


@pytest.fixture
def data(tmp_path):
    """Audio and detections: the two that are quick."""
    return DataConfig(
        cache=tmp_path / "cache", heads=("verb",), modalities=("audio", "detections"), frames=4, size=32, max_boxes=3,
        audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip


CONFIG = ExtractConfig(**MICRO, theta=7, batch_size=3, shard_rows=6, threads=1, readers=1)


def extract(path: Path, data: DataConfig, **changes):
    return extract_tokens(read_clip_table(path, data.heads), data, CONFIG.model_copy(update=changes))


def contents(folder: Path, *parts: str) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for part in parts
        for path in sorted((folder / part).rglob("*"))
        if path.is_file()
    }


def test_tokens_are_those_of_the_backbone_on_the_clip(table, data):
    report = extract(table, data)
    clips = read_clip_table(table, data.heads)
    store = TokenStore.open(report.stores["audio"])
    row = int(np.flatnonzero(store.state(np.arange(8), 0) == 1)[-1])
    clip = clips.clip(row)
    array = read_clip(clip, draw_view(clip.clip_id, 0, data), ("audio",), data)["audio"].array
    with torch.inference_mode():
        tokens = build_frozen("audio", data, CONFIG)(torch.from_numpy(array)[None])
    expected = theta_average(tokens, 7)[0].numpy()
    assert store.k == 7
    assert np.allclose(store.read(np.array([row]), 0)[0], expected, atol=2e-3)


def test_second_extraction_writes_nothing(table, data):
    first = extract(table, data)
    before = {path: path.stat().st_mtime_ns for path in data.cache.rglob("*")}
    second = extract(table, data)
    after = {path: path.stat().st_mtime_ns for path in data.cache.rglob("*")}
    assert (first.n_written, second.n_written) == (16, 0)
    assert before == after
    assert second.counts == first.counts


def test_clips_appended_later_give_the_bytes_of_one_extraction(table, data, tmp_path):
    extract(table, data)
    grown = extract(tmp_path / "all.csv", data)
    assert grown.n_written == 2 * 16
    other = data.model_copy(update={"cache": tmp_path / "other"})
    extract(tmp_path / "all.csv", other)
    assert contents(data.cache, "tokens") == contents(other.cache, "tokens")


def test_shard_without_receipt_is_made_again_and_no_other(table, data):
    report = extract(table, data)
    before = contents(data.cache, "tokens")
    name = report.stores["audio"].stem
    (Cache.open(data.cache).receipts("audio", name) / "view0" / "0.json").unlink()
    assert extract(table, data).n_written == 6
    assert contents(data.cache, "tokens") == before


def test_truncated_shard_is_made_again(table, data):
    report = extract(table, data)
    before = contents(data.cache, "tokens")
    shard = report.stores["audio"] / "tokens/c/1/0/0/0"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert extract(table, data).n_written == 2
    assert contents(data.cache, "tokens") == before


def test_unreadable_clip_is_failed_with_its_reason_and_the_others_are_there(table, data, sample):
    (table.parent / "bad.mp4").write_bytes(b"no video at all")
    text = table.read_text().replace("videos/clip_0001.mp4", "bad.mp4").replace("videos/clip_0003.mp4", "gone.mp4")
    table.write_text(text)
    report = extract(table, data)
    assert report.counts["audio"]["failed"] == 2
    assert "no such file" in report.failures["audio"]["clip_0003"]
    assert "bad.mp4" in report.failures["audio"]["clip_0001"]
    assert report.counts["audio"]["present"] + report.counts["audio"]["absent"] == 6
    assert np.isnan(TokenStore.open(report.stores["audio"]).read(np.array([1, 3]), 0)).all()


def test_failed_clips_are_tried_again_only_when_asked(table, data, sample):
    original = table.read_text()
    table.write_text(original.replace("videos/clip_0001.mp4", "later.mp4"))
    assert extract(table, data).counts["audio"]["failed"] == 1
    (table.parent / "later.mp4").write_bytes((sample / "videos/clip_0001.mp4").read_bytes())
    assert extract(table, data).n_written == 0
    mended = extract(table, data, retry_failed=True)
    assert mended.counts["audio"]["failed"] == 0
    assert mended.n_written == 1  # its boxes need no video
    other = data.model_copy(update={"cache": table.parent / "other"})
    table.write_text(original)
    extract(table, other)
    assert contents(data.cache, "tokens") == contents(other.cache, "tokens")


def test_clip_whose_times_change_invalidates_its_own_row(table, data):
    extract(table, data)
    table.write_text(table.read_text().replace("clip_0002.mp4,0.0,1.5", "clip_0002.mp4,0.5,1.5"))
    report = extract(table, data)
    assert report.n_written == 2
    assert report.changes == ["clip_0002: source or times changed; it is extracted again"]


def test_changed_labels_recompute_nothing_and_are_said(table, data):
    extract(table, data)
    table.write_text(table.read_text().replace("pull", "drag", 1))
    report = extract(table, data)
    assert report.n_written == 0
    assert len(report.changes) == 1
    assert '"verb": "pull"' in report.changes[0]
    assert '"verb": "drag"' in report.changes[0]


def test_views_are_extracted_for_training_clips_only(table, data):
    clips = read_clip_table(table, data.heads)
    report = extract(table, data, views=2)
    store = TokenStore.open(report.stores["detections"])
    requested = store.state(np.arange(8), 1) != 0
    assert requested.tolist() == (clips.split == "train").tolist()
    assert store.n_views == 2


def test_other_theta_makes_another_store_beside_the_first(table, data):
    first, second = extract(table, data), extract(table, data, theta=None)
    assert first.stores["audio"] != second.stores["audio"]
    assert TokenStore.open(second.stores["audio"]).k > 7
    assert first.stores["audio"].exists()


def test_identity_is_the_digest_of_its_fields_and_holds_no_path(table, data):
    report = extract(table, data)
    (name,) = Cache.open(data.cache).identities("audio")
    fields = Cache.open(data.cache).identities("audio")[name]
    assert digest(fields) == name == report.stores["audio"].stem
    assert zarr.open_group(str(report.stores["audio"]), mode="r").attrs["identity"] == fields
    assert str(table.parent) not in json.dumps(fields)
    assert {"format", "modality", "backbone", "precision", "input", "theta", "dtype"} == set(fields)


def test_tokens_that_float16_cannot_hold_are_refused_with_the_clip(table, data, monkeypatch):
    build = build_frozen

    def loud(*args):
        backbone = build(*args)
        tokens = backbone.tokens
        backbone.tokens = lambda x: tokens(x) * 1e6
        return backbone

    monkeypatch.setattr("karmma.extract.frozen.build_frozen", loud)
    report = extract(table, data)
    assert report.counts["audio"]["present"] == 0
    reason = report.failures["audio"]["clip_0000"]
    assert "which float16 cannot hold" in reason


def test_other_shard_size_is_refused_by_name(table, data, tmp_path):
    extract(table, data)
    with pytest.raises(CacheError, match="has 6 clips a shard, asked for 4"):
        extract(tmp_path / "all.csv", data, shard_rows=4)


def test_cache_that_cannot_be_written_says_so(table, data, tmp_path):
    (tmp_path / "cache").write_text("a file where the cache should be")
    with pytest.raises(CacheError, match=r"clips.parquet: Not a directory. Choose a folder that can be read"):
        extract(table, data)


def test_cached_tokens_survive_the_loss_of_their_file(table, data):
    """A neighbour in the same batch is due; the clip whose file is gone by now keeps what the cache has of it."""
    extract(table, data)
    before = TokenStore.open(extract(table, data).stores["audio"]).read(np.array([7]), 0)
    videos = table.parent / "own"
    videos.mkdir()
    for row in range(9):
        name = f"clip_{row:04d}.mp4"
        (videos / name).write_bytes((table.parent / "videos" / name).read_bytes())
    moved = [line.replace("videos/", "own/") for line in (table.parent / "all.csv").read_text().splitlines()[:10]]
    table.write_text("\n".join(moved[:9]) + "\n")
    first = extract(table, data)
    assert np.array_equal(TokenStore.open(first.stores["audio"]).read(np.array([7]), 0), before, equal_nan=True)
    (videos / "clip_0007.mp4").unlink()
    table.write_text("\n".join(moved) + "\n")
    second = extract(table, data)
    assert second.n_written == 2
    assert second.counts["audio"]["failed"] == 0
    assert np.array_equal(TokenStore.open(second.stores["audio"]).read(np.array([7]), 0), before, equal_nan=True)


def test_failed_clip_that_left_the_table_counts_no_more(table, data):
    table.write_text(table.read_text().replace("videos/clip_0001.mp4", "gone.mp4"))
    assert extract(table, data).n_failed == 1
    lines = [line for line in table.read_text().splitlines() if "gone.mp4" not in line]
    table.write_text("\n".join(lines) + "\n")
    report = extract(table, data)
    assert report.n_failed == 0
    assert report.failures["audio"] == {}


def test_store_whose_identity_file_is_lost_is_found_and_made_good(table, data):
    report = extract(table, data)
    cache = Cache.open(data.cache)
    (cache.receipts("audio", report.stores["audio"].stem) / "identity.json").unlink()
    extract(table, data)
    assert list(cache.identities("audio")) == [report.stores["audio"].stem]


def test_what_a_killed_extraction_left_half_written_is_gone_after_the_next(table, data, tmp_path):
    report = extract(table, data)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left = report.stores["audio"] / "tokens/c/0/0/0" / f".0.{MACHINE}-{ended.pid}.tmp"
    left.write_bytes(b"half a shard")
    extract(tmp_path / "all.csv", data)
    assert not left.exists()
    assert not [path for path in data.cache.rglob("*.tmp")]
