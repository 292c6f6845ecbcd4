"""Predict raw files with a finished student, from whatever of its modalities they have."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from ..data.annotations import Clip
from ..data.config import DataConfig
from ..data.device import choose_device, enough_memory
from ..data.errors import ConfigError, MediaError
from ..data.footage import footage_clip, length_s
from ..data.media import Reading
from ..data.modality import ABSENT, FAILED, PRESENT, in_order
from ..data.raw import read_clip
from ..data.readers import ReaderPool, Readings
from ..data.runs import RunFolder
from ..data.views import draw_view
from .model import ClipModel
from .prediction import Failure, Prediction, failure
from .student import load_student
from .timeline import windows

READ_AHEAD = 2  # batches
BATCH = 8
# Why a modality without a source is missing.
NOT_GIVEN = {
    "detections": "no boxes were given",
    "flow": "this student saw released flow, and none was given",
}


def load(
    run: str | os.PathLike[str], device: str = "auto", flow_weights: str | os.PathLike[str] | None = None
) -> "Predictor":
    """Return a predictor of a finished student's run folder.

    device: a torch device, or auto: CUDA where there is one.  flow_weights: the weights file of RAFT, for a student
    whose flow was computed with it.  Raises RunError if the run is missing, unfinished, damaged or a teacher's, and
    ConfigError for a device that is not there.
    """
    on, folder = choose_device(device), RunFolder.open(Path(run))
    student, data, described = load_student(folder, on, Path(flow_weights) if flow_weights else None)
    return Predictor(student, data, {head: tuple(names) for head, names in described["classes"].items()}, on)


class Predictor:
    """A student in evaluation mode: raw files in, probabilities out.

    modalities: those that it knows.  classes: head -> names, in the order of the probabilities.
    """

    def __init__(
        self, student: ClipModel, data: DataConfig, classes: Mapping[str, tuple[str, ...]], device: torch.device
    ) -> None:
        self.student, self.data, self.classes, self.device = student, data, dict(classes), device
        self.modalities = student.modalities

    def predict(
        self,
        path: str | os.PathLike[str],
        modalities: Iterable[str] | None = None,
        start_s: float = 0.0,
        stop_s: float | None = None,
        *,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        rates: Mapping[str, float] | None = None,
        allow_failures: bool = False,
    ) -> Prediction:
        """Predict one film, or a stretch of it, from what it has of the modalities: by default all the student knows.

        path: a media file, a folder of numbered frames, or `pack.h5::dataset`.  stop_s: None for the end.  files,
        rates: see `data.footage.footage_clip`.  Raises MediaError, by name, if nothing of it is there, or if a
        modality cannot be read; with allow_failures that one counts as missing, as long as another is there.
        Raises ConfigError on a modality that the student does not know.
        """
        clip = footage_clip(path, self.data, (start_s, stop_s), files, rates)
        said = self.answer(clip, self.read(clip, self.known(modalities)), allow_failures)
        if isinstance(said, Failure):
            raise MediaError(str(said))
        return said

    def read(self, clip: Clip, modalities: Sequence[str], pool: ReaderPool | None = None) -> dict[str, Reading]:
        """Return the clean view of a clip in each of some modalities, read in this process or by a reader of `pool`."""
        asked, found = _split(clip, modalities)
        if asked and pool:
            (future,) = pool.submit([(clip, 0, asked)])
            found |= future.result()
        elif asked:
            found |= read_clip(clip, draw_view(clip.clip_id, 0, self.data), asked, self.data)
        return found

    def answer(self, clip: Clip, readings: Mapping[str, Reading], allow_failures: bool = False) -> Prediction | Failure:
        """Return what is said of a clip from readings of it: all that `read` gave, or some."""
        (said,) = self._said([clip], [readings], allow_failures)
        return said

    def timeline(
        self,
        path: str | os.PathLike[str],
        window_s: float = 2.0,
        stride_s: float | None = None,
        modalities: Iterable[str] | None = None,
        *,
        files: Mapping[str, str | os.PathLike[str]] | None = None,
        rates: Mapping[str, float] | None = None,
        allow_failures: bool = False,
    ) -> Iterator[Prediction]:
        """Yield a prediction for each window of a film, in order; see `timeline.windows` and `predict`."""
        clips = self.windows(footage_clip(path, self.data, (0.0, None), files, rates), window_s, stride_s)
        for said in self.predict_all(clips, modalities, allow_failures=allow_failures):
            if isinstance(said, Failure):
                raise MediaError(str(said))
            yield said

    def windows(self, clip: Clip, window_s: float, stride_s: float | None = None) -> list[Clip]:
        """Return a clip for each window of a clip's film; raises MediaError if the film cannot be read."""
        spans = windows(length_s(clip), window_s, window_s if stride_s is None else stride_s)
        return [
            Clip(clip.clip_id, clip.video, start_s, stop_s, clip.sources, clip.video_id, clip.rates)
            for start_s, stop_s in spans
        ]

    def predict_all(
        self,
        clips: Iterable[Clip],
        modalities: Iterable[str] | None = None,
        *,
        allow_failures: bool = False,
        readers: int = 2,
        batch_size: int = BATCH,
        count: Callable[[int], None] = lambda n: None,
    ) -> Iterator[Prediction | Failure]:
        """Yield what is said of each clip, in order, read ahead by reader processes; each backbone runs once per clip.

        Clips of one video that follow each other are decoded together.  What cannot be predicted is a Failure, and
        ends nothing.  count: is told how many clips are done.
        """
        names, rest = self.known(modalities), iter(clips)
        waiting: deque[tuple[list[Clip], list[tuple[Future[Readings] | None, Readings]]]] = deque()
        with ReaderPool(readers, self.data) as pool:
            while True:
                while len(waiting) <= READ_AHEAD and (batch := list(islice(rest, batch_size))):
                    asked = [(clip, *_split(clip, names)) for clip in batch]
                    futures = iter(pool.submit([(clip, 0, due) for clip, due, _ in asked if due]))
                    waiting.append((batch, [(next(futures) if due else None, absent) for _, due, absent in asked]))
                if not waiting:
                    return
                batch, due = waiting.popleft()
                found = [absent | (future.result() if future else {}) for future, absent in due]
                said = self._said(batch, found, allow_failures)
                count(len(said))
                yield from said

    def known(self, modalities: Iterable[str] | None) -> tuple[str, ...]:
        """Return modalities in their order, all of the student's for None; a text names them with commas between.

        Raises ConfigError for one that the student does not know.
        """
        if modalities is None:
            return self.modalities
        names = in_order(map(str.strip, modalities.split(",")) if isinstance(modalities, str) else modalities)
        strange = [name for name in names if name not in self.modalities]
        if strange:
            raise ConfigError(
                f"This student does not know {', '.join(strange)}. Choose from {', '.join(self.modalities)}."
            )
        return names

    def _said(
        self, clips: Sequence[Clip], found: Sequence[Mapping[str, Reading]], allow_failures: bool
    ) -> list[Prediction | Failure]:
        """Return what is said of each clip, from its readings."""
        said: dict[int, Prediction | Failure] = {}
        good = []
        for at, (clip, readings) in enumerate(zip(clips, found, strict=True)):
            reason = self._refusal(clip, readings, allow_failures)
            if reason:
                said[at] = failure(clip, reason)
            else:
                good.append(at)
        probs = self._probs([found[at] for at in good]) if good else {}
        for row, at in enumerate(good):
            own = {head: values[row] for head, values in probs.items()}
            if all(np.isfinite(values).all() for values in own.values()):
                said[at] = self._prediction(clips[at], found[at], own)
            else:
                said[at] = failure(clips[at], "the student answers with what is no number. Train it again.")
        return [said[at] for at in range(len(clips))]

    def _refusal(self, clip: Clip, readings: Mapping[str, Reading], allow_failures: bool) -> str:
        """Return why a clip cannot be predicted, '' if it can."""
        failed = {name: reading.reason for name, reading in readings.items() if reading.state == FAILED}
        usable = any(reading.state == PRESENT for reading in readings.values())
        if failed and not (allow_failures and usable):
            plain = (reason.removeprefix(f"{clip.video}: ").rstrip(".") for reason in failed.values())
            said = "; ".join(dict.fromkeys(plain))
            advice = " Or predict from what is left with --allow-failures (allow_failures=True)." if usable else ""
            return f"{' and '.join(failed)} failed: {said}.{advice}"
        if usable:
            return ""
        why = "; ".join(f"{name}: {readings[name].reason}" for name in self.modalities if name in readings)
        return f"has none of the student's modalities that were asked for ({why}). Name another file."

    def _prediction(self, clip: Clip, readings: Mapping[str, Reading], probs: dict[str, np.ndarray]) -> Prediction:
        present = tuple(m for m in self.modalities if m in readings and readings[m].state == PRESENT)
        rest = [name for name in self.modalities if name not in present]
        missing = {name: readings[name].reason if name in readings else "not asked for" for name in rest}
        failed = tuple(name for name, reading in readings.items() if reading.state == FAILED)
        return Prediction(clip.clip_id, clip.start_s, clip.stop_s, probs, self.classes, present, missing, failed)

    @torch.inference_mode()
    def _probs(self, found: Sequence[Mapping[str, Reading]]) -> dict[str, np.ndarray]:
        """Return head -> float32 [B, N_h] of clips that all have something; each backbone runs once."""
        readings = {m: [f[m] for f in found if m in f] for m in self.modalities}
        arrays = {m: [r.array for r in some if r.array is not None] for m, some in readings.items()}
        has = [[m in f and f[m].state == PRESENT for m in self.modalities] for f in found]
        with enough_memory(f"{len(found)} clips", "Use a smaller --batch-size, or --device cpu."):
            present = torch.tensor(has, device=self.device)
            inputs = {m: torch.from_numpy(np.stack(some)).to(self.device) for m, some in arrays.items() if some}
            logits = self.student(inputs, present).logits
            return {head: values.float().softmax(1).cpu().numpy() for head, values in logits.items()}


def _split(clip: Clip, names: Sequence[str]) -> tuple[tuple[str, ...], dict[str, Reading]]:
    """Return the modalities to read, and the readings of those that have no source."""
    asked = tuple(name for name in names if clip.sources.get(name, clip.video) is not None)
    return asked, {name: Reading(ABSENT, None, NOT_GIVEN[name]) for name in names if name not in asked}
