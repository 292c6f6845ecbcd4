"""Raw clips for the student: what is wanted is read, what is not is not, and nothing is replaced."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
from karmma.data.clips import read_clip_table
from karmma.data.decoded import DecodedClips
from karmma.data.errors import MediaError
from karmma.data.raw import read_clip
from karmma.data.readers import ReaderPool
from karmma.data.views import draw_view
from karmma.distill.stream import ClipStream

M = ("video", "audio", "detections")


@pytest.fixture
def open_stream():
    """Return a function that opens streams, which are closed after the test."""
    with ExitStack() as opened:
        yield lambda *args, **how: opened.enter_context(ClipStream(*args, **how))


@pytest.fixture
def submitted(monkeypatch):
    """The modalities that reader processes are asked for, clip by clip."""
    asked = []
    submit = ReaderPool.submit

    def watch(self, orders):
        asked.extend(modalities for _, _, modalities in orders)
        return submit(self, orders)

    monkeypatch.setattr(ReaderPool, "submit", watch)
    return asked


def test_batch_holds_the_arrays_of_the_wanted_modalities_in_order(table, data, open_stream):
    wanted = np.array([[True, False, True], [True, True, False]])
    (batch,) = open_stream(table, data, M).batches([(np.array([3, 5]), wanted)], view=1)
    clips = [table.clip(row) for row in (3, 5)]
    found = [read_clip(clip, draw_view(clip.clip_id, 1, data), M, data) for clip in clips]
    assert batch.rows.tolist() == [3, 5]
    assert batch.view == 1
    assert torch.equal(batch.inputs["video"], torch.from_numpy(np.stack([f["video"].array for f in found])))
    assert torch.equal(batch.inputs["audio"], torch.from_numpy(found[1]["audio"].array[None]))
    assert torch.equal(batch.inputs["detections"], torch.from_numpy(found[0]["detections"].array[None]))
    assert batch.present.tolist() == wanted.tolist()


def test_dropped_modality_is_not_even_decoded(table, data, open_stream, submitted):
    plan = [(np.array([0, 1]), np.array([[False, True, False], [True, False, False]]))]
    list(open_stream(table, data, M).batches(plan, 0))
    assert submitted == [("audio",), ("video",)]


def test_second_reading_comes_from_memory_and_is_equal(table, data, open_stream, submitted):
    plan = [(np.arange(6), np.ones((6, 3), bool))]
    stream = open_stream(table, data, M, cache_mb=64)
    (first,) = stream.batches(plan, 0)
    assert len(submitted) == 6
    (second,) = stream.batches(plan, 0)
    assert len(submitted) == 6
    assert all(torch.equal(first.inputs[m], second.inputs[m]) for m in M)
    assert torch.equal(first.present, second.present)


def test_memory_is_bounded(table, data, open_stream):
    stream = open_stream(table, data, ("video",), cache_mb=0)
    list(stream.batches([(np.arange(4), np.ones((4, 1), bool))], 0))
    assert not stream._held
    stream._room = 2 * 4 * 3 * 32 * 32  # two clips
    list(stream.batches([(np.arange(4), np.ones((4, 1), bool))], 0))
    assert len(stream._held) == 2


def test_absent_modality_is_not_present(table, data, sample, tmp_path, open_stream):
    text = (sample / "clips.csv").read_text().splitlines()
    cells = text[1].split(",")
    cells[1], cells[-1] = str(sample / cells[1]), ""
    (tmp_path / "t.csv").write_text("\n".join([text[0], ",".join(cells)]) + "\n")
    one = read_clip_table(tmp_path / "t.csv", data.heads)
    (batch,) = open_stream(one, data, M).batches([(np.array([0]), np.ones((1, 3), bool))], 0)
    assert batch.present[0, 2].item() is False
    assert "detections" not in batch.inputs


@pytest.fixture
def broken(sample, data, tmp_path):
    """A table whose second clip is no video."""
    lines = (sample / "clips.csv").read_text().splitlines()[:4]
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    lines = [line.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/") for line in lines]
    lines[2] = lines[2].replace(f"{sample}/videos/clip_0001.mp4", "bad.mp4")
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    return read_clip_table(tmp_path / "t.csv", data.heads)


def test_clip_that_fails_stops_the_reading_by_name(broken, data, open_stream):
    with pytest.raises(MediaError, match=r"clip_0001: video failed: .*bad\.mp4.*--allow-failures 1"):
        list(open_stream(broken, data, ("video",)).batches([(np.arange(3), np.ones((3, 1), bool))], 0))


def test_allowed_failure_leaves_the_batch_and_is_never_replaced(broken, data, open_stream):
    stream = open_stream(broken, data, ("video",), allow_failures=1)
    (batch,) = stream.batches([(np.arange(3), np.ones((3, 1), bool))], 0)
    assert batch.rows.tolist() == [0, 2]
    assert len(batch.inputs["video"]) == 2
    assert list(stream.failed) == ["clip_0001"]


def test_survey_tells_what_every_clip_has(table, data, open_stream):
    found = open_stream(table, data, M).survey(np.arange(24))
    for row in range(24):
        clip = table.clip(row)
        states = read_clip(clip, draw_view(clip.clip_id, 0, data), M, data)
        assert found[row].tolist() == [states[m].state == 1 for m in M]


def test_clips_decoded_in_an_earlier_run_are_read_from_disk_and_equal(table, data, tmp_path, open_stream, submitted):
    data = data.model_copy(update={"inputs": tmp_path / "inputs"})
    plan = [(np.arange(6), np.ones((6, 3), bool))]
    (plain,) = open_stream(table, data, M).batches(plan, 1)
    for _ in range(2):
        with DecodedClips(table, data, M, 10**9) as decoded:
            (first,) = open_stream(table, data, M, decoded=decoded).batches(plan, 1)
            decoded._threads.shutdown(wait=True)
        assert all(torch.equal(first.inputs[m], plain.inputs[m]) for m in M)
        assert torch.equal(first.present, plain.present)
    assert len(submitted) == 12  # of the plain reading, and of the first that keeps
    for path in [path for path in data.inputs.rglob("*.npy") if path.stat().st_size > 1000][:2]:
        path.write_bytes(path.read_bytes()[:-1])
    with DecodedClips(table, data, M, 10**9) as decoded:
        (again,) = open_stream(table, data, M, decoded=decoded).batches(plan, 1)
    assert len(submitted) == 14
    assert all(torch.equal(again.inputs[m], plain.inputs[m]) for m in M)


def test_parts_of_a_batch_hold_its_clips_in_order(table, data, open_stream):
    wanted = np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 1], [1, 1, 0]], bool)
    (batch,) = open_stream(table, data, M).batches([(np.arange(5), wanted)], 0)
    assert [part.rows.tolist() for part in batch.parts(2)] == [[0, 1, 2], [3, 4]]
    assert [len(batch.parts(n)) for n in (1, 5, 9)] == [1, 5, 5]
    for n in (1, 2, 5):
        parts = batch.parts(n)
        assert torch.equal(torch.cat([part.present for part in parts]), batch.present)
        for m in M:
            pieces = [part.inputs[m] for part in parts if m in part.inputs]
            assert torch.equal(torch.cat(pieces), batch.inputs[m])
            assert all((m in part.inputs) == bool(part.present[:, M.index(m)].any()) for part in parts)
