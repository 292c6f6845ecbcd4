"""A run folder: the resolved config, metrics as they come, and checkpoints without pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError
from .publish import publish, publish_json, read_json

if TYPE_CHECKING:
    from torch import Tensor


class RunFolder:
    """One training run on disk.

    `config.json` is written first and `result.json` last, so a folder without the latter is unfinished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open a finished run; raises RunError if it is missing or unfinished."""
        run = cls(path)
        if not (path / "config.json").exists():
            raise RunError(f"{path}: no run here (no config.json). Train one, or name its folder.")
        if not run.is_finished:
            raise RunError(f"{path}: this run did not finish. Give the command that started it again.")
        return run

    @property
    def is_finished(self) -> bool:
        """Say whether the run came to its end."""
        return (self.path / "result.json").exists()

    @property
    def config(self) -> dict[str, Any]:
        """Return everything the run was made from."""
        return read_json(self.path / "config.json")

    @property
    def result(self) -> dict[str, Any]:
        """Return what the finished run reported."""
        return read_json(self.path / "result.json")

    def start(self, config: Mapping[str, Any]) -> None:
        """Begin, or begin again a run that never finished."""
        if self.is_finished:
            raise RunError(f"{self.path}: a finished run is here already. Choose other settings or another --runs.")
        publish_json(self.path / "config.json", config)
        (self.path / "metrics.jsonl").unlink(missing_ok=True)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]

    def save_checkpoint(self, name: str, tensors: "Mapping[str, Tensor]", about: Mapping[str, Any]) -> None:
        """Publish `<name>.safetensors` with `about` (JSON) as its metadata."""
        from safetensors.torch import save

        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        publish(self.path / f"{name}.safetensors", save(whole, {"about": json.dumps(about)}))

    def load_checkpoint(self, name: str) -> "dict[str, Tensor]":
        """Return the tensors of a checkpoint; raises RunError if it is not there."""
        from safetensors.torch import load_file

        path = self.path / f"{name}.safetensors"
        if not path.exists():
            raise RunError(f"{path}: no such checkpoint. Train the run again.")
        return load_file(path)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, the mark of a finished run."""
        publish_json(self.path / "result.json", result)


def finished_runs(runs: Path, kind: str) -> list[RunFolder]:
    """Return the finished runs of a kind ('teacher' or 'student'), the latest last."""
    found = [RunFolder(path.parent) for path in runs.glob(f"{kind}-*/result.json")]
    return sorted(found, key=lambda run: (run.path / "result.json").stat().st_mtime_ns)


def latest_run(runs: Path, kind: str) -> RunFolder:
    """Return the run of a kind that finished last; raises RunError if there is none."""
    found = finished_runs(runs, kind)
    if not found:
        command = {"student": "distill", "teacher": "train-teacher"}[kind]
        raise RunError(f"{runs}: no finished {kind} here. Run karmma {command}, or name a run folder.")
    return found[-1]
