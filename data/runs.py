"""A run folder: the resolved config, metrics as they come, and checkpoints without pickle."""

import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import RunError
from .leases import Leases
from .publish import publish, publish_json, read_json, sweep

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer
    from torch.utils.tensorboard import SummaryWriter

logger = logging.getLogger(__name__)


class RunFolder:
    """One training run on disk.

    `config.json` is written first and `result.json` last, so a folder without the latter is unfinished.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._events: SummaryWriter | None = None

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

    def require_free(self, resume: bool) -> None:
        """Raise RunError if a finished run is here, or one to go on with unless that is what is wanted."""
        if self.is_finished:
            raise RunError(f"{self.path}: a finished run is here already. Choose other settings or another --runs.")
        if self._state.exists() and not resume:
            raise RunError(
                f"{self.path}: this run was interrupted in epoch {self._about(self._state)['epoch']}. Go on with "
                "--resume, or remove the folder to begin anew."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes from training this run for the length of a block; raises RunError if one does."""
        with Leases(self.path / "leases") as leases:
            said, give_up = False, time.monotonic() + leases.lease_s + leases.beat_s
            while not leases.take("training"):
                if time.monotonic() > give_up:
                    raise RunError(f"{self.path}: another process is training this run. Wait for it, or end it.")
                if not said:
                    logger.warning("%s: another process has this run; watching for a minute if it lives", self.path)
                said = True
                time.sleep(1.0)
            yield

    def start(self, config: Mapping[str, Any], first_epoch: int = 0) -> None:
        """Begin, or go on from an epoch: the records before it stay.  Call `require_free` first."""
        sweep(self.path)
        publish_json(self.path / "config.json", config)
        metrics = self.path / "metrics.jsonl"
        kept = [record for record in self.metrics() if record["epoch"] < first_epoch] if metrics.exists() else []
        publish(metrics, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._close_events()
        shutil.rmtree(self.path / "tensorboard", ignore_errors=True)
        for record in kept:
            self._plot(record)

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `metrics.jsonl`, and its numbers to the TensorBoard events in `tensorboard/`."""
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._plot(record)

    def _plot(self, record: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if self._events is None:
            self._events = SummaryWriter(str(self.path / "tensorboard"))
        flat = {**record, **{f"val/{name}": value for name, value in record.get("val", {}).items()}}
        for name, value in flat.items():
            if name != "epoch" and isinstance(value, int | float):
                self._events.add_scalar(name, value, record["epoch"])
        self._events.flush()

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines of `metrics.jsonl`; the last one counts only if it was written to its end."""
        *lines, _ = (self.path / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
        return [json.loads(line) for line in lines]

    def save_checkpoint(self, name: str, tensors: "Mapping[str, Tensor]", about: Mapping[str, Any]) -> None:
        """Publish `<name>.safetensors` with `about` (JSON) as its metadata."""
        from safetensors.torch import save

        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        publish(self.path / f"{name}.safetensors", save(whole, {"about": json.dumps(about)}))

    def load_checkpoint(self, name: str) -> "dict[str, Tensor]":
        """Return the tensors of a checkpoint; raises RunError if it is not there, or damaged."""
        from safetensors.torch import load_file

        path = self.path / f"{name}.safetensors"
        if not path.exists():
            raise RunError(f"{path}: no such checkpoint. Train the run again.")
        with _sound(path):
            return load_file(path)

    def save_state(self, model: "nn.Module", optimizer: "Optimizer", about: Mapping[str, Any]) -> None:
        """Publish `state.safetensors`: all that a training needs to go on, until it is finished."""
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for at, kept in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{at}/{name}": tensor for name, tensor in kept.items()}
        self.save_checkpoint("state", tensors, about)

    def load_state(self, model: "nn.Module", optimizer: "Optimizer") -> dict[str, Any] | None:
        """Bring model and optimizer back to what was saved; return what was said of it, None if nothing was saved."""
        if not self._state.exists():
            return None
        weights: dict[str, Tensor] = {}
        kept: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.load_checkpoint("state").items():
            part, _, rest = name.partition("/")
            if part == "model":
                weights[rest] = tensor
            else:
                at, _, key = rest.partition("/")
                kept.setdefault(int(at), {})[key] = tensor
        model.load_state_dict(weights)
        optimizer.load_state_dict(optimizer.state_dict() | {"state": kept})
        return self._about(self._state)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write `result.json`, the mark of a finished run; there is then nothing left to go on with."""
        publish_json(self.path / "result.json", result)
        self._state.unlink(missing_ok=True)
        self._close_events()

    def _close_events(self) -> None:
        if self._events is not None:
            self._events.close()
        self._events = None

    @property
    def _state(self) -> Path:
        return self.path / "state.safetensors"

    @staticmethod
    def _about(path: Path) -> dict[str, Any]:
        from safetensors import safe_open

        with _sound(path), safe_open(path, "pt") as file:
            return json.loads(file.metadata()["about"])


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Raise RunError if what is read of a checkpoint within the block turns out to be damaged."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise RunError(f"{path}: damaged: {error}. Remove the run's folder, and train it again.") from None


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
