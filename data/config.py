"""Settings of the data room, and how every stage declares its own: each default says where it comes from."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from .modality import in_order


class StageConfig(BaseModel):
    """Settings of one stage: frozen, and no field but the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def paper(default: Any, meaning: str, where: str, **limits: Any) -> Any:
    """A field whose default the paper states at `where`."""
    return Field(default, description=meaning, json_schema_extra={"source": f"paper, {where}"}, **limits)


def ours(default: Any, meaning: str, why: str, **limits: Any) -> Any:
    """A field whose default the paper does not state; `why` says what it rests on."""
    return Field(default, description=meaning, json_schema_extra={"source": f"ours: {why}"}, **limits)


def _names(value: Any) -> Any:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


# Several names: a list in TOML, or one text with commas between.
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]


class DataConfig(StageConfig):
    """Which clips, and what a model sees of one: the same for teacher and student, so that views can be replayed."""

    table: Path | None = ours(None, "clip table (CSV); without one the sample data is used", "needed for own data")
    cache: Path = ours(Path("cache"), "folder of the cache", "README")
    runs: Path = ours(Path("runs"), "folder that gets one folder a run", "README")
    heads: Names = paper(("verb", "noun"), "label columns of the table, one classifier each", "sec. 3.1")
    modalities: Names = paper(("video", "flow", "audio"), "modalities in use", "sec. 4, Epic-Kitchens")
    frames: int = ours(32, "time steps T of every modality", "reference configuration of the published GFLOPs", ge=2)
    size: int = ours(224, "height and width in pixels of video and flow", "as frames", ge=8)
    center_crop: float = ours(0.875, "side of the clean view's crop over the short side", "256 -> 224", gt=0, le=1)
    crop_min: float = ours(0.7, "smallest crop side of an augmented view over the short side", "not stated", gt=0, le=1)
    flip: bool = ours(False, "mirror half of the augmented views", "mirroring changes labels such as 'left to right'")
    view_seed: int = ours(0, "base seed of the augmented views", "any number will do")
    flow_method: Literal["dis"] = ours("dis", "optical flow computed from the video", "fast, no weights needed")
    flow_step_s: float = ours(0.05, "seconds between the two frames of a flow pair", "EPIC: 3 frames at 60 fps", gt=0)
    flow_size: int = ours(256, "short side in pixels at which flow is computed", "EPIC's released flow: 256", ge=32)
    flow_clamp_px: float = ours(20.0, "flow in pixels that the largest value stands for", "Kinetics I3D: 20", gt=0)
    audio_rate: int = ours(16000, "samples per second", "recipe of the released baselines", ge=1000)
    audio_segment_s: float = ours(1.116, "seconds of sound around each frame time", "as audio_rate", gt=0)
    audio_hop: int = ours(80, "samples between spectrogram steps", "as audio_rate", ge=1)
    audio_window: int = ours(400, "samples in a spectrogram window", "25 ms at 16 kHz, the usual for AST", ge=16)
    audio_mels: int = ours(128, "mel bins", "as audio_rate", ge=8)
    audio_steps: int = ours(224, "steps of one segment's spectrogram", "1.116 s at a hop of 80 samples", ge=8)
    max_boxes: int = ours(8, "boxes kept per frame, best scores first", "Something-Else has at most 4 a frame", ge=1)

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

    @model_validator(mode="after")
    def _segment_fits(self) -> Self:
        steps, samples = self.audio_steps * self.audio_hop, self.audio_segment_s * self.audio_rate
        if abs(steps - samples) > self.audio_hop:
            raise ValueError(
                f"audio_steps * audio_hop is {steps} samples, audio_segment_s * audio_rate is {samples:.0f}; "
                f"they must agree within one hop, so set audio_steps to {round(samples / self.audio_hop)}"
            )
        return self

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
        crop = ("size", "center_crop", "crop_min", "flip")
        own = {"video": crop, "flow": (*crop, "flow_"), "audio": ("audio_",), "detections": (*crop[1:], "max_boxes")}
        wanted = ("frames", "view_seed", *own[modality])
        return {name: value for name, value in self.model_dump(mode="json").items() if name.startswith(wanted)}


def digest(value: Any) -> str:
    """Return 16 hex digits that stand for a JSON value, whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
