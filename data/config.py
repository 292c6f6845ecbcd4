"""Settings: default < preset < TOML < option; the source of every default; all errors said at once."""

import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import ConfigError, nearest
from .modality import MODALITIES, in_order

PRESETS = ("tiny", "paper")


class StageConfig(BaseModel):
    """Settings of one stage: frozen, and no field but the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def paper(default: Any, meaning: str, where: str, **limits: Any) -> Any:
    """A field whose default the paper states at `where`."""
    return Field(default, description=meaning, json_schema_extra={"source": f"paper, {where}"}, **limits)


def ours(default: Any, meaning: str, why: str, **limits: Any) -> Any:
    """A field whose default the paper does not state; `why` says what it rests on."""
    return Field(default, description=meaning, json_schema_extra={"source": f"ours: {why}"}, **limits)


class DataConfig(StageConfig):
    """Which clips, and what a model sees of one: the same for teacher and student, so that views can be replayed."""

    table: Path | None = ours(None, "clip table (CSV); without one the sample data is used", "needed for own data")
    heads: tuple[str, ...] = paper(("verb", "noun"), "label columns of the table, one classifier each", "sec. 3.1")
    modalities: tuple[str, ...] = paper(("video", "flow", "audio"), "modalities in use", "sec. 4, Epic-Kitchens")
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
        return value

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


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file; raise ConfigError with the line if it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file. Name one with --config, or leave it out.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}. Correct it and run again.") from None


def read_preset(name: str) -> dict[str, Any]:
    """Read one of the presets that come with the package."""
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}. {nearest(name, PRESETS)}")
    return tomllib.loads((resources.files(__package__) / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, table by table."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def resolve(models: Mapping[str, type[StageConfig]], *layers: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge named layers of settings, the later one winning, and validate every section.

    models: section name -> its model.  layers: (where it comes from, {section: {field: value}}).
    Returns section -> model instance.  Raises one ConfigError that lists every unknown name and unfit value.
    """
    merged: dict[str, Any] = {}
    wrong: list[str] = []
    for where, layer in layers:
        for section in set(layer) - set(models):
            wrong.append(f"{where}: unknown section [{section}]. {nearest(section, models)}")
        merged = _merged(merged, {name: value for name, value in layer.items() if name in models})
    out = {}
    for section, model in models.items():
        try:
            out[section] = model.model_validate(merged.get(section, {}))
        except ValidationError as error:
            wrong += [_said(section, model, layers, item) for item in error.errors()]
    if wrong:
        raise ConfigError("  ".join(wrong))
    return out


def _said(section: str, model: type[StageConfig], layers: tuple[tuple[str, Mapping], ...], item: Any) -> str:
    """Turn one pydantic error into a line that names the layer, the field, the value and the next step."""
    path = [str(part) for part in item["loc"]]
    where = [name for name, layer in layers if path[0] in layer.get(section, {})] or ["settings"]
    field = ".".join([section, *path])
    if item["type"] == "extra_forbidden":
        known = model.model_fields if len(path) == 1 else MODALITIES if len(path) == 2 else ()
        return f"{where[-1]}: unknown option {field}. {nearest(path[-1], known)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where[-1]}: {field} = {item['input']!r}: {message}."
