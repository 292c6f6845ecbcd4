"""177 unusual or broken media files: every row of their table of measured properties."""

import csv

import numpy as np
import pytest
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.errors import MediaError
from karmma.data.media import Media
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.raw import read_clip
from karmma.data.video import Converter
from karmma.data.views import draw_view

DATA = DataConfig(frames=4, size=32, flow_size=48, audio_mels=24, audio_hop=128, audio_steps=32, audio_segment_s=0.256)


@pytest.fixture(scope="session")
def odd(shared):
    """Folder and rows of the files."""
    folder = shared / "data" / "odd"
    with open(folder / "expected.csv", newline="", encoding="utf-8") as file:
        return folder, list(csv.DictReader(file))


def pictures_of(media):
    """Return the stored times of all frames, and the first frame; cover pictures are no video."""
    if media.pictures is None:
        return [], None
    frames, first = [], None
    for frame in media.frames(0.0):
        frames.append(frame.time + media.start_s)
        first = first or frame
    return frames, first


def seconds_of_sound(media):
    if not media.has_sound:
        return 0.0
    return sum(frame.samples / frame.sample_rate for _, frame in media.sound_frames(0.0))


def differs(path, row):
    """Say in which property a file differs from its row, '' for none."""
    with Media(path) as media:
        try:
            times, first = pictures_of(media)
            heard = seconds_of_sound(media)
        except MediaError:
            return "" if row["readable"] == "no" else "cannot be opened"
        if "cover" in row["kind"]:
            return "" if not times else "cover picture taken for video"
        if len(times) != int(row["n_video_frames"] or 0):
            return f"{len(times)} frames"
        if (
            times
            and row["first_pts_s"]
            and not np.allclose([times[0], times[-1]], [float(row["first_pts_s"]), float(row["last_pts_s"])], atol=2e-3)
        ):
            return f"frames from {times[0]} to {times[-1]}"
        if row["readable"] == "yes" and times and first.picture.rotation != int(row["rotation"] or 0):
            return f"rotation {first.picture.rotation}"
        if row["readable"] == "yes" and times:
            height, width, _ = Converter().rgb(first).shape
            stored = (int(row["width"]), int(row["height"]))
            if (width, height) != (stored if int(row["rotation"] or 0) % 180 == 0 else stored[::-1]):
                return f"size {width} x {height}"
        if media.has_sound != (row["has_audio"] == "yes"):
            return f"has_sound is {media.has_sound}"
        if abs(heard - float(row["audio_seconds"] or 0)) > 1e-3:
            return f"{heard} s of sound"
    return ""


@pytest.mark.slow
def test_every_file_has_the_properties_that_were_measured(odd):
    folder, rows = odd
    wrong = {row["file"]: said for row in rows if (said := differs(folder / row["file"], row))}
    assert not wrong
    assert len(rows) == 177


@pytest.mark.slow
def test_every_file_is_present_absent_or_failed_as_it_can_be_read(odd):
    """Readable files give what they have, damaged ones fail where they are, and nothing raises."""
    folder, rows = odd
    for row in rows:
        clip = Clip("a", folder / row["file"], 0.0, None, {})
        found = read_clip(clip, draw_view("a", 0, DATA), ("video", "flow", "audio"), DATA)
        states = [reading.state for reading in found.values()]
        n_frames = 0 if "cover" in row["kind"] else int(row["n_video_frames"] or 0)
        if row["readable"] == "no":
            assert PRESENT not in states, row["file"]
        elif row["readable"] == "partly":
            # Sound may break off after the last moment that is looked at.
            assert FAILED in states or row["kind"].startswith("audio"), row["file"]
        elif n_frames != 1:  # a single frame has no flow, and an end that containers do not agree on
            video = PRESENT if n_frames else ABSENT
            flow = FAILED if "flow needs 12 pixels a side" in found["flow"].reason else video
            assert states == [video, flow, PRESENT if row["has_audio"] == "yes" else ABSENT], (row["file"], found)
        for reading in found.values():
            assert (reading.state == PRESENT) == (reading.array is not None) == (not reading.reason)
