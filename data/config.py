"""Settings of the data room, and how every stage declares its own: each default says where it comes from."""

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .errors import ConfigError
from .modality import in_order, is_own
from .places import is_address

# What `video_files` and its like may name of a clip.
FILE_FIELDS = ("video_id", "participant", "clip_id")
# Files and folders on this machine, and patterns of files: never part of what a run or a store was made from.
PATHS = ("table", "val_table", "test_table", "labels", "media", "flow_weights", "cache", "inputs", "runs")
PLACES = frozenset({*PATHS, "video_files", "flow_files", "audio_files", "detections_files"})
# Where a clip's files are is a matter of its row, not of what is made of them.
SOURCE = ("audio_files", "audio_hz")
COMPUTED_FLOW = ("flow_method", "flow_step_s", "flow_size", "flow_clamp_px")


class StageConfig(BaseModel):
    """Settings of one stage: frozen, and no field but the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None  # as for every validator of fields
        kind = cls.model_fields[info.field_name].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):
            raise ValueError("expected a value, not true or false")
        return value


def paper(default: Any, meaning: str, where: str, **limits: Any) -> Any:
    """A field whose default the paper states at `where`."""
    return Field(default, description=meaning, json_schema_extra={"source": f"paper, {where}"}, **limits)


def ours(default: Any, meaning: str, why: str, **limits: Any) -> Any:
    """A field whose default the paper does not state; `why` says what it rests on."""
    return Field(default, description=meaning, json_schema_extra={"source": f"ours: {why}"}, **limits)


def _parts(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _address(value: Any) -> Any:
    return Path(value) if isinstance(value, str) and not is_address(value) else value


# Several names: a list in TOML, or one text with commas between.
Names = Annotated[tuple[str, ...], BeforeValidator(_parts)]

# How many tokens are kept; TOML and the command line have no None, so they say "none".
Theta = Annotated[int | None, BeforeValidator(lambda value: None if value == "none" else value)]

# A folder of this machine, or an address such as s3://bucket/cache, whose slashes a Path would lose.
Place = Path | str


# A fixed part of the picture: left, top, right, bottom.
Box = tuple[int, int, int, int]


class DataConfig(StageConfig):
    """Which clips, and what a model sees of one: the same for teacher and student, so that views can be replayed."""

    table: Path | None = ours(
        None, "clip table: CSV, Parquet, or the official file of EPIC-KITCHENS or Something-Something", "for own data"
    )
    val_table: Path | None = ours(None, "official table of the validation split", "it is a file of its own")
    test_table: Path | None = ours(None, "official table of the test split, labelled or not", "it is a file of its own")
    labels: Path | None = ours(None, "Something-Something's labels.json", "else the one beside the table")
    prune: bool = paper(True, "leave out EPIC-KITCHENS clips whose noun is never trained", "sec. 4, Datasets")
    holdout: Literal["none", "clips", "videos"] = ours(
        "none", "split the training table in two, clip by clip or video by video; val_table is then the test split",
        "Epic-Kitchens* of the paper's sec. 4 is 'clips'",
    )  # fmt: skip
    holdout_share: float = paper(0.1, "share of the clips that holdout keeps for validation", "sec. 4", gt=0, lt=1)
    holdout_seed: int = ours(0, "seed of the holdout", "any number will do")
    media: Annotated[Place | None, BeforeValidator(_address)] = ours(
        None, "folder, or address in an object store, that the paths of clips start from", "else the table's folder"
    )
    video_files: str | None = ours(
        None, "where a clip's video is, such as {participant}/videos/{video_id}.MP4", "else the column 'video'"
    )
    flow_files: str | None = ours(None, "the same for released flow: folders of u/ and v/, or packs", "else computed")
    audio_files: str | None = ours(None, "the same for sound files", "else the video's own sound track")
    detections_files: str | None = ours(None, "the same for boxes; * finds a file in parts", "else no detections")
    video_fps: float | None = ours(None, "numbered frames a second, of every clip", "else the column", gt=0, lt=1e8)
    flow_fps: float | None = ours(None, "numbered flow frames a second, of every clip", "else the column", gt=0, lt=1e8)
    audio_hz: float | None = ours(None, "samples a second of packed sound", "else attribute or column", gt=0, lt=1e8)
    cache: Annotated[Place, BeforeValidator(_address)] = ours(
        Path("cache"), "folder of the cache, or its address in an object store, such as s3://bucket/cache", "README"
    )
    inputs: Path = ours(Path("inputs"), "folder of decoded clips, for a student that keeps them", "beside the cache")
    runs: Path = ours(Path("runs"), "folder that gets one folder a run", "README")
    heads: Names = paper(("verb", "noun"), "label columns of the table, one classifier each", "sec. 3.1")
    modalities: Names = paper(("video", "flow", "audio"), "modalities in use", "sec. 4, Epic-Kitchens")
    frames: int = ours(32, "time steps T of every modality", "reference configuration of the published GFLOPs", ge=2)
    size: int = ours(224, "height and width in pixels of video and flow", "as frames", ge=8)
    center_crop: float = ours(0.875, "side of the clean view's crop over the short side", "256 -> 224", gt=0, le=1)
    crop_min: float = ours(0.7, "smallest crop side of an augmented view over the short side", "not stated", gt=0, le=1)
    crop_box: Annotated[Box | None, BeforeValidator(_parts)] = ours(
        None, "x0,y0,x1,y1 in source pixels: the fixed part of the picture that views are cut from", "else all of it"
    )
    flip: bool = ours(False, "mirror half of the augmented views", "mirroring changes labels such as 'left to right'")
    view_seed: int = ours(0, "base seed of the augmented views", "any number will do")
    color_jitter: float = ours(
        0.2, "how far an augmented view may change brightness, contrast and saturation, as a share", "usual", ge=0, lt=1
    )
    flow_method: Literal["dis", "farneback", "raft_small", "raft_large", "released"] = ours(
        "dis", "optical flow computed from the video, or 'released': read from flow_files", "fast, no weights needed"
    )
    flow_weights: Path | None = ours(None, "weights file of RAFT", "nothing is downloaded")
    flow_step_s: float = ours(0.05, "seconds between the two frames of a flow pair", "EPIC: 3 frames at 60 fps", gt=0)
    flow_size: int = ours(256, "short side in pixels at which flow is computed", "EPIC's released flow: 256", ge=32)
    flow_clamp_px: float = ours(20.0, "flow in pixels that the largest value stands for", "Kinetics I3D: 20", gt=0)
    audio_rate: int = ours(16000, "samples per second", "recipe of the released baselines", ge=1000)
    audio_segment_s: float = ours(1.116, "seconds of sound around each frame time", "as audio_rate", gt=0)
    audio_hop: int = ours(80, "samples between spectrogram steps", "as audio_rate", ge=1)
    audio_window: int = ours(400, "samples in a spectrogram window", "25 ms at 16 kHz, the usual for AST", ge=16)
    audio_fft: int = ours(0, "samples of the transform; 0: the next power of two that fills every mel", "fast", ge=0)
    audio_mels: int = ours(128, "mel bins", "as audio_rate", ge=8)
    audio_steps: int = ours(224, "steps of one segment's spectrogram", "1.116 s at a hop of 80 samples", ge=8)
    audio_mask: float = ours(
        0.1, "largest share of mels, and of time, masked in an augmented view", "after SpecAugment", ge=0, lt=1
    )
    max_boxes: int = ours(8, "boxes kept per frame, best scores first", "Something-Else has at most 4 a frame", ge=1)

    @field_validator("inputs")
    @classmethod
    def _a_folder(cls, value: Path) -> Path:
        if ":/" in str(value):
            raise ValueError("decoded clips are kept on a disk of this machine: name a folder")
        return value

    @field_validator("modalities")
    @classmethod
    def _in_order(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return in_order(value)

    @field_validator("heads")
    @classmethod
    def _some_head(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value or len(set(value)) != len(value):
            raise ValueError("name at least one label column, each once")
        for name in value:
            if name == "loss" or "." in name:
                raise ValueError(f"a head cannot be called {name!r}: metrics and checkpoints need 'loss' and dots")
        return value

    @field_validator("crop_box")
    @classmethod
    def _some_pixels(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value and not (0 <= value[0] < value[2] and 0 <= value[1] < value[3]):
            raise ValueError("expected left, top, right, bottom in pixels, right and bottom the larger ones")
        return value

    @field_validator("video_files", "flow_files", "audio_files", "detections_files")
    @classmethod
    def _known_fields(cls, value: str | None) -> str | None:
        unknown = {*re.findall(r"{(.*?)}", value or "")} - {*FILE_FIELDS}
        if unknown:
            raise ValueError(f"{{{unknown.pop()}}} is not known; use {', '.join(f'{{{n}}}' for n in FILE_FIELDS)}")
        return value

    @model_validator(mode="after")
    def _flow_fits(self) -> Self:
        if self.flow_method.startswith("raft") and self.flow_weights is None:
            raise ValueError(f"flow_method {self.flow_method} needs flow_weights, a file of its weights")
        if self.flow_files is not None and self.flow_method != "released":
            raise ValueError(f"flow_files needs flow_method released, found {self.flow_method}; or leave it out")
        return self

    @model_validator(mode="after")
    def _window_fits(self) -> Self:
        if 0 < self.audio_fft < self.audio_window:
            raise ValueError(f"audio_fft is {self.audio_fft}, less than audio_window; set it to {self.audio_window}")
        return self

    @model_validator(mode="after")
    def _segment_fits(self) -> Self:
        steps, samples = self.audio_steps * self.audio_hop, self.audio_segment_s * self.audio_rate
        if abs(steps - samples) > self.audio_hop:
            raise ValueError(
                f"audio_steps * audio_hop is {steps} samples, audio_segment_s * audio_rate is {samples:.0f}; "
                f"they must agree within one hop, so set audio_steps to {round(samples / self.audio_hop)}"
            )
        return self

    @property
    def read_modalities(self) -> tuple[str, ...]:
        """Those modalities that are read from files."""
        return tuple(name for name in self.modalities if not is_own(name))

    def require_read(self) -> tuple[str, ...]:
        """Return the modalities that are read from files; raises ConfigError if there is none."""
        if not self.read_modalities:
            own = ", ".join(self.own_modalities)
            raise ConfigError(f"data.modalities: only {own}, which karmma cache import brings. Name one to be read.")
        return self.read_modalities

    @property
    def own_modalities(self) -> tuple[str, ...]:
        """Those modalities of one's own whose tokens are imported."""
        return tuple(filter(is_own, self.modalities))

    def input_shape(self, modality: str) -> tuple[int, ...]:
        """Return the shape of one clip's array: [T, 3, H, W], audio [T, mels, steps], detections [T, n, 6]."""
        return {
            "video": (self.frames, 3, self.size, self.size),
            "flow": (self.frames, 3, self.size, self.size),
            "audio": (self.frames, self.audio_mels, self.audio_steps),
            "detections": (self.frames, self.max_boxes, 6),
        }[modality]

    def input_settings(self, modality: str) -> dict[str, Any]:
        """Return the fields that decide what `modality` looks like; they are part of a cache's identity."""
        view = ("center_crop", "crop_min", "crop_box", "flip")
        heard = (name for name in type(self).model_fields if name.startswith("audio_"))
        own = {
            "video": ("size", *view, "color_jitter"),
            "flow": ("size", *view, *(("flow_method",) if self.flow_method == "released" else COMPUTED_FLOW)),
            "audio": tuple(name for name in heard if name not in SOURCE),
            "detections": (*view, "max_boxes"),
        }[modality]
        values = self.model_dump(mode="json")
        return {name: values[name] for name in ("frames", "view_seed", *own)}


def digest(value: Any) -> str:
    """Return 16 hex digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
