"""The wheel: everything in it, and it works away from the repository."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("data", "extract", "fuse", "distill")
MODULES = {"__init__.py", *(path.name for path in ROOT.glob("cli*.py"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the tracked kind of files, so that the repository stays as it is."""
    source = tmp_path_factory.mktemp("source") / "karmma"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "py.typed", *MODULES):
        shutil.copy(ROOT / name, source / name)
    for room in ROOMS:
        shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(out), str(source)]
    subprocess.run([sys.executable, "-m", "pip", *build], check=True, capture_output=True, timeout=120)
    (found,) = out.glob("karmma-*.whl")
    return found


def test_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        found = {name.removeprefix("karmma/") for name in archive.namelist() if name.startswith("karmma/")}
    wanted = {*MODULES, "py.typed"}
    for room in ROOMS:
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / room).rglob("*.*") if p.is_file() and p.suffix != ".pyc"}
    assert found == wanted


@pytest.mark.slow
def test_installed_wheel_runs_away_from_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    install = ["install", "--no-deps", "--no-index", "--quiet", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, capture_output=True, timeout=120)
    code = (
        "import karmma, sys; print(karmma.__file__)\n"
        "from pathlib import Path\n"
        "from karmma.data.sample import write_sample\n"
        "write_sample(Path('karmma-sample'), n_clips=4)\n"
        "from karmma.cli import main\n"
        "sys.argv = ['karmma', 'extract', '--modality', 'detections']\n"
        "main()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(site))
    assert "Extracted" in done.stderr
