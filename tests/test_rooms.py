"""The import law of the house: data <- extract, fuse <- distill <- cli."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "data": {"data"},
    "extract": {"data", "extract"},
    "fuse": {"data", "fuse"},
    "distill": {"data", "extract", "fuse", "distill"},
}
IN_DATA, IN_EXTRACT = ("zarr", "h5py", "av", "cv2", "upath"), ("timm", "transformers", "dask", "distributed")
IN_DISTILL = ("onnx", "onnxruntime", "onnxscript", "huggingface_hub", "gradio")
ONLY_IN = {"typer": "cli.py"} | dict.fromkeys(IN_DATA, "data") | dict.fromkeys(IN_EXTRACT, "extract")
ONLY_IN |= dict.fromkeys(IN_DISTILL, "distill")
NOWHERE = {"pickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"}
# The error with which torch.load(weights_only=True) refuses a hostile checkpoint: caught, nothing is unpickled.
REFUSAL = ("pickle", "UnpicklingError")
IN_ROOMS = sorted(path.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("*.py"))
COMMANDS = sorted(path.relative_to(ROOT) for path in ROOT.glob("cli*.py"))
FILES = [*IN_ROOMS, *COMMANDS]


def imports(path: Path) -> set[tuple[str, ...]]:
    """Return what a file imports, as parts of the dotted name seen from the root of the package."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            inside = path.parent.parts[: len(path.parent.parts) - node.level + 1] if node.level else ()
            module = (*inside, *(node.module or "").split(".")) if node.module else inside
            found |= {(*module, alias.name) for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_imports_only_its_room_and_rooms_to_its_left(path):
    room = path.parts[0]
    for name in imports(path):
        assert name[0] != "karmma", f"{path} imports {'.'.join(name)}: imports inside the package are relative"
        if room in MAY_IMPORT and name[0] in MAY_IMPORT:
            assert name[0] in MAY_IMPORT[room], f"{path} imports {'.'.join(name)}, uphill"
        room = "cli.py" if path in COMMANDS else room
        assert ONLY_IN.get(name[0], room) == room, f"{name[0]} belongs in {ONLY_IN[name[0]]}, found in {path}"
        assert name[0] not in NOWHERE or name == REFUSAL


@pytest.mark.parametrize("path", FILES, ids=str)
def test_file_has_no_eval_and_no_print(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"eval", "exec", "print"}, f"{path}:{node.lineno}"


def test_gradio_is_known_to_the_page_alone():
    assert [str(path) for path in FILES if any(name[0].startswith("gradio") for name in imports(path))] == [
        "distill/app.py"
    ]


def test_every_file_opens_with_its_purpose():
    for path in FILES:
        source = (ROOT / path).read_text()
        assert not source or ast.get_docstring(ast.parse(source)), path
