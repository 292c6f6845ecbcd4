"""A trained student as a folder that can be shared: safetensors, config.json and a model card; here or on the hub."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import ModelCard, ModelHubMixin, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..data.errors import ConfigError, ExportError, KarmmaError, RunError, one_line
from ..data.publish import publish, publish_folder, publish_json, read_json
from ..data.runs import RunFolder
from ..fuse.model import FusionOutput
from .card import model_card
from .model import ClipModel
from .student import filled_student, student_settings

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
# Names that a model's pickled weights go by.
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
# The bases are those of the HTTP library that the hub's client uses, which has been several.
THEIRS = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
HUB_ERRORS: tuple[type[Exception], ...] = (HFValidationError, HfHubHTTPError, *THEIRS, OSError)
KEPT = ("epoch", "val", "parameters")  # of a run's result; the rest names clips
KEPT_ROWS = ("split", "views", "majority", "rows")  # of an evaluation


class StudentHub(nn.Module, ModelHubMixin, library_name="karmma", tags=["karmma", "video-classification"]):
    """A student with `save_pretrained`, `from_pretrained` and `push_to_hub`, in evaluation mode.

    student: as `load_student` gives it.  config: the run's config.json, and beside it `run`, the name of the run;
    `result` and `evaluations`, of which the model card tells; `license`, or None.
    """

    def __init__(self, student: ClipModel, config: dict[str, Any]) -> None:
        super().__init__()
        self.student, self.config = student, config
        self.eval()

    @classmethod
    def of_run(cls, run: RunFolder, licence: str | None = None) -> Self:
        """Return the best student of a finished run; raises RunError as `load_student`."""
        described, result = run.config, run.result
        student = filled_student(described, run.load_checkpoint("best"), run.path)
        found = [read_json(path) for path in sorted((run.path / "evaluation").glob("*.json"))]
        about = {
            "run": run.path.name,
            "result": {name: result[name] for name in KEPT if name in result},
            "evaluations": [{name: each[name] for name in KEPT_ROWS} for each in found if {*KEPT_ROWS} <= {*each}],
            "license": licence,
        }
        return cls(student, {**described, **about})

    @property
    def modalities(self) -> tuple[str, ...]:
        """The order of the columns of `present`."""
        return self.student.modalities

    @property
    def classes(self) -> dict[str, list[str]]:
        """Head -> names of its classes, in the order of its logits."""
        return self.config["classes"]

    def forward(self, inputs: Mapping[str, Tensor], present: Tensor) -> FusionOutput:
        """Return logits by head [B, N_h]; see `ClipModel.tokens` for the arguments."""
        return self.student(inputs, present)

    def _save_pretrained(self, save_directory: Path) -> None:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.student.state_dict().items()}
        publish(save_directory / WEIGHTS, save(tensors, {"format": "pt"}))
        publish_json(save_directory / CONFIG, self.config)

    def generate_model_card(self, *_: Any, repo: str = "path/or/name", **__: Any) -> ModelCard:
        """Return the card, filled in from the run; repo: what its example loads."""
        return ModelCard(model_card(self.config, self.student, type(self)._hub_mixin_info.model_card_data, repo))

    def push_to_hub(self, repo_id: str, **how: Any) -> str:
        """Send the folder that `save_pretrained` writes; see `ModelHubMixin.push_to_hub` for the options.

        Raises ExportError if the hub cannot be reached, or does not let it in.
        """
        how["model_card_kwargs"] = {"repo": repo_id, **(how.get("model_card_kwargs") or {})}
        try:
            return super().push_to_hub(repo_id, **how)
        except KarmmaError:  # of the folder that is to be sent
            raise
        except HUB_ERRORS as error:
            raise ExportError(f"{repo_id}: cannot be pushed: {one_line(error)[:200]}. Try again.") from None

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        classes: Mapping[str, Sequence[str]] | None = None,
        **how: Any,
    ) -> Self:
        """Load a student from a local folder, or by its name on the hub.

        classes: head -> names that the student must have, in their order; None takes what comes.  how: `device`, and
        the options of `ModelHubMixin.from_pretrained`.  Only safetensors are read.
        Raises RunError if there is no such student, if it is damaged or of another version, if its weights are
        pickled, and if it knows other labels.
        """
        name = str(pretrained_model_name_or_path)
        folder = Path(pretrained_model_name_or_path)
        looks_local = not isinstance(pretrained_model_name_or_path, str) or name.startswith((".", "/"))
        if folder.is_dir():
            if not (folder / CONFIG).is_file():
                raise RunError(f"{name}: no student here (no {CONFIG}). Name a folder that save_pretrained wrote.")
            with _hub_errors(name):
                student_settings(json.loads((folder / CONFIG).read_text(encoding="utf-8")), name)
        elif looks_local or folder.exists() or name.count("/") > 1:
            raise RunError(f"{name}: no such folder. Name one that save_pretrained wrote.")
        with _hub_errors(name):
            found = super().from_pretrained(name, **how)
        if classes is not None:
            _require_classes(name, found.classes, classes)
        return found

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, config: dict[str, Any] | None = None, device: str | torch.device = "cpu", **hub: Any
    ) -> Self:
        path = Path(model_id) / WEIGHTS
        if not Path(model_id).is_dir():
            path = Path(hf_hub_download(repo_id=model_id, filename=WEIGHTS, **hub))
        elif not path.is_file():
            pickled = [file.name for kind in PICKLED for file in sorted(Path(model_id).glob(kind))]
            if pickled:
                raise RunError(
                    f"{model_id}: its weights are pickled ({pickled[0]}), which is never read: unpickling runs code. "
                    f"Ask for {WEIGHTS}."
                )
            raise RunError(f"{path}: no such weights file. Save the student again.")
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise RunError(f"{path}: damaged: {error}. Save or fetch it again.") from None
        described = config or {}  # which is refused, like any that is not ours
        return cls(filled_student(described, tensors, model_id), described).to(device)


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what the hub, or a damaged config.json, ends in into an error of ours."""
    try:
        yield
    except KarmmaError:
        raise
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{name}: {CONFIG} is damaged: {one_line(error)}. Save or fetch it again.") from None
    except HUB_ERRORS as error:
        raise RunError(
            f"{name}: no such folder, and no student of that name can be had from the hub: {one_line(error)[:200]}. "
            "Name a folder that save_pretrained wrote, or owner/name."
        ) from None


def _require_classes(name: str, found: Mapping[str, Sequence[str]], wanted: Mapping[str, Sequence[str]]) -> None:
    """Raise RunError unless a student knows exactly these labels in this order."""
    if sorted(found) != sorted(wanted):
        raise RunError(
            f"{name}: other labels: its heads are {', '.join(found)}, expected {', '.join(wanted)}. "
            "Choose another student."
        )
    for head, names in wanted.items():
        has, asked = list(found[head]), list(names)
        if has == asked:
            continue
        at = next((at for at, pair in enumerate(zip(has, asked, strict=False)) if pair[0] != pair[1]), None)
        differs = f"{len(has)} classes, expected {len(asked)}"
        if at is not None:
            differs = f"class {at} is {has[at]!r}, expected {asked[at]!r}"
        raise RunError(f"{name}: other labels: {head}: {differs}. Choose another student.")


def save_student(run: RunFolder, folder: Path | None = None, licence: str | None = None) -> Path:
    """Write a finished student as a folder for `from_pretrained` and the hub, by default `hub` in its run; return it.

    Whatever such a folder held before is replaced, as a whole; a folder with anything else in it is left alone.
    Raises RunError as `load_student`, ConfigError if something else is there.
    """
    folder = folder or run.path / "hub"
    strangers = _strangers(folder)
    if strangers:
        raise ConfigError(f"{folder}: something else is there ({strangers[0]}). Name another folder with --output.")
    student = StudentHub.of_run(run, licence)
    publish_folder(folder, student.save_pretrained, CONFIG)
    return folder


def _strangers(folder: Path) -> list[str]:
    if folder.is_dir():
        return sorted({path.name for path in folder.iterdir()} - {CONFIG, WEIGHTS, CARD, ".gitattributes"})
    return [folder.name] if folder.exists() else []
