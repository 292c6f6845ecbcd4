"""Those who have the page of a student open: each one's clip, read once and asked about as often as they like."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..data.annotations import Clip
from ..data.errors import KarmmaError, MediaError
from ..data.footage import film_and_files, footage_clip, length_s
from ..data.media import Reading
from ..data.modality import PRESENT
from ..data.readers import ReaderPool
from ..data.views import draw_view, view_times
from . import page
from .prediction import Failure, Prediction
from .predictor import Predictor

logger = logging.getLogger(__name__)
MOST_VISITS = 32  # clips in memory: some 10 MB each at full size
NOTHING = "Every modality is switched off: the student has nothing to go by. Switch one on."
GONE = "This clip is no longer there. Drop it again."


@dataclass(frozen=True)
class Visit:
    """A clip as it was read, and what is said of it from everything that it has."""

    clip: Clip
    readings: dict[str, Reading]
    times: np.ndarray
    whole: Prediction

    @property
    def missing(self) -> dict[str, str]:
        """Why each modality that the clip lacks is not there."""
        lacking = {name: each for name, each in self.readings.items() if each.state != PRESENT}
        return {name: _bare(each.reason, self.clip) for name, each in lacking.items()}


class Visits:
    """Answers for the visitors of one student, each known by a key of their own."""

    def __init__(self, predictor: Predictor, pool: ReaderPool) -> None:
        self.predictor, self.pool = predictor, pool
        self._visits: dict[str, Visit] = {}
        self._paths: dict[str, set[Path]] = {}

    def begin(self, visitor: str, paths: Sequence[Path]) -> Visit:
        """Read a clip in place of the one before; raises KarmmaError if nothing can be said of it.

        paths: the clip and, if they are files of their own, its sound and boxes.  All files that the visitor gave
        before and does not give any more are deleted.
        """
        self._visits.pop(visitor, None)
        before, self._paths[visitor] = self._paths.get(visitor, set()), {*paths}
        self._delete(before)
        film, files = film_and_files(paths)
        for name in files:
            if name not in self.predictor.modalities:
                raise MediaError(f"{files[name].name}: this student does not know {name}. Leave it out.")
        clip = footage_clip(film, self.predictor.data, files=files)
        try:
            readings = self.predictor.read(clip, self.predictor.modalities, self.pool)
            whole = self._said(clip, readings)
            view = draw_view(clip.clip_id, 0, self.predictor.data)
            times = view_times(view, 0.0, length_s(clip))
        except KarmmaError as error:
            raise MediaError(_bare(str(error), clip)) from None
        self._visits[visitor] = Visit(clip, readings, times, whole)
        for oldest in [*self._visits][:-MOST_VISITS]:
            self.end(oldest)
        return self._visits[visitor]

    def answer(self, visitor: str, switched_on: Collection[str]) -> str:
        """Return what is said of a visitor's clip from some of its modalities, as HTML; nothing is read anew."""
        visit = self._visits.get(visitor)
        if visit is None:
            return page.error(GONE)
        readings = {name: each for name, each in visit.readings.items() if name in switched_on}
        if not readings:
            return page.error(NOTHING)
        try:
            return page.answer(self._said(visit.clip, readings), visit.whole)
        except KarmmaError as error:
            return page.error(_bare(str(error), visit.clip))

    def end(self, visitor: str) -> None:
        """Forget a visitor, and delete their files."""
        self._visits.pop(visitor, None)
        self._delete(self._paths.pop(visitor, set()))

    def _said(self, clip: Clip, readings: dict[str, Reading]) -> Prediction:
        said = self.predictor.answer(clip, readings, allow_failures=True)
        if isinstance(said, Failure):
            raise MediaError(str(said))
        return said

    def _delete(self, paths: set[Path]) -> None:
        """Delete files that nobody has on the page any more, each with the folder that was made for it."""
        for path in paths.difference(*self._paths.values()):
            try:
                path.unlink(missing_ok=True)
                path.parent.rmdir()
            except OSError as error:  # it goes with the temporary folder in the end
                logger.info("%s is not deleted yet: %s", path, error)


def _bare(text: str, clip: Clip) -> str:
    """Return a message that calls files by their names: where they lie on this machine is nobody's business."""
    for path in (clip.video, *filter(None, clip.sources.values())):
        text = text.replace(f"{path.parent}/", "")
    return text
