"""Numbered frames and packs: the frame on display at any time, gaps that are named, and the same from every source."""

import os
import random
from fractions import Fraction
from pathlib import Path

import cv2
import h5py
import numpy as np
import pytest
from karmma.data.errors import MediaError
from karmma.data.numbered import FrameFolder, NumberedFrames, decode_picture
from karmma.data.packs import PackedSound, open_frames, split_pack
from karmma.data.video import Converter, frames_at


def encoded(picture, kind=".jpg"):
    return cv2.imencode(kind, picture)[1].tobytes()


@pytest.fixture
def folder(tmp_path, numbered):
    """Return a function that makes a folder of numbered frames; each shows its number."""

    def write(numbers, name="frames", pattern="frame_{:010d}.jpg"):
        (tmp_path / name).mkdir(exist_ok=True)
        for number in numbers:
            (tmp_path / name / pattern.format(number)).write_bytes(encoded(numbered(number)))
        return tmp_path / name

    return write


@pytest.fixture
def pack(tmp_path, numbered):
    """Return a function that packs frames 1 to n in one of the forms that packs come in."""

    def write(n, form, name="P01/P01_06", **attributes):
        frames = [encoded(numbered(number)) for number in range(1, n + 1)]
        with h5py.File(tmp_path / f"{form}.h5", "a") as file:
            if form == "vlen":
                made = file.create_dataset(name, (n,), h5py.vlen_dtype(np.uint8))
                for at, frame in enumerate(frames):
                    made[at] = np.frombuffer(frame, np.uint8)
            elif form == "void":
                longest = max(map(len, frames))
                padded = [np.void(frame.ljust(longest, b"\0")) for frame in frames]
                made = file.create_dataset(name, data=np.array(padded))
            else:
                made = file.create_group(name)
                for at, frame in enumerate(frames, 1):
                    made.create_dataset(f"frame_{at:06d}", data=np.frombuffer(frame, np.uint8), compression="lzf")
            made.attrs.update(attributes)
        return Path(f"{tmp_path / form}.h5::{name}")

    return write


def shown(path, times, number_in, fps=None):
    out, converter = {}, Converter()
    with open_frames(path, fps) as film:
        for one in frames_at(film, times):
            out |= dict.fromkeys(one.places, number_in(converter.rgb(one.frame)))
    return [out[place] for place in range(len(times))]


@pytest.mark.parametrize("fps", [12, 24, Fraction(30000, 1001), 50, Fraction(60000, 1001), 60])
def test_frame_on_display_at_any_time_at_any_rate(folder, number_in, fps):
    path = folder(range(1, 121))
    times = np.linspace(0, float(119.9 / fps), 67)
    slow = [max(n for n in range(1, 121) if n == 1 or Fraction(n - 1) / fps <= Fraction(time) + Fraction(6, 10_000))
            for time in times]  # fmt: skip
    assert shown(path, times, number_in, float(fps)) == slow


def test_the_very_start_of_a_frame_is_that_frame_far_into_a_video(folder, number_in):
    fps = 60000 / 1001
    numbers = range(100_001, 100_011)
    path = folder(numbers)
    starts = [round((number - 1) / fps, 3) for number in numbers]
    with open_frames(path, fps) as film:
        places = {place: one.time for one in frames_at(film, starts) for place in one.places}
    assert [round(places[at] * fps) + 1 for at in range(10)] == list(numbers)


@pytest.mark.parametrize("form", ["vlen", "void", "group"])
def test_packs_of_every_form_show_what_the_folder_shows(folder, pack, number_in, form):
    times = [0.0, 0.11, 0.34, 1.0, 1.9]
    expected = shown(folder(range(1, 41)), times, number_in, 20.0)
    assert expected == [1, 3, 7, 21, 39]
    assert shown(pack(40, form), times, number_in, 20.0) == expected
    assert shown(pack(40, form, "with/rate", fps=10.0), [0.0, 1.0], number_in) == [1, 11]


def test_folder_that_counts_from_zero_starts_with_zero(folder, number_in):
    assert shown(folder(range(20), pattern="{:04d}.jpg"), [0.0, 0.95, 1.9], number_in, 10.0) == [0, 9, 19]


def test_folder_that_starts_late_shows_no_frame_from_elsewhere(folder, number_in):
    path = folder(range(50, 80))
    assert shown(path, [5.0, 6.0], number_in, 10.0) == [51, 61]
    with pytest.raises(MediaError, match=r"no frame can be decoded \(frame_0000000011\.jpg is missing\)"):
        shown(path, [1.0, 6.0], number_in, 10.0)


def test_gap_within_a_clip_fails_and_is_named(folder, number_in):
    path = folder([*range(1, 11), *range(12, 30)])
    with pytest.raises(MediaError, match=r"frame at 1\.500 s wanted, .* \(frame_0000000011\.jpg is missing\)"):
        shown(path, [0.5, 1.5], number_in, 10.0)
    assert shown(path, [1.1, 1.5], number_in, 10.0) == [12, 16]


def test_last_frame_before_a_gap_stays_for_one_more_and_no_longer(folder, number_in):
    path = folder([*range(1, 11), *range(40, 50)])
    assert shown(path, [0.95, 1.05], number_in, 10.0) == [10, 10]
    assert shown(path, [1.05], number_in, 10.0) == [10]
    with pytest.raises(MediaError, match="is missing"):
        shown(path, [1.15], number_in, 10.0)


def test_nothing_is_decoded_but_what_is_shown(folder, number_in, monkeypatch):
    read = []
    monkeypatch.setattr(FrameFolder, "read", lambda self, number: read.append(number) or b"")
    with open_frames(folder(range(1, 60)), 10.0) as film:
        frames = list(frames_at(film, [1.0, 3.0]))
        with pytest.raises(MediaError, match="is no JPEG"):
            Converter().rgb(frames[1].frame)
    assert read == [31]


def test_duration_counts_from_the_clock_and_not_from_the_first_file(folder):
    with open_frames(folder(range(31, 61)), 30.0) as film:
        assert film.duration_s == 2.0
        assert film.has_pictures


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp"])
def test_picture_shows_itself_whatever_came_before_it(kind, numbered, number_in):
    decoders = {}
    for number in (0, 1, 2, 3, 4, 129, 3):
        frame = decode_picture(encoded(numbered(number), kind), "picture", decoders)
        assert number_in(frame.to_ndarray(format="rgb24")) == number


@pytest.mark.parametrize("kind", [".jpg", ".png", ".webp"])
def test_pictures_of_any_kind_agree_with_opencv(kind):
    ramp = np.add.outer(np.arange(48), np.arange(64)).astype(np.uint8)
    picture = np.dstack([ramp, 255 - ramp, np.full_like(ramp, 200)])
    data = encoded(picture, kind)
    with_av = Converter().rgb(type("F", (), {"picture": decode_picture(data, "x", {})})())
    with_cv = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    assert np.abs(with_av.astype(int) - with_cv).mean() < 2


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[: len(data) // 2], "is cut short"),
        (lambda data: b"", "is no JPEG, PNG or WebP"),
        (lambda data: b"GIF89a" + data, "is no JPEG, PNG or WebP"),
        (lambda data: data.replace(b"\0\x40\0\x40", b"\xea\x60\xea\x60"), "is damaged"),  # 60000 x 60000
        (lambda data: data[:500] + data[900:], "is damaged"),
    ],
)
def test_damaged_picture_fails_by_name(damage, message):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    data = encoded(noise)
    assert data.count(b"\0\x40\0\x40") == 1  # height and width in the frame header
    decoders = {}
    with pytest.raises(MediaError, match=f"frame 7 {message}"):
        decode_picture(damage(data), "frame 7", decoders)
    assert decode_picture(data, "frame 8", decoders).width == 64


def test_empty_missing_and_ambiguous_folders_say_so(folder, tmp_path):
    with open_frames(tmp_path / "none", 10.0) as film, pytest.raises(MediaError, match="none: no such folder"):
        _ = film.has_pictures
    (tmp_path / "empty").mkdir()
    with open_frames(tmp_path / "empty", 10.0) as film, pytest.raises(MediaError, match="holds no numbered pictures"):
        _ = film.has_pictures
    path = folder(range(1, 4))
    with open_frames(path, None) as film, pytest.raises(MediaError, match="Set video_fps"):
        _ = film.duration_s
    (path / "other_0000000002.jpg").write_bytes(b"")
    with open_frames(path, 1.0) as film, pytest.raises(MediaError, match=r"holds both .* and other_0000000002\.jpg"):
        _ = film.has_pictures


def test_pack_that_lacks_the_video_names_the_nearest(pack):
    path = pack(3, "vlen")
    file = split_pack(path)[0]
    cases = {
        f"{file}::P01/P01_6": "no 'P01_6' in the pack. Did you mean 'P01_06'?",
        f"{file}": "names no dataset",
        f"{file.parent}/none.h5::a": "no such file",
    }
    for name, message in cases.items():
        with open_frames(Path(name), 1.0) as film, pytest.raises(MediaError) as raised:
            _ = film.has_pictures
        assert message in str(raised.value)
    file.write_bytes(file.read_bytes()[:3000])
    with open_frames(path, 1.0) as film, pytest.raises(MediaError, match="cannot be read as HDF5"):
        _ = film.has_pictures


def test_links_and_data_outside_the_pack_are_not_followed(tmp_path, pack):
    inside = pack(3, "vlen")
    with h5py.File(tmp_path / "links.h5", "w") as file:
        file["external"] = h5py.ExternalLink("vlen.h5", "P01/P01_06")
        file["soft"] = h5py.SoftLink("/elsewhere")
        file.create_dataset("outside", (4,), "u1", external=[("raw.bin", 0, 4)])
    for name, message in (("external", "is a link"), ("outside", "keeps its data in another file")):
        with open_frames(Path(f"{tmp_path}/links.h5::{name}"), 1.0) as film, pytest.raises(MediaError, match=message):
            _ = film.has_pictures
    with open_frames(inside, 1.0) as film:
        assert film.has_pictures


def test_damaged_packs_fail_their_clip_and_nothing_else(tmp_path, pack):
    """Bytes changed and files cut at random: what can still be read is, and nothing but MediaError is raised."""
    draw = random.Random(0)
    path = pack(6, "group")
    file, name = split_pack(path)
    whole = file.read_bytes()
    n_failed = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 40)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        file.write_bytes(damaged[: draw.randrange(len(damaged))] if draw.random() < 0.2 else damaged)
        try:
            with open_frames(Path(f"{file}::{name}"), 10.0) as film:
                for one in frames_at(film, [0.05, 0.45]):
                    Converter().rgb(one.frame)
        except MediaError:
            n_failed += 1
    assert n_failed > 10


def test_pack_is_read_in_forked_processes_beside_the_parent(pack, number_in):
    path = pack(30, "vlen")
    with open_frames(path, 10.0) as film:
        assert film.has_pictures  # the parent has it open
        children = []
        for _ in range(3):
            child = os.fork()
            if child == 0:
                os._exit(0 if shown(path, [0.5, 2.5], number_in, 10.0) == [6, 26] else 1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert film.duration_s == 3.0


@pytest.mark.parametrize("form", ["float", "int16", "channels first", "channels last"])
def test_packed_sound_gives_the_samples_from_a_time_on(tmp_path, form):
    samples = np.sin(np.arange(24_000 * 3) / 20).astype(np.float32)
    stored = {
        "float": samples,
        "int16": np.rint(samples * 32767).astype(np.int16),
        "channels first": np.stack([samples * 1.5, samples * 0.5]),
        "channels last": np.stack([samples * 1.5, samples * 0.5], axis=1),
    }[form]
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["P01_01"] = stored
    with PackedSound(Path(f"{tmp_path}/a.h5::P01_01"), 24_000) as sound:
        assert sound.has_sound
        (time, first), *rest = sound.sound_frames(1.3)
        assert time == 1.0
        found = np.concatenate([frame.to_ndarray()[0] for frame in (first, *(frame for _, frame in rest))])
    assert found == pytest.approx(samples[24_000:], abs=1e-4)


def test_packed_sound_must_know_its_rate(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["a"] = np.zeros(100, np.float32)
        file["b"] = np.zeros(100, np.float32)
        file["b"].attrs["sample_rate"] = 50
        file["c"] = np.zeros((2, 2, 2), np.float32)
    for name, message in (("a", "Set audio_hz"), ("c", "expected a dataset of samples")):
        with PackedSound(Path(f"{tmp_path}/a.h5::{name}"), None) as sound, pytest.raises(MediaError, match=message):
            list(sound.sound_frames(0.0))
    with PackedSound(Path(f"{tmp_path}/a.h5::b"), None) as sound:
        assert [time for time, _ in sound.sound_frames(0.0)] == [0.0, 1.0]


def test_real_frames_are_those_of_their_numbers(shared_data):
    """EPIC-KITCHENS: RGB at 60 frames a second, flow at 30, as frames.csv pairs them."""
    import csv

    epic = shared_data / "epic"
    with open(epic / "frames.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for kind, fps, column in (("rgb_frames", 60.0, "rgb_index"), ("flow_frames", 30.0, "flow_index")):
        path = epic / kind / "P01/P01_06" / ("" if kind == "rgb_frames" else "u")
        due = [row for row in rows if row[column]]
        times = [(int(row["rgb_index"]) - 1) / 60 for row in due]
        for at, time in enumerate(times):
            with open_frames(path, fps) as film:
                (one,) = frames_at(film, [time])
            assert round(one.time * fps) + 1 == int(due[at][column])
            assert Converter().grey(one.frame).shape == (256, 456)


def test_real_something_else_frames_have_all_numbers(shared_data):
    for path in sorted((shared_data / "boxes/videos").iterdir()):
        with NumberedFrames(FrameFolder(path), 12.0) as film:
            n_files = len(list(path.glob("*.jpg")))
            assert film.duration_s == pytest.approx(n_files / 12)
            frames = list(frames_at(film, np.arange(n_files) / 12))
            assert len(frames) == n_files
            Converter().rgb(frames[-1].frame)


@pytest.mark.parametrize("stated", [0, -5, 1e300, float("nan"), float("inf")])
def test_pack_of_sound_that_states_no_possible_rate_says_so(tmp_path, stated):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("a", data=np.zeros(100, np.float32)).attrs["sample_rate"] = stated
    with PackedSound(Path(f"{tmp_path}/a.h5::a"), None) as sound, pytest.raises(MediaError, match="samples a second"):
        next(sound.sound_frames(0.0))


def test_group_in_the_place_of_sound_says_so(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_group("a")
    with PackedSound(Path(f"{tmp_path}/a.h5::a"), 16_000) as sound:
        assert sound.has_sound
        with pytest.raises(MediaError, match="expected a dataset of samples"):
            next(sound.sound_frames(0.0))
