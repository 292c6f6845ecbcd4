"""Cached logits against a live teacher: equal where nothing changed, told where something did."""

import numpy as np
import pytest
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import CacheError, MediaError
from karmma.data.stores import LogitStore
from karmma.distill.config import StudentConfig
from karmma.distill.live import check_teacher
from karmma.extract.config import ExtractConfig
from karmma.extract.stage import extract_tokens
from karmma.fuse.config import TeacherConfig
from karmma.fuse.stage import train_teacher

EXTRACT = ExtractConfig(
    video={"name": "swin3d_micro", "weights": "none"}, audio={"name": "ast_micro", "weights": "none"},
    detections={"name": "stlt_micro", "weights": "none"}, theta=9, views=2, batch_size=5, shard_rows=8, device="cpu",
)  # fmt: skip
TEACHER = TeacherConfig(
    embed_dim=16, ffn_dim=16, n_layers=1, n_attention_heads=2, epochs=1, warmup_epochs=0, device="cpu"
)
STUDENT = StudentConfig(device="cpu", readers=1)


@pytest.fixture(scope="module")
def taught(sample, tmp_path_factory):
    """Table and settings of a cache with two views and a teacher trained from it."""
    folder = tmp_path_factory.mktemp("taught")
    data = DataConfig(
        cache=folder / "cache", runs=folder / "runs", modalities=("video", "audio", "detections"), frames=4, size=32,
        max_boxes=3, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip
    table = read_clip_table(sample / "clips.csv", data.heads)
    extract_tokens(table, data, EXTRACT)
    train_teacher(table, data, TEACHER)
    return table, data


def test_live_teacher_gives_the_cached_logits_in_every_view(taught):
    found = check_teacher(*taught, EXTRACT, STUDENT, 30)
    assert (found.n_clips, found.n_answers) == (30, 60)
    assert found.error < 1e-3
    assert found.n_agree == 60
    assert found.is_near
    assert found.largest > 0


def test_more_clips_than_there_are_are_each_checked_once(taught):
    n_train = len(taught[0].rows("train"))
    assert check_teacher(*taught, EXTRACT, STUDENT, 1000).n_clips == 2 * n_train


@pytest.mark.parametrize("off", [1.0, np.nan])
def test_logits_that_are_not_those_of_the_clips_are_told(taught, monkeypatch, off):
    right = LogitStore.read

    def wrong(self, rows, view):
        return {head: values + np.float32(off) for head, values in right(self, rows, view).items()}

    monkeypatch.setattr(LogitStore, "read", wrong)
    found = check_teacher(*taught, EXTRACT, STUDENT, 6)
    assert found.error == pytest.approx(off, abs=1e-2, nan_ok=True)
    assert not found.is_near


def test_what_would_not_make_the_tokens_is_refused(taught):
    other = EXTRACT.model_copy(update={"seed": 1})
    with pytest.raises(CacheError, match=r"would not make the video tokens .*backbone\.weights"):
        check_teacher(*taught, other, STUDENT, 4)


def test_without_teacher_or_its_run_there_is_nothing_to_check(taught, tmp_path):
    table, data = taught
    with pytest.raises(CacheError, match="no teacher to check"):
        check_teacher(table, data, EXTRACT, StudentConfig(teacher="none"), 4)
    with pytest.raises(CacheError, match=r"its run .*teacher-.* is not there\. Name .* --runs"):
        check_teacher(table, data.model_copy(update={"runs": tmp_path}), EXTRACT, STUDENT, 4)


def test_clip_that_cannot_be_read_is_named(taught, tmp_path):
    table, data = taught
    row = table.rows("train")[0]
    clip = table.clip(row)
    kept = clip.video.read_bytes()
    try:
        clip.video.write_bytes(b"no video")
        with pytest.raises(MediaError, match=f"{table.clip_ids[row]}: video failed"):
            check_teacher(table, data, EXTRACT, STUDENT, 24)
    finally:
        clip.video.write_bytes(kept)


def test_imported_teacher_cannot_be_checked(table, data, sample):
    cache = Cache(data.cache)
    cache.add_clips(table)
    classes = {head: list(table.classes(head)) for head in data.heads}
    logits = {head: np.zeros((24, 1, len(names)), np.float32) for head, names in classes.items()}
    about = {"teacher": "f" * 16, "run": "elsewhere", "classes": classes, "inputs": {}, "tokens": {}}
    LogitStore.write(cache.logits_path("f" * 16), logits, np.ones((24, 1)), cache.row_digests(), about)
    with pytest.raises(CacheError, match="imported from elsewhere"):
        check_teacher(table, data, EXTRACT, STUDENT, 4)
