"""How settings come together: default < preset < TOML < --set < option; all errors are said at once."""

import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import tomli_w
from pydantic import ValidationError

from .config import PATHS, StageConfig
from .errors import ConfigError, cause, nearest
from .modality import MODALITIES
from .places import is_address
from .publish import publish

PRESETS = ("tiny", "paper")
# Where settings come from, and section -> field -> value.
Layer = tuple[str, Mapping[str, Any]]


def read_toml(path: Path) -> dict[str, Any]:
    """Read a settings file; raise ConfigError with the line if it is missing or malformed."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such settings file. Name one with --config, or leave it out.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {cause(error)}. Name a settings file with --config.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file: {error}. Correct it and run again.") from None


def read_preset(name: str) -> dict[str, Any]:
    """Read one of the presets that come with the package."""
    if name not in PRESETS:
        raise ConfigError(f"Unknown preset {name!r}. {nearest(str(name), PRESETS)}")
    return tomllib.loads((resources.files(__package__) / "presets" / f"{name}.toml").read_text(encoding="utf-8"))


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, table by table."""
    out = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if both else value
    return out


def resolve(models: Mapping[str, type[StageConfig]], *layers: Layer) -> dict[str, Any]:
    """Merge named layers of settings, the later one winning, and validate every section.

    models: section name -> its model.  layers: (where it comes from, {section: {field: value}}).
    Returns section -> model instance.  Raises one ConfigError that lists every unknown name and unfit value.
    """
    merged: dict[str, Any] = {}
    wrong: list[str] = []
    for where, layer in layers:
        for section in set(layer) - set(models):
            wrong.append(f"{where}: unknown section [{section}]. {nearest(section, models)}")
        tables = {name: value for name, value in layer.items() if isinstance(value, Mapping)}
        for section in set(layer) & set(models) - set(tables):
            wrong.append(f"{where}: [{section}] must be a table, found {layer[section]!r}.")
        merged = _merged(merged, {name: value for name, value in tables.items() if name in models})
    out = {}
    for section, model in models.items():
        try:
            out[section] = model.model_validate(merged.get(section, {}))
        except ValidationError as error:
            wrong += [_said(section, model, layers, item) for item in error.errors()]
    if wrong:
        raise ConfigError("  ".join(wrong))
    return out


def _said(section: str, model: type[StageConfig], layers: Sequence[Layer], item: Any) -> str:
    """Turn one pydantic error into a line that names the layer, the field, the value and the next step."""
    path = [str(part) for part in item["loc"]]
    # What is wrong with fields together is said of those that the message names.
    about = path[:1] or [name for name in model.model_fields if re.search(rf"\b{name}\b", item["msg"])]
    sections = [(name, layer.get(section)) for name, layer in layers]
    where = [name for name, part in sections if isinstance(part, Mapping) and {*about} & {*part}]
    where = where or ["settings"]
    field = ".".join([section, *path])
    if item["type"] == "extra_forbidden":
        known = model.model_fields if len(path) == 1 else MODALITIES if len(path) == 2 else ()
        return f"{where[-1]}: unknown option {field}. {nearest(path[-1], known)}"
    message = item["msg"].removeprefix("Value error, ")
    message += "" if message.endswith((".", "?")) else "."
    given = f" = {item['input']!r}" if path else ""
    return f"{where[-1]}: {field}{given}: {message}"


def write_toml(path: Path, sections: Mapping[str, StageConfig]) -> None:
    """Write every field of the sections as a settings file that gives the same again, wherever it is read."""
    written = {}
    for section, config in sections.items():
        values = {name: _toml(value) for name, value in config.model_dump(mode="json").items()}
        # What is None by default is left out, since TOML has no None; what is not takes the word.
        defaults = {name: field.default for name, field in type(config).model_fields.items()}
        written[section] = {
            name: "none" if value is None else value
            for name, value in values.items()
            if value is not None or defaults[name] is not None
        }
    publish(path, tomli_w.dumps(rooted(written, Path.cwd())).encode())


def _toml(value: Any) -> Any:
    return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


def rooted(written: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Make the paths of a settings file relative to the file, not to where the command was given."""
    out = {section: dict(part) if isinstance(part, dict) else part for section, part in written.items()}
    for section, part in out.items():
        for name, value in part.items() if isinstance(part, dict) else ():
            if section == "data" and name in PATHS and isinstance(value, str) and not is_address(value):
                part[name] = str(folder / value)
            elif isinstance(value, dict):
                part[name] = rooted_backbone(value, folder)
    return out


def rooted_backbone(written: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a backbone's settings with weights that are a file, or a name hf:<folder>, below a folder."""
    out = dict(written)
    if (folder / str(written.get("weights"))).is_file():
        out["weights"] = str(folder / written["weights"])
    family, _, model = str(written.get("name")).partition(":")
    if family == "hf" and model and (folder / model).is_dir():
        out["name"] = f"hf:{folder / model}"
    return out


def assigned(text: str) -> dict[str, Any]:
    """Turn 'student.video.name=swin3d_s' into nested settings."""
    path, equals, value = text.partition("=")
    if not equals or "." not in path:
        raise ConfigError(f"--set {text}: expected section.field=value, such as --set teacher.max_lr=1e-4.")
    found: Any = value
    for name in reversed(path.strip().split(".")):
        found = {name: found}
    return found
