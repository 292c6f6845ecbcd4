"""A trained student as one file for programs without KARMMA: a torch.export program, or ONNX.

Each is held against the student before it gets its name, and has a JSON beside it that says what goes in and comes out.
"""

import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from .. import __version__
from ..data.config import DataConfig, digest
from ..data.errors import ConfigError, ExportError, InstallationError, is_memory_short, memory_short, one_line
from ..data.modality import letters
from ..data.noise import noise
from ..data.publish import publish_json, read_json, written_by
from ..data.runs import RunFolder
from .agreement import Agreement, Answer, agreement
from .graph import PRESENT, traced
from .model import ClipModel
from .student import filled_student, student_backbones, student_settings

if TYPE_CHECKING:
    from torch.onnx import ONNXProgram

LIMIT = 1e-3  # the largest difference of a logit that is let pass
ONNX_BYTES = 2 * 10**9  # what one file can hold
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
BATCH = "batch"


@dataclass(frozen=True)
class ExportReport:
    """The file of an export, the JSON beside it, how it agrees with the student, and whether it was there already."""

    path: Path
    about: Path
    agreement: Agreement
    was_there: bool = False


def export_student(run: RunFolder, kind: str, path: Path | None = None) -> ExportReport:
    """Write a finished student as `path`, by default `student.pt2` or `student.onnx` in its run folder, and a JSON.

    kind: torch or onnx.  The file takes, for any number of clips, a tensor for each modality of the student and
    `present`, [B, M] bool, and gives logits for each head; the JSON, `<name>.json`, says shapes, dtypes, classes and
    how the inputs were prepared.  Neither file holds a pickle.  What was exported from exactly this is left as it is.
    Raises RunError as `load_student`, ExportError if the student cannot be exported or a logit of the export differs by
    more than LIMIT, InstallationError if a library is missing, and CacheError if nothing can be written there.
    """
    path = path or run.path / f"student{SUFFIXES[kind]}"
    if path.is_dir():
        raise ConfigError(f"{path}: a folder is there. Name a file with --output.")
    about = path.with_name(f"{path.name}.json")
    data, _ = student_settings(run.config, run.path)
    made_from = digest([kind, __version__, torch.__version__, run.config, run.result])
    known = read_json(about) if about.exists() and path.exists() else {}
    if known.get("made_from") == made_from and known["bytes"] == path.stat().st_size:
        return ExportReport(path, about, Agreement(**known["agreement"]), was_there=True)
    described = run.config
    student = filled_student(described, run.load_checkpoint("best"), run.path).requires_grad_(False)
    names = _backbone_names(described)
    with written_by(path) as temporary:
        found = agreement(student, WRITERS[kind](student, names, temporary))
        if not found.difference <= LIMIT:
            raise ExportError(
                f"{path}: not written: a logit of the export is {found.difference:.1e} from the student's, more than "
                f"{LIMIT:.0e}. Export in another format."
            )
    how: dict[str, Any] = {"format": kind, "run": run.path.name, "made_from": made_from, "agreement": asdict(found)}
    how["bytes"] = path.stat().st_size
    publish_json(about, {**how, **describe_export(student, data, described)})
    return ExportReport(path, about, found)


def describe_export(student: ClipModel, data: DataConfig, described: Mapping[str, Any]) -> dict[str, Any]:
    """Return what somebody without KARMMA has to know of a student's inputs and outputs, as JSON."""
    columns = list(student.modalities)
    inputs = {
        modality: {
            "dtype": str(noise(modality, data.input_shape(modality), 0).dtype),
            "shape": [BATCH, *data.input_shape(modality)],
            "made": described.get("inputs", {}).get(modality),
        }
        for modality in columns
    }
    return {
        "karmma": __version__,
        "torch": torch.__version__,
        "inputs": {**inputs, PRESENT: {"dtype": "bool", "shape": [BATCH, len(columns)], "columns": columns}},
        "outputs": {head: {"dtype": "float32", "shape": [BATCH, n]} for head, n in student.fusion.n_classes.items()},
        "classes": described["classes"],
        "missing": student.fusion.embedding.missing,
        "modalities": letters(columns),
    }


def _backbone_names(described: Mapping[str, Any]) -> dict[str, str]:
    data, config = student_settings(described, "config.json")
    return {modality: chosen.name for modality, chosen in student_backbones(data, config).items()}


def write_torch(student: ClipModel, names: Mapping[str, str], path: Path) -> Answer:
    """Write a torch.export program; return how it answers once it is read again.

    torch keeps its weights as raw bytes and its graph as JSON, and would pickle the example, of which there is none.
    """
    program = traced(student, names, lambda found, _: found)
    with path.open("w+b") as file:
        torch.export.save(program, file)
    _refuse_pickles(path)
    with path.open("rb") as file:
        module = torch.export.load(file).module()
    return lambda inputs: module(**inputs)


def _refuse_pickles(path: Path) -> None:
    """Raise ExportError if anything in an archive is pickled: older releases of torch did so with the weights."""
    with zipfile.ZipFile(path) as archive:
        pickled = [each.filename for each in archive.infolist() if each.filename.endswith(".pt") and each.file_size]
        for name in archive.namelist():
            if name.endswith("_config.json"):
                payloads = json.loads(archive.read(name))["config"].values()
                pickled += [payload["path_name"] for payload in payloads if payload["use_pickle"]]
    if pickled:
        raise ExportError(
            f"torch {torch.__version__} would pickle {len(pickled)} part(s) of the file, such as {pickled[0]}. Install "
            "a newer torch, or use --format onnx."
        )


def write_onnx(student: ClipModel, names: Mapping[str, str], path: Path) -> Answer:
    """Write an ONNX file, its weights inside; return how it answers in onnxruntime."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InstallationError(f"ONNX needs {error.name}. Install it: pip install 'karmma[export]'.") from None
    clash = {*student.modalities, PRESENT} & {*student.fusion.n_classes}
    if clash:
        raise ExportError(f"ONNX: head {min(clash)!r} is also the name of an input. Use --format torch.")
    n_bytes = sum(tensor.nbytes for tensor in student.state_dict().values())
    if n_bytes > ONNX_BYTES:
        raise ExportError(f"ONNX: the weights are {n_bytes / 1e9:.1f} GB, one file holds 2. Use --format torch.")
    traced(student, names, _converted).save(path, external_data=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal errors: all others come as exceptions too
    with _runtime_errors():
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    heads = [output.name for output in session.get_outputs()]

    def answer(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with _runtime_errors():
            found = session.run(heads, {name: values.numpy() for name, values in inputs.items()})
        return {head: torch.from_numpy(logits) for head, logits in zip(heads, found, strict=True)}

    return answer


@contextmanager
def _runtime_errors() -> Iterator[None]:
    """Turn the errors of onnxruntime, which have nothing in common but where they are, into one of ours."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    theirs = tuple(each for each in vars(state).values() if isinstance(each, type) and issubclass(each, Exception))
    try:
        yield
    except theirs as error:
        if is_memory_short(error):
            raise memory_short(error, " in onnxruntime", "Close other programs and try again.") from None
        raise ExportError(f"onnxruntime cannot run the export: {one_line(error)}. Use --format torch.") from None


def _converted(program: ExportedProgram, outputs: Sequence[str]) -> "ONNXProgram":
    """Return a program as ONNX, with the names of its inputs and outputs, and without paths of this machine."""
    found = torch.onnx.export(program, output_names=outputs, dynamo=True, verbose=False)
    assert found is not None  # as dynamo=True
    graph = found.model.graph
    nodes = list(graph.all_nodes())
    values = [*graph.inputs, *(output for node in nodes for output in node.outputs)]
    shapes = [value.shape for value in values if value.shape is not None]
    symbol = str(shapes[0][0])  # of the first input
    for shape in shapes:
        for axis, size in enumerate(shape):
            if symbol in str(size):  # alone, or as in 9*symbol
                shape[axis] = re.sub(rf"\b{symbol}\b", BATCH, str(size))
    for node in nodes:
        node.metadata_props.clear()
    return found


WRITERS = {"torch": write_torch, "onnx": write_onnx}
