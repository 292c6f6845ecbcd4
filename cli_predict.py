"""`karmma predict`: classes of raw files, timelines of long ones, and videos with the predictions drawn in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from .cli_options import SOME_FAILED, Answer, Settings, chosen_student, out, tell, tell_some, with_options, would
from .data.config import DataConfig
from .data.errors import ConfigError, MediaError, printable
from .data.modality import letters
from .data.progress import watched

if TYPE_CHECKING:
    from .data.annotations import Clip
    from .distill.prediction import Failure, Prediction
    from .distill.predictor import Predictor

SHOWN = 20  # windows of a timeline; the CSV has them all
PLACES = ("data.runs", "data.flow_weights", "data.video_fps", "data.flow_fps", "data.audio_hz")


@with_options(*PLACES, needs_clips=False)
def predict(
    named: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="videos, sound files, packs, folders of frames or of all that"),
    ],
    *,
    settings: Settings,
    run: Annotated[Path | None, typer.Option(help="run folder of a student (default: the latest)")] = None,
    modalities: Annotated[
        list[str] | None, typer.Option("--modalities", "--modality", help="use only these, commas between them")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="classes of each head to show")] = 5,
    window: Annotated[float | None, typer.Option(help="seconds: predict window by window")] = None,
    stride: Annotated[float | None, typer.Option(help="seconds from window to window (default: --window)")] = None,
    csv: Annotated[Path | None, typer.Option(help="CSV to write (default with --window: FILE_timeline.csv)")] = None,
    video: Annotated[
        Path | None, typer.Option(help="write FILE with the predictions drawn in: .mp4, .mov, .mkv")
    ] = None,
    audio: Annotated[str | None, typer.Option(help="sound of FILE, if it is a file of its own")] = None,
    flow: Annotated[str | None, typer.Option(help="released flow of FILE: folder of u/ and v/, or pack")] = None,
    detections: Annotated[str | None, typer.Option(help="boxes of FILE: JSON")] = None,
    allow_failures: Annotated[
        bool, typer.Option("--allow-failures", help="what cannot be read of a file counts as missing")
    ] = False,
    readers: Annotated[int, typer.Option(min=1, help="processes that read files")] = 2,
    batch_size: Annotated[int, typer.Option(min=1, help="clips at a time")] = 8,
    device: Annotated[str, typer.Option(help="torch device")] = "auto",
) -> Answer:
    """Predict the classes of raw files, from whatever modalities they have.

    \b
    Examples:
      karmma predict clip.mp4
      karmma predict folder --run runs/student-1a2b3c4d --modality audio --json
      karmma predict day.mp4 --window 2 --stride 1 --video captioned.mp4
    """
    sources = {name: path for name, path in (("audio", audio), ("flow", flow), ("detections", detections)) if path}
    asked = _Asked(named, sources, window, stride, csv, video)
    folder = chosen_student(settings, run)
    from .distill.predictor import load

    predictor, said = load(folder.path, device, settings.data.flow_weights), _Said()
    chosen = predictor.known(",".join(modalities) if modalities else None)
    clips = asked.clips(predictor, settings.data, said)
    if settings.dry_run:
        if not clips:
            said.require_some()
        said.tell_failures()
        return would(f"Would predict {len(clips)} clips with {folder.path}", clips=len(clips), failed=said.failed)
    sizes = {"readers": readers, "batch_size": batch_size}
    with watched("predict", len(clips), "clips") as progress:
        said.take(predictor.predict_all(clips, chosen, allow_failures=allow_failures, count=progress.advance, **sizes))
    said.require_some()
    _print(said.good, top, SHOWN if window else len(said.good))
    is_drawn = asked.write(clips, said, top)
    is_whole = not said.tell_failures() and is_drawn
    records = {"predictions": [one.record(top) for one in said.good], "failed": [one.record() for one in said.failed]}
    tell(f"Next: karmma app {folder.path}, to switch modalities and see what the student is given")
    return Answer({"run": folder.path, **records}, 0 if is_whole else SOME_FAILED)


@dataclass
class _Said:
    """What came of the clips: predictions, and what could not be predicted."""

    good: "list[Prediction]" = field(default_factory=list)
    failed: "list[Failure]" = field(default_factory=list)

    def take(self, said: "Iterable[Prediction | Failure]") -> None:
        """Sort what is said of clips."""
        from .distill.prediction import Failure

        for one in said:
            if isinstance(one, Failure):
                self.failed.append(one)
            else:
                self.good.append(one)

    def fail(self, path: str, error: MediaError) -> None:
        """Note a file of which no clip can be made."""
        from .distill.prediction import Failure

        self.failed.append(Failure(path, 0.0, None, str(error)))

    def require_some(self) -> None:
        """Raise MediaError if nothing could be predicted."""
        if not self.good and len(self.failed) == 1:
            raise MediaError(str(self.failed[0]))
        if not self.good:
            tell_some([f"failed: {one}" for one in self.failed])
            raise MediaError(f"None of {len(self.failed)} can be predicted. Mend them, or name others.")

    def tell_failures(self) -> bool:
        """Name what failed, allowed to or not; return whether anything did."""
        allowed = [
            f"failed and counted as missing: {name} of {one.path}: {one.missing[name]}"
            for one in self.good
            for name in one.failed
        ]
        tell_some([*(f"failed: {one}" for one in self.failed), *allowed])
        return bool(self.failed or allowed)


@dataclass(frozen=True)
class _Asked:
    """What is to be predicted, and written; raises BadParameter for what makes no sense together."""

    named: list[str]
    sources: Mapping[str, str]
    window: float | None
    stride: float | None
    csv: Path | None
    video: Path | None

    def __post_init__(self) -> None:
        if self.stride is not None and self.window is None:
            raise typer.BadParameter("--stride is that of --window: give both.")
        if self.video is not None:
            from .data.captioned import require_format

            require_format(self.video)
        for path in filter(None, (self.csv, self.video)):
            if path.exists() and any(Path(name).exists() and path.samefile(name) for name in self.named):
                raise ConfigError(f"{path}: is the FILE itself, which stays as it is. Choose another name.")

    def clips(self, predictor: "Predictor", data: DataConfig, said: _Said) -> "list[Clip]":
        """Return the clips of all files, or their windows; files that cannot be opened are noted as failed."""
        from .data.footage import find_footage, footage_clip

        films: list[Path] = []
        for name in self.named:
            try:
                films += find_footage(name)
            except MediaError as error:
                said.fail(name, error)
        alone = [*(f"--{name}" for name in self.sources), *(["--video"] if self.video else [])]
        if alone and (len(self.named) > 1 or len(films) > 1):
            raise ConfigError(f"{', '.join(alone)}: for one FILE, found {max(len(films), len(self.named))}. Name one.")
        stated = {"video": data.video_fps, "flow": data.flow_fps, "audio": data.audio_hz}
        rates = {name: rate for name, rate in stated.items() if rate is not None}
        found: list[Clip] = []
        for film in films:
            try:
                clip = footage_clip(film, predictor.data, files=self.sources, rates=rates)
                found += [clip] if self.window is None else predictor.windows(clip, self.window, self.stride)
            except MediaError as error:
                said.fail(str(film), error)
        return found

    def write(self, clips: "list[Clip]", said: _Said, top: int) -> bool:
        """Write the CSV and the video; say so if the latter cannot be, and return whether all is well."""
        from .distill.timeline import write_timeline

        csv = self.csv
        if csv is None and self.window is not None:
            one_film = len({clip.video for clip in clips}) == 1
            csv = Path(f"{clips[0].video_id}_timeline.csv" if one_film else "timeline.csv")
        if csv is not None:
            write_timeline(csv, said.good, top)
            tell(f"Wrote {csv}: {len(said.good)} rows.")
        try:
            if self.video is not None:
                self._draw(clips[0], said, self.video)
        except MediaError as error:
            tell(f"failed: {self.video} was not written: {error}")
            return False
        return True

    def _draw(self, clip: "Clip", said: _Said, video: Path) -> None:
        from .data.captioned import write_captioned
        from .data.footage import length_s
        from .distill.timeline import captions

        with watched("draw", int(length_s(clip)), "s") as progress:
            n_frames = write_captioned(
                clip.video, clip.rates.get("video"), captions(said.good), video, progress.advance
            )
        tell(f"Wrote {video}: {n_frames} frames.")


def _print(said: "list[Prediction]", top: int, most: int) -> None:
    """Print a row a prediction, a column a head, in each the likeliest classes below each other."""
    from .distill.timeline import joined_actions

    with_action = bool(said[0].actions(1))
    table = Table("file", "seconds", "modalities")
    for head in [*said[0], *(["action"] if with_action else [])]:
        table.add_column(Text(head))
    for one in said[:most]:
        ranked = [*(one.top(head, top) for head in one), *([joined_actions(one, top)] if with_action else [])]
        cells = [Text("\n".join(f"{prob:6.1%} {printable(name)}" for name, prob in found)) for found in ranked]
        span = "all" if one.stop_s is None else f"{one.start_s:.2f} - {one.stop_s:.2f}"
        table.add_row(Text(printable(one.path)), span, letters(one.present), *cells, end_section=top > 1)
    out.print(table)
    if len(said) > most:
        tell(f"and {len(said) - most} more")
