"""HDF5 packs: the encoded frames, or the sound, of many videos in one file, as `pack.h5::name`."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .errors import KarmmaError, MediaError, nearest
from .numbered import FrameFolder, NumberedFrames
from .places import StoredFile, is_local, place

if TYPE_CHECKING:
    import av
    import h5py

SUFFIXES = (".h5", ".hdf5")
RATE_NAMES = ("sample_rate", "sr")
MOST_HZ = 1e7


def split_pack(path: Path) -> tuple[Path, str] | None:
    """Return the file and the name within it that a path like `rgb.h5::P01/P01_06` stands for; None for other paths."""
    file, inside, name = str(path).partition("::")
    return (place(file), name) if inside or file.lower().endswith(SUFFIXES) else None


def open_frames(path: Path, fps: float | None) -> NumberedFrames:
    """Return the numbered frames in a folder or a pack, not opened yet."""
    return NumberedFrames(PackedPictures(path) if split_pack(path) else FrameFolder(path), fps)


class _Packed:
    """One dataset or group of a pack, opened when first needed, in the process that needs it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _found(self) -> "h5py.Dataset | h5py.Group":
        file, name = split_pack(self.path) or (self.path, "")
        if not name:
            raise MediaError(f"{file}: names no dataset. Write {file.name}::NAME, or ::{{video_id}} in a pattern.")
        with intact(self.path):
            self._file = self._file or _opened(file)
            found: Any = self._file
            for part in filter(None, name.split("/")):
                found = member(self.path, found, part)
        return found


def _opened(file: Path) -> "h5py.File":
    import h5py

    if not is_local(file):
        return h5py.File(StoredFile(file), "r")
    if not file.exists():
        raise MediaError(f"{file}: no such file. Put it there, or correct the clip table.")
    return h5py.File(file, "r", locking="best-effort")


@contextmanager
def intact(path: Path) -> Iterator[None]:
    """Turn whatever HDF5 says of a damaged file into one MediaError."""
    try:
        yield
    except KarmmaError:
        raise
    except FileNotFoundError:
        raise MediaError(f"{path}: no such file, expected HDF5. Correct the name.") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise MediaError(f"{path}: cannot be read as HDF5: {error}. Fetch the pack again.") from None


def member(path: Path, group: Any, name: str) -> Any:
    """Return a member of a group; links out of the file are not followed."""
    import h5py

    if not isinstance(group, h5py.Group) or name not in group:
        known = [key for key in group if isinstance(key, str)] if isinstance(group, h5py.Group) else []
        raise MediaError(f"{path}: no {name!r} in the pack. {nearest(name, known)}")
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise MediaError(f"{path}: {name!r} is a link. Copy what it stands for into the pack.")
    found = group[name]
    if isinstance(found, h5py.Dataset) and (found.external or found.is_virtual):
        raise MediaError(f"{path}: {name!r} keeps its data in another file. Copy it into the pack.")
    return found


class PackedPictures(_Packed):
    """Encoded frames in a pack: element i of a dataset is frame i + 1; members of a group have their own numbers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._source: Any = None
        self._names: dict[int, str] = {}

    @property
    def fps(self) -> float | None:
        """The attribute `fps`, where there is one."""
        with intact(self.path):
            stated = self._open().attrs.get("fps")
            return None if stated is None else float(stated)

    @property
    def numbers(self) -> np.ndarray:
        """All numbers, ascending."""
        import h5py

        source = self._open()
        with intact(self.path):
            if isinstance(source, h5py.Dataset):
                return np.arange(1, len(source) + 1)
            found = [] if self._names else [re.fullmatch(r".*?([0-9]+)(\.\w+)?", str(name)) for name in source]
        if not self._names:
            self._names = {int(match[1]): match[0] for match in found if match}
        return np.array(sorted(self._names), np.int64)

    def read(self, number: int) -> bytes:
        """Return one encoded picture; raises MediaError for an element that is empty."""
        source = self._open()
        with intact(self.path):
            found = member(self.path, source, self._names[number])[()] if self._names else source[number - 1]
        data = found if isinstance(found, bytes) else np.asarray(found).tobytes()
        if not data:
            raise MediaError(f"{self.path}: {self.name(number)} is empty. Fetch the pack again.")
        return data

    def name(self, number: int) -> str:
        """Return what a message calls a frame."""
        return self._names.get(number, f"frame {number}")

    def close(self) -> None:
        """Close the file."""
        self._source = None
        super().close()

    def _open(self) -> Any:
        import h5py

        if self._source is None:
            found = self._found()
            with intact(self.path):
                if isinstance(found, h5py.Dataset) and found.ndim != 1:
                    raise MediaError(f"{self.path}: has shape {found.shape}, expected one encoded picture an element.")
            self._source = found
        return self._source


class PackedSound(_Packed):
    """A waveform in a pack: [n], [channels, n] or [n, channels], floats in -1..1 or integers of their full range.

    hz: samples a second; None if an attribute `sample_rate` states it.
    """

    def __init__(self, path: Path, hz: float | None) -> None:
        super().__init__(path)
        self.broken, self._given = "", hz

    @property
    def has_sound(self) -> bool:
        """Whether there is any sample."""
        found = self._found()
        with intact(self.path):
            return getattr(found, "size", 1) > 0  # what is no dataset has to be said, when it is read

    def sound_frames(self, from_s: float) -> "Iterator[tuple[float, av.AudioFrame]]":
        """Yield (time, frame) of a second each, mono, the first at or before `from_s`; only these are read."""
        import av
        import h5py

        self.broken, dataset = "", self._found()
        with intact(self.path):
            if not isinstance(dataset, h5py.Dataset) or dataset.ndim not in (1, 2) or dataset.dtype.kind not in "fi":
                raise MediaError(f"{self.path}: expected a dataset of samples, [n] or [channels, n]. Correct the path.")
            hz = self._hz(dataset)
        along = int(np.argmax(dataset.shape))
        for start in range(int(max(from_s, 0.0)) * hz, dataset.shape[along], hz):
            with intact(self.path):
                values = dataset[(slice(None),) * along + (slice(start, start + hz),)]
            mono = values.astype(np.float32)
            if values.dtype.kind == "i":
                mono /= np.float32(np.iinfo(values.dtype).max + 1)
            mono = mono if mono.ndim == 1 else mono.mean(axis=1 - along)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(mono[None]), format="fltp", layout="mono")
            frame.sample_rate = hz
            yield start / hz, frame

    def _hz(self, dataset: "h5py.Dataset") -> int:
        stated = self._given or next((dataset.attrs[name] for name in RATE_NAMES if name in dataset.attrs), None)
        if stated is None:
            raise MediaError(f"{self.path}: does not say its samples a second. Set audio_hz.")
        if not 1 <= float(stated) <= MOST_HZ:
            raise MediaError(f"{self.path}: says {stated} samples a second, expected 1 to {MOST_HZ:.0e}. Set audio_hz.")
        return round(float(stated))
