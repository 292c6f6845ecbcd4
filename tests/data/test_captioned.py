"""Videos with captions drawn in: the same frames at the same times, the same sound, text where and when it is due."""

import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from karmma.data.captioned import LEAST_PX, Caption, set_text, write_captioned
from karmma.data.errors import CacheError, ConfigError, MediaError
from karmma.data.media import Media
from karmma.data.raw import open_film
from karmma.data.video import Converter

# Frames come at any moment they like.
TIMES = [0.0, 0.04, 0.1, 0.13, 0.3, 0.34, 0.5, 0.9, 0.95, 1.0]
SOUND = 0.3 * np.sin(2 * np.pi * 700 * np.arange(20_000) / 16_000) * np.linspace(0, 1, 20_000)
LINES = ("verb: open 87%", "noun: drawer 55%")


def nobody(n):
    """Count nothing."""


def shown(path, fps=None):
    """Return times and pictures of a whole film."""
    converter = Converter()
    with open_film(path, fps) as film:
        found = [(frame.time, converter.rgb(frame).copy()) for frame in film.frames(0.0)]
        assert not (film.broken and fps is None)
    return [time for time, _ in found], [picture for _, picture in found]


def heard(path):
    """Return (time of the first sample, samples [n] of the first channel, time of the first picture) of a file."""
    with Media(path) as media:
        start_s = media.start_s
        found = list(media.sound_frames(-1.0))
        resampler = av.AudioResampler(format="fltp", layout="mono", rate=16_000)
        parts = [part.to_ndarray()[0] for _, frame in found for part in resampler.resample(frame)]
    return found[0][0], np.concatenate(parts), start_s


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
@pytest.mark.parametrize("source", ["a.mp4", "a.mkv", "a.ts"])
def test_every_frame_stays_at_its_time(film, tmp_path, source, suffix, number_in):
    path = film(source, TIMES, sound=SOUND)
    told = []
    n_frames = write_captioned(path, None, [], tmp_path / f"out{suffix}", told.append)
    times, pictures = shown(tmp_path / f"out{suffix}")
    assert n_frames == len(times) == len(TIMES)
    assert times == pytest.approx(TIMES, abs=1e-3 if suffix == ".mkv" or source == "a.mkv" else 1e-4)
    assert [number_in(picture) for picture in pictures] == list(range(len(TIMES)))
    assert sum(told) == 1  # whole seconds


def test_last_frame_stays_as_long_as_it_did(film, tmp_path):
    path = film("a.mp4", TIMES)
    write_captioned(path, None, [], tmp_path / "out.mp4", nobody)
    with Media(path) as one, Media(tmp_path / "out.mp4") as other:
        assert other.duration_s == pytest.approx(one.duration_s, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "codec", "target", "kept"),
    [
        ("a.mp4", "aac", "out.mp4", True),
        ("a.mkv", "flac", "out.mkv", True),
        ("a.mkv", "libopus", "out.mp4", True),
        ("a.ts", "aac", "out.mp4", True),
        ("a.avi", "adpcm_ms", "out.mp4", False),
        ("a.avi", "mp3", "out.mp4", True),
        ("a.mkv", "wavpack", "out.mp4", False),
    ],
)
def test_sound_is_copied_where_the_format_takes_it_and_else_sounds_the_same(
    film, tmp_path, source, codec, target, kept
):
    path = film(source, TIMES, sound=SOUND, codec=codec)
    write_captioned(path, None, [], tmp_path / target, nobody)
    with av.open(str(path)) as one, av.open(str(tmp_path / target)) as other:
        codecs = [file.streams.audio[0].codec_context.name for file in (one, other)]
        assert (codecs[0] == codecs[1]) == kept
        assert kept or codecs[1] == "aac"
        if kept:
            sizes = [[packet.size for packet in file.demux(audio=0) if packet.size] for file in (one, other)]
            assert len(sizes[0]) == len(sizes[1])
    if source == "a.avi":  # whose times of pictures are those of decoding
        return
    (first, before, _), (then, after, _) = heard(path), heard(tmp_path / target)
    at, n = 2000 + round((then - first) * 16_000), 15_000
    lags = range(-16, 17)  # a millisecond to either side: Matroska rounds to that
    alike = [np.corrcoef(before[at + lag : at + lag + n], after[2000 : 2000 + n])[0, 1] for lag in lags]
    assert max(alike) > 0.99
    assert abs(lags[int(np.argmax(alike))]) <= (9 if source == "a.mkv" else 1)


def test_sound_that_begins_before_the_picture_keeps_its_distance(film, tmp_path):
    path = film("a.mp4", [time + 0.5 for time in TIMES], sound=SOUND)
    write_captioned(path, None, [], tmp_path / "out.mp4", nobody)
    assert shown(tmp_path / "out.mp4")[0] == pytest.approx(TIMES, abs=1e-4)
    assert heard(path)[0] == pytest.approx(-0.5, abs=1e-3)
    assert heard(tmp_path / "out.mp4")[0] == pytest.approx(-0.5, abs=1e-3)


def test_caption_is_drawn_in_its_time_and_nowhere_else(film, tmp_path):
    pictures = [np.full((120, 161, 3), 40 + 5 * k, np.uint8) for k in range(len(TIMES))]
    path = film("a.mp4", TIMES, pictures, pix_fmt="yuv444p")
    said = [Caption(0.1, 0.3, LINES), Caption(0.5, 0.95, ("verb: close 7%",))]
    write_captioned(path, None, said, tmp_path / "with.mp4", nobody)
    write_captioned(path, None, [], tmp_path / "without.mp4", nobody)
    (times, drawn), (_, plain) = shown(tmp_path / "with.mp4"), shown(tmp_path / "without.mp4")
    assert times == pytest.approx(TIMES, abs=1e-4)
    for time, one, other in zip(TIMES, drawn, plain, strict=True):
        due = next((caption for caption in said if caption.start_s <= time < caption.stop_s), None)
        text = np.zeros((0, 0)) if due is None else set_text(due.lines, 161, 120)
        corner = one[120 - text.shape[0] : 120, : text.shape[1]]
        ink = text > 0.9
        assert not ink.any() or corner[ink].mean() > corner[text == 0].mean() + 100
        away = np.abs(one.astype(int) - other)
        away[120 - text.shape[0] - 8 :, : text.shape[1] + 8] = 0
        assert away.mean() < 1.5
        assert one.shape == (120, 162, 3)  # H.264 has even sides only


def test_rotated_video_comes_out_upright_and_keeps_its_colours(film, tmp_path):
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48], picture[:32, 48:], picture[32:, :48] = (220, 30, 30), (30, 220, 30), (30, 30, 220)
    turn = (0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path = film("a.mp4", [0.0, 0.04, 0.08], [picture] * 3, matrix=turn)
    write_captioned(path, None, [], tmp_path / "out.mp4", nobody)
    (_, before), (_, after) = shown(path), shown(tmp_path / "out.mp4")
    assert before[0].shape == after[0].shape == (96, 64, 3)
    for row, column in ((20, 16), (20, 48), (70, 16), (70, 48)):
        assert after[1][row, column].astype(int) == pytest.approx(before[1][row, column].astype(int), abs=8)


def test_numbered_frames_are_drawn_at_their_rate(tmp_path, numbered, number_in):
    import cv2

    (tmp_path / "frames").mkdir()
    for number in range(5):
        cv2.imwrite(str(tmp_path / "frames" / f"frame_{number + 1:04d}.png"), numbered(number))
    assert write_captioned(tmp_path / "frames", 8.0, [], tmp_path / "out.mp4", nobody) == 5
    times, pictures = shown(tmp_path / "out.mp4")
    assert times == pytest.approx([k / 8 for k in range(5)], abs=1e-4)
    assert [number_in(picture) for picture in pictures] == list(range(5))


def test_what_cannot_be_drawn_raises_and_leaves_the_old_file(film, tmp_path, wav):
    old = tmp_path / "out.mp4"
    old.write_text("old")
    path = film("a.mp4", [k / 25 for k in range(100)])
    data = path.read_bytes()
    (tmp_path / "short.ts").write_bytes(b"")
    (tmp_path / "short.mp4").write_bytes(data[: len(data) // 2])
    for bad, said in ((tmp_path / "short.mp4", "short.mp4: "), (wav("w.wav", SOUND), "w.wav: has no picture")):
        with pytest.raises(MediaError, match=said):
            write_captioned(bad, None, [], old, nobody)
    with pytest.raises(ConfigError, match=r"out\.gif: a video is written as \.mp4, \.mov, \.mkv"):
        write_captioned(path, None, [], tmp_path / "out.gif", nobody)
    with pytest.raises(CacheError, match=r"out\.mp4: cannot be written"):
        write_captioned(path, None, [], path / "out.mp4", nobody)
    assert old.read_text() == "old"
    assert not list(tmp_path.glob(".*"))


def test_frames_that_are_missing_or_damaged_raise(tmp_path, numbered):
    import cv2

    (tmp_path / "frames").mkdir()
    for number in (1, 2, 3, 5, 6):
        cv2.imwrite(str(tmp_path / "frames" / f"{number:04d}.jpg"), numbered(number))
    with pytest.raises(MediaError, match=r"0004\.jpg is missing"):
        write_captioned(tmp_path / "frames", 8.0, [], tmp_path / "out.mp4", nobody)
    (tmp_path / "frames" / "0004.jpg").write_bytes(b"\xff\xd8 no picture")
    with pytest.raises(MediaError, match=r"0004\.jpg is cut short"):
        write_captioned(tmp_path / "frames", 8.0, [], tmp_path / "out.mp4", nobody)
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize(("width", "height"), [(640, 360), (360, 640), (96, 96), (1921, 1081), (24, 16)])
def test_text_fits_into_the_picture(width, height):
    lines = ("verb: take-away-with-both-hands 87%", "noun: Schüssel, größere 55%", "V+F+A")
    patch = set_text(lines, width, height)
    assert patch.shape[0] <= height
    assert patch.shape[1] <= width
    assert patch.max() > 0.9
    if width >= 360:  # else 9 pixels are too much already
        assert patch.shape[0] <= height / 2
        assert patch[:, -2:].max() == 0  # nothing is cut off
        assert patch.shape[0] > 3 * LEAST_PX


@pytest.mark.slow
def test_memory_does_not_grow_with_the_film(film, tmp_path, numbered):
    code = (
        "import sys; from pathlib import Path; from karmma.data.captioned import write_captioned\n"
        "write_captioned(Path(sys.argv[1]), None, [], Path(sys.argv[2]), lambda n: None)\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"  # of this program alone
    )
    peaks = []
    for n in (200, 4000):
        pictures = [np.kron(numbered(k % 256), np.ones((4, 4, 1), np.uint8)) for k in range(n)]
        path = film(f"{n}.mp4", [k / 25 for k in range(n)], pictures, sound=np.tile(SOUND, n // 30))
        del pictures
        done = subprocess.run(
            [sys.executable, "-c", code, path, tmp_path / f"out{n}.mp4"], capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 20_000  # KiB; 4000 pictures are 786 MB


@pytest.mark.parametrize("turned", [False, True])
def test_pixels_keep_their_shape(tmp_path, turned):
    with av.open(str(tmp_path / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        if turned:
            stream.set_display_matrix((0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30))
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 96, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode())
    write_captioned(tmp_path / "a.mp4", None, [], tmp_path / "out.mp4", nobody)
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == (Fraction(3, 4) if turned else Fraction(4, 3))
