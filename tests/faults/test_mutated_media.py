"""Media files cut short and with bits flipped, read as the product reads them: that clip fails, and nothing else."""

import random
import shutil
import wave
from collections import Counter
from pathlib import Path

import av
import h5py
import numpy as np
import pytest
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.readers import ReaderPool

DATA = DataConfig(
    frames=4, size=32, flow_size=32, max_boxes=3, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32
)
N_FILES, BATCH, PATIENCE_S = 2000, 40, 10
STOP_S, FPS = 0.8, 25.0


@pytest.fixture(scope="module")
def fine(sample, tmp_path_factory):
    """One file or folder of each kind, all of them sound."""
    folder = tmp_path_factory.mktemp("fine")
    shutil.copy(sample / "videos/clip_0000.mp4", folder / "a.mp4")
    shutil.copy(sample / "boxes/clip_0000.json", folder / "a.json")
    with av.open(str(folder / "a.mp4")) as film:
        pictures = [frame.to_image() for frame in film.decode(video=0)][:20]
    (folder / "frames").mkdir()
    jpegs = []
    for at, picture in enumerate(pictures):
        picture.save(folder / f"frames/{at + 1:04d}.jpg")
        jpegs.append((folder / f"frames/{at + 1:04d}.jpg").read_bytes())
    sound = (8000 * np.sin(np.arange(16_000) / 7)).astype(np.int16)
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16_000)
        file.writeframes(sound.tobytes())
    with h5py.File(folder / "a.h5", "w") as pack:
        frames = pack.create_dataset("frames", (len(jpegs),), h5py.vlen_dtype(np.uint8))
        for at, jpeg in enumerate(jpegs):
            frames[at] = np.frombuffer(jpeg, np.uint8)
        pack.create_dataset("sound", data=sound, chunks=(1000,), compression="gzip").attrs["sample_rate"] = 16_000
    return folder


def asked(kind: str, path: Path, fine: Path):
    """Return the order that reads a file of a kind, or the folder that holds it."""
    video, sources, rates, names = fine / "a.mp4", {}, {}, ("video", "flow", "audio")
    if kind == "mp4":
        video = path
    elif kind == "wav":
        sources, names = {"audio": path}, ("audio",)
    elif kind == "json":
        sources, names = {"detections": path}, ("detections",)
    elif kind == "jpg":
        video, rates, names = path.parent, {"video": FPS}, ("video", "flow")
    else:
        video, sources, rates = Path(f"{path}::frames"), {"audio": Path(f"{path}::sound")}, {"video": FPS}
        names = ("video", "audio")
    name = (path.parents[1] if kind == "jpg" else path.parent).name
    return Clip(name, video, 0.0, STOP_S, sources, "a", rates), 0, names


def place_for(kind: str, folder: Path, fine: Path) -> tuple[Path, bytes]:
    """Return where a file of a kind goes in a folder, and what a sound one holds."""
    folder.mkdir()
    if kind != "jpg":
        return folder / f"a.{kind}", (fine / f"a.{kind}").read_bytes()
    shutil.copytree(fine / "frames", folder / "frames")
    # Frames 3, 8, 13 and 18 are on display at the four times of a clip.
    return folder / "frames/0008.jpg", (fine / "frames/0008.jpg").read_bytes()


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Return bytes cut short, with bits flipped, a part overwritten, doubled or taken out; headers most of all."""
    found, how = bytearray(data), draw.choice(("cut", "flip", "flip", "header", "zero", "noise", "double", "drop"))
    at = draw.randrange(len(found))
    n = min(draw.choice((1, 4, 64, 1024)), len(found) - at)
    if how == "cut":
        del found[at:]
    if how in ("flip", "header"):
        for _ in range(draw.choice((1, 3, 30))):
            found[draw.randrange(len(found) if how == "flip" else min(300, len(found)))] ^= 1 << draw.randrange(8)
    if how in ("zero", "noise"):
        found[at : at + n] = bytes(n) if how == "zero" else draw.randbytes(n)
    if how == "double":
        found[at:at] = found[at : at + n]
    if how == "drop":
        del found[at : at + n]
    return bytes(found)


def require_sane(readings, names, where):
    """Require of every reading the shape it must have, or one line that names the file."""
    assert {*readings} == {*names}
    # Damage may hide a track as if there had never been one, but not all of them.
    assert len(names) == 1 or any(reading.state != ABSENT for reading in readings.values()), readings
    for name, reading in readings.items():
        if reading.state == PRESENT:
            assert reading.array.shape == DATA.input_shape(name)
            assert np.isfinite(reading.array.astype(np.float32)).all()
            continue
        assert reading.array is None
        assert reading.state in (ABSENT, FAILED)
        if reading.state == FAILED:
            assert str(where) in reading.reason
            assert reading.reason.isprintable()


def read_mutated(fine, folder, n_files):
    """Read so many mutated files, and a sound one after each few; return how many readings ended in which state.

    Some damage sends HDF5 round in circles without end: such a reader is ended when its time is over.
    """
    draw, counts, kinds = random.Random(1), Counter(), ("mp4", "mp4", "wav", "json", "h5", "jpg")
    sound = asked("mp4", fine / "a.mp4", fine)
    with ReaderPool(2, DATA, PATIENCE_S) as pool:
        wanted = pool.submit([sound])[0].result()
        assert {reading.state for reading in wanted.values()} == {PRESENT}
        for first in range(0, n_files, BATCH):
            orders = []
            for at in range(first, min(first + BATCH, n_files)):
                kind = kinds[at % len(kinds)]
                path, data = place_for(kind, folder / f"m{at}", fine)
                path.write_bytes(mutated(data, draw))
                orders += [(kind, asked(kind, path, fine)), *([("sound", sound)] if at % 5 == 4 else [])]
            found = [future.result(BATCH * PATIENCE_S) for future in pool.submit([order for _, order in orders])]
            for (kind, (clip, _, names)), readings in zip(orders, found, strict=True):
                if kind == "sound":
                    assert all(readings[name].array.tobytes() == wanted[name].array.tobytes() for name in names)
                    continue
                require_sane(readings, names, folder / clip.clip_id if names != ("audio",) else clip.clip_id)
                for reading in readings.values():
                    counts.update([reading.state, (kind, reading.state)])
                    counts["late"] += f"did not end within {PATIENCE_S} s" in reading.reason
            for made in folder.iterdir():
                shutil.rmtree(made)
    assert all(counts[kind, state] for kind in kinds for state in (PRESENT, FAILED)), counts
    return counts


def test_two_hundred_mutated_files_fail_by_themselves(fine, tmp_path):
    counts = read_mutated(fine, tmp_path, 200)
    assert counts[FAILED] > 50
    assert counts[PRESENT] > 50


@pytest.mark.slow
def test_two_thousand_mutated_files_fail_by_themselves(fine, tmp_path):
    counts = read_mutated(fine, tmp_path, N_FILES)
    assert counts[PRESENT] > 500
    assert counts[FAILED] > 500
    assert counts["late"] < 5
