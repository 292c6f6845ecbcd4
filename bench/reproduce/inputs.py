"""What the runs of one data set start from: clips, settings, the teacher's sound encoder, first weights."""

import csv
import json
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from karmma.data.publish import written_by
from karmma.data.sample import write_sample
from plan import Scale
from safetensors.torch import load_file, save_file

WHISPER_S = 5  # of sound that the teacher's encoder looks at, not 30: the clips have 0.2 to 1.5
POSITIONS = "embed_positions.weight"


def prepare(name: str, settings: str, folder: Path, shared: Path, results: Path, scale: Scale) -> None:
    """Write clips and settings of a data set into a folder, the same ones every time.

    shared: clips and pretrained weights.  results: where the weights are kept that students start from.
    """
    (folder / "start").mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    (folder / "karmma.toml").write_text(settings.replace("SHARED", str(shared)).replace("KEPT", str(results)))
    _shorten_whisper(shared / "weights/whisper_tiny_en_encoder", folder / f"whisper-{WHISPER_S}s")
    if name == "grid":
        _copy_rows(shared / "data/grid/word_clips.csv", folder / "clips.csv", scale.keep_every)
        some = _rows(folder / "clips.csv")
    else:
        write_sample(folder / "sample", scale.n_sample)
        some = _rows(folder / "sample/clips.csv")
        for row in some[1:]:  # a table that lies elsewhere
            row[1] = f"sample/{row[1]}"
    for name, n in (("uncached", scale.n_uncached), ("few", scale.n_few)):
        _write(folder / f"{name}.csv", [some[0], *some[1 :: len(some) // n][:n]])


def best_settings(folder: Path, sweep: Mapping[str, Any]) -> None:
    """Write best.toml, the settings of a data set with those that its sweep chose."""
    settings = tomllib.loads((folder / "karmma.toml").read_text(encoding="utf-8"))
    settings["teacher"] |= {"epochs": sweep["epochs"], **sweep["chosen"]}
    (folder / "best.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")


def start_weights(run: Path, path: Path) -> None:
    """Write the only backbone of a run, at its best epoch, as weights to start from; float16, since they are kept."""
    tensors = load_file(run / "best.safetensors")
    found = {name.split(".", 2)[2]: value for name, value in tensors.items() if name.startswith("backbones.")}
    kept = {name: value.half() if value.is_floating_point() else value for name, value in found.items()}
    with written_by(path) as half:
        save_file(kept, half)


def _copy_rows(table: Path, into: Path, keep_every: int) -> None:
    """Copy the words of one in `keep_every` sentences."""
    header, *rows = _rows(table)
    sentences = list(dict.fromkeys(row[1] for row in rows))
    kept = set(sentences[::keep_every])
    _write(into, [header, *(row for row in rows if row[1] in kept)])


def _rows(table: Path) -> list[list[str]]:
    with open(table, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _write(table: Path, rows: list[list[str]]) -> None:
    with open(table, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _shorten_whisper(folder: Path, into: Path) -> None:
    """Copy an encoder with fewer positions: it looks at less silence behind a clip, for a tenth of the time."""
    into.mkdir(exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["max_source_positions"] = 50 * WHISPER_S
    (into / "config.json").write_text(json.dumps(config, indent=1))
    shutil.copy(folder / "preprocessor_config.json", into)
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith(POSITIONS))
    tensors[name] = tensors[name][: config["max_source_positions"]].clone()
    save_file(tensors, into / "model.safetensors", metadata={"format": "pt"})
