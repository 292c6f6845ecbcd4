"""Small files that unpack into much, and headers of absurd sizes: their clips fail, and memory stays bounded."""

import json
import struct
import threading
import time
import wave
import zlib
from fractions import Fraction
from pathlib import Path

import av
import h5py
import numpy as np
import psutil
import pytest
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.modality import FAILED, PRESENT
from karmma.data.readers import ReaderPool

DATA = DataConfig(
    frames=4, size=32, flow_size=32, max_boxes=3, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32
)
RATES = {"video": 25.0, "flow": 25.0}


def png(width: int, height: int) -> bytes:
    """Return a PNG of these dimensions, a black one as far as its few bytes reach."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes((3 * width + 1) * min(height, 2000)), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg(folder: Path, width: int, height: int) -> bytes:
    """Return a JPEG whose header claims other dimensions than it has."""
    av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8)).to_image().save(folder / "small.jpg")
    data = bytearray((folder / "small.jpg").read_bytes())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    (folder / "small.jpg").unlink()
    return bytes(data)


def frames_of(folder: Path, data: bytes, suffix: str) -> Clip:
    (folder / "frames").mkdir()
    for number in range(1, 26):
        (folder / f"frames/{number:04d}.{suffix}").write_bytes(data)
    return Clip("bomb", folder / "frames", 0.0, 0.8, {}, "a", RATES)


def absurd_png(folder):
    return frames_of(folder, png(60_000, 60_000), "png")


def large_png(folder):
    """128 million pixels, which a camera might have, in 400 KB."""
    return frames_of(folder, png(16_000, 8_000), "png")


def absurd_jpeg(folder):
    return frames_of(folder, jpeg(folder, 65_000, 65_000), "jpg")


def absurd_motion_jpeg(folder):
    with av.open(str(folder / "a.avi"), "w") as film:
        stream = film.add_stream("mjpeg", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        data = jpeg(folder, 65_000, 65_000)
        for at in range(25):
            packet = av.Packet(data)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, at, at, Fraction(1, 25)
            film.mux(packet)
    return Clip("bomb", folder / "a.avi", 0.0, 0.8, {}, "a")


def pack(folder, name, *shape, **how):
    with h5py.File(folder / "a.h5", "w") as file:
        file.create_dataset(name, shape, **how)
    return Path(f"{folder / 'a.h5'}::{name}")


def endless_frames(folder):
    return Clip("bomb", pack(folder, "frames", 10**12, dtype="u1", chunks=(10**6,)), 0.0, 0.8, {}, "a", RATES)


def many_frames(folder):
    """So many that their numbers alone would take 16 GB."""
    return Clip("bomb", pack(folder, "frames", 2 * 10**9, dtype="u1", chunks=(10**6,)), 0.0, 0.8, {}, "a", RATES)


def wide_sound(folder):
    sound = pack(folder, "sound", 10**6, 10**6, dtype="f4", chunks=(10**3, 10**3))
    return Clip("bomb", folder / "none.mp4", 0.0, 0.8, {"audio": sound}, "a", {"audio": 16_000})


def wide_chunk(folder):
    """Four GB of zeros in one chunk of four MB."""
    sound = pack(folder, "sound", 1, 10**9, dtype="f4", chunks=(1, 10**9), compression="gzip")
    with h5py.File(folder / "a.h5", "a") as file:
        zeros = zlib.compressobj(1)
        part = bytes(10**7)
        data = b"".join([*(zeros.compress(part) for _ in range(400)), zeros.flush()])
        file["sound"].id.write_direct_chunk((0, 0), data)
    return Clip("bomb", folder / "none.mp4", 0.0, 0.8, {"audio": sound}, "a", {"audio": 16_000})


def endless_wav(folder):
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(bytes(32_000))
    data = bytearray((folder / "a.wav").read_bytes())
    data[40:44] = struct.pack("<I", 2**32 - 2)
    data[22:24] = struct.pack("<H", 65_535)
    (folder / "a.wav").write_bytes(data)
    return Clip("bomb", folder / "none.mp4", 0.0, 0.8, {"audio": folder / "a.wav"}, "a")


def deep_boxes(folder):
    (folder / "a.json").write_text("[" * 10**6)
    return Clip("bomb", folder / "none.mp4", 0.0, 0.8, {"detections": folder / "a.json"}, "a")


def huge_numbers(folder):
    frame = {"name": "a/" + "9" * 300 + ".jpg", "labels": [{"box2d": dict.fromkeys(("x1", "y1", "x2", "y2"), 1e308)}]}
    (folder / "a.json").write_text(json.dumps([frame]))
    return Clip("bomb", folder / "none.mp4", 0.0, 0.8, {"detections": folder / "a.json"}, "a")


@pytest.fixture
def watched():
    """Return a function that watches the memory of a pool's readers, and tells the most that one has held."""
    most, over = [0], threading.Event()

    def watch():
        while not over.wait(0.01):
            for reader in psutil.Process().children():
                try:
                    # A child that has yet to become a reader still has the memory of this process.
                    if "karmma.data.reader" in reader.cmdline():
                        most[0] = max(most[0], reader.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue

    thread = threading.Thread(target=watch)
    thread.start()
    yield most
    over.set()
    thread.join()


# Modalities to read, and GiB that a reader may have held by then.
BOMBS = {
    absurd_png: (("video",), 1),
    large_png: (("video", "flow"), 5),
    absurd_jpeg: (("video",), 1),
    absurd_motion_jpeg: (("video", "flow"), 1),
    endless_frames: (("video",), 1),
    many_frames: (("video",), 8),
    wide_sound: (("audio",), 8),
    wide_chunk: (("audio",), 8),
    endless_wav: (("audio",), 1),
    deep_boxes: (("detections",), 1),
    huge_numbers: (("detections",), 1),
}
SLOW = (large_png, wide_chunk)  # and sound after all: they fit into the memory of a reader


@pytest.mark.parametrize("bomb", [pytest.param(b, marks=pytest.mark.slow) if b in SLOW else b for b in BOMBS])
def test_bomb_fails_its_clip_with_bounded_memory_and_leaves_the_next_clip_alone(bomb, tmp_path, sample, watched):
    names, most_gb = BOMBS[bomb]
    sound = Clip("fine", sample / "videos/clip_0000.mp4", 0.0, 0.8, {}, "a")
    with ReaderPool(1, DATA, patience_s=60) as pool:
        start = time.monotonic()
        found, after = (future.result() for future in pool.submit([(bomb(tmp_path), 0, names), (sound, 0, ("video",))]))
        assert time.monotonic() - start < 60
    for reading in found.values():
        assert reading.array is None or np.isfinite(reading.array).all()
    assert (FAILED in {reading.state for reading in found.values()}) == (bomb not in SLOW)
    assert after["video"].state == PRESENT
    assert watched[0] < most_gb * 2**30


@pytest.mark.parametrize("kind", ["ffconcat", "m3u8"])
def test_file_that_names_other_files_is_refused(kind, tmp_path, sample):
    with av.open(str(sample / "videos/clip_0000.mp4")) as film, av.open(str(tmp_path / "part.ts"), "w") as copy:
        stream = copy.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(film.streams.video[0]):
            if packet.size:
                packet.stream = stream
                copy.mux(packet)
    texts = {
        "ffconcat": "ffconcat version 1.0\nfile part.ts\n",
        "m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:2,\npart.ts\n#EXT-X-ENDLIST\n",
    }
    (tmp_path / f"list.{kind}").write_text(texts[kind])
    clip = Clip("list", tmp_path / f"list.{kind}", 0.0, 0.8, {}, "a")
    with ReaderPool(1, DATA, patience_s=60) as pool:
        (reading,) = pool.submit([(clip, 0, ("video",))])[0].result().values()
    assert reading.state == FAILED
    assert "is a list of other files" in reading.reason
