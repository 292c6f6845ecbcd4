"""Promises of SECURITY.md that no other test holds: nothing pickled is written or read, nothing unpacked or run."""

import ast
import io
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SOURCES = [
    path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] in ("data", "extract", "fuse", "distill")
]
SOURCES += ROOT.glob("cli*.py")
# What would run, unpickle or unpack what a file says; eval and exec are seen to by test_rooms.py.
NEVER = {"system", "popen", "extractall", "unpack_archive", "load_module", "unsafe_load", "full_load", "Unpickler"}


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def is_pickle(data: bytes) -> bool:
    try:
        return len(list(pickletools.genops(io.BytesIO(data)))) > 1
    except (ValueError, UnicodeDecodeError, IndexError):
        return False


def pickles_in(path: Path) -> list[str]:
    """Return what of a file is a pickle: all of it, or members of an archive."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            return [f"{path}:{name}" for name in archive.namelist() if is_pickle(archive.read(name))]
    return [str(path)] if is_pickle(path.read_bytes()) else []


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        (node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", ""), node)
        for node in found
    ]


def test_pickles_are_told_from_other_files(tmp_path):
    (tmp_path / "a").write_bytes(pickle.dumps({"a": 1}))
    torch.save({"a": torch.ones(2)}, tmp_path / "b.pth")
    (tmp_path / "c").write_bytes(b"{}")
    assert [len(pickles_in(tmp_path / name)) for name in ("a", "b.pth", "c")] == [1, 1, 0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_source_calls_nothing_that_runs_or_unpacks_what_a_file_says(path):
    for name, call in calls(path):
        given = {word.arg: ast.unparse(word.value) for word in call.keywords}
        assert name not in NEVER, f"{path}:{call.lineno}"
        for option in ("shell", "allow_pickle", "trust_remote_code"):
            assert given.get(option, "False") == "False", f"{path}:{call.lineno}"
        if name == "load" and ast.unparse(call.func) == "torch.load":
            assert given.get("weights_only") == "True", f"{path}:{call.lineno}"


@pytest.mark.slow
def test_whole_pipeline_writes_no_pickle(start, launch, tmp_path):
    runs = ("--runs", tmp_path / "runs")
    start("extract", "extract").succeeded()
    start("teach", "train-teacher", *runs).succeeded()
    start("distill", "distill", *runs, "--inputs", tmp_path / "inputs", "--decoded-gb", 1).succeeded()
    (run,) = (tmp_path / "runs").glob("student-*")
    start("evaluate", "evaluate", run).succeeded()
    start("report", "report", run, "--into", tmp_path / "page").succeeded()
    for kind, name in (("torch", "student.pt2"), ("hub", "hub")):
        launch(tmp_path / f"export-{kind}", "export", run, "--format", kind, "--output", tmp_path / name).succeeded()
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} >= {".safetensors", ".json", ".jsonl", ".parquet", ".html", ".pt2"}
    assert [found for path in written for found in pickles_in(path)] == []


@pytest.mark.parametrize("as_torch", [True, False])
def test_run_whose_checkpoint_is_a_pickle_is_refused_and_not_run(student_run, give, tmp_path, as_torch):
    run, mark = tmp_path / student_run.name, tmp_path / "touched"
    shutil.copytree(student_run, run)
    if as_torch:
        torch.save({"a": Touch(mark)}, run / "best.safetensors")
    else:
        (run / "best.safetensors").write_bytes(pickle.dumps(Touch(mark)))
    code, _, said = give("predict", tmp_path / "none.mp4", "--run", run)
    assert code == 1
    assert "best.safetensors" in said
    assert not mark.exists()
