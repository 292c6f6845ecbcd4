"""A backbone of another package, through its entry point: on the command line and in the workers of clusters."""

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.data.identity import tensors_digest
from karmma.data.sample import write_sample
from karmma.data.stores import TokenStore
from karmma.extract.backbones import build_backbone
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.stage import extract_tokens
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=12)
    return folder


def contents(cache, part="tokens"):
    folder = cache / part
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


PLUGIN = """
import os, time
import torch
from karmma.extract.backbone import Backbone

def note(what):
    with open(os.environ["KARMMA_TEST_LOG"], "a") as log:
        log.write(f"{what} {os.getpid()}\\n")

class Boxes(Backbone):
    def __init__(self, modality, input_shape):
        super().__init__(input_shape, 2, 8)
        self.line = torch.nn.Linear(6, 8)
        note("built")

    def tokens(self, x):
        note("ran")
        time.sleep(float(os.environ.get("KARMMA_TEST_SLEEP", 0)))
        return self.line(x.mean(2)[:, :2])

def no_backbone(modality, input_shape):
    return torch.nn.Linear(6, 8)
"""
SETTINGS = """
preset = "tiny"
[data]
table = "{table}"
heads = ["verb"]
modalities = ["detections"]
frames = 4
[extract]
theta = "none"
batch_size = 1
shard_rows = 1
readers = 1
threads = 1
detections = {{ name = "mine", weights = "none" }}
"""


def install(folder, version):
    """Install a package of two backbones as pip would, and return the folder that has to be on the path."""
    shutil.rmtree(folder, ignore_errors=True)
    about = folder / f"lab_backbones-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: lab-backbones\nVersion: {version}\n")
    points = "mine = lab_backbones:Boxes\nnone_at_all = lab_backbones:no_backbone\n"
    (about / "entry_points.txt").write_text(f"[karmma.backbones]\n{points}")
    (folder / "lab_backbones.py").write_text(PLUGIN)
    return folder


class Home:
    """A working folder with a backbone that notes in which process it is at work; ends what it starts."""

    def __init__(self, folder, table):
        self.folder, self.log, self.started = folder, folder / "log.txt", []
        (folder / "karmma.toml").write_text(SETTINGS.format(table=table))
        paths = os.pathsep.join([str(install(folder / "path", "1.0")), os.environ.get("PYTHONPATH", "")])
        self.env = os.environ | {"PYTHONPATH": paths, "KARMMA_TEST_LOG": str(self.log), "COLUMNS": "300"}

    def start(self, *command, stderr=subprocess.DEVNULL):
        how = {"stdout": subprocess.DEVNULL, "stderr": stderr, "text": True, "start_new_session": True}
        self.started.append(subprocess.Popen([sys.executable, *command], cwd=self.folder, env=self.env, **how))
        return self.started[-1]

    def extract(self, *args):
        return self.start("-c", "from karmma.cli import main; main()", "extract", *args, stderr=subprocess.PIPE)

    def noted(self, what):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return Counter(int(line.split()[1]) for line in lines if line.startswith(what))

    def receipts(self, cache):
        found = (self.folder / cache).glob("receipts/tokens/*/*/view*/*.json")
        return {path: path.stat().st_mtime_ns for path in found}

    def scheduler(self, n_workers, n_threads):
        file, options = self.folder / "scheduler.json", ("--no-dashboard", "--scheduler-file")
        scheduler = self.start("-m", "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", *options, str(file))
        until(lambda: file.exists() and "address" in file.read_text())
        how = ("--nworkers", str(n_workers), "--nthreads", str(n_threads))
        self.start("-m", "dask", "worker", *how, *options, str(file))
        return scheduler, json.loads(file.read_text())["address"]


def until(is_so, within_s=120):
    end = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ended(process):
    """Return exit code, and what was said beside the progress."""
    err = process.communicate(timeout=200)[1]
    return process.returncode, [line for line in err.splitlines() if not line.startswith("extract: ")]


@pytest.fixture
def home(sample, tmp_path):
    home = Home(tmp_path, sample / "clips.csv")
    yield home
    for process in home.started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def slow_home(home):
    """The same, where a batch takes half a second."""
    home.env["KARMMA_TEST_SLEEP"] = "0.5"
    return home


@pytest.mark.slow
def test_backbone_of_another_package_extracts_on_the_command_line(home, sample):
    code, said = ended(home.extract("--cache", "c"))
    assert code == 0, "\n".join(said)
    assert said[0] == "Extracted 12 (clip, view, modality)."
    assert set(home.noted("built").values()) == {1}
    cache = Cache.open(home.folder / "c")
    ((name, fields),) = cache.identities("detections").items()
    assert (fields["backbone"]["name"], fields["backbone"]["code"]) == ("mine", "lab-backbones 1.0")
    store = TokenStore.open(cache.tokens_path("detections", name))
    assert store.tokens.shape == (12, 1, 2, 8)
    assert np.isfinite(store.read(np.arange(12), 0)).any()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs a version of the package for this process."""
    monkeypatch.setenv("KARMMA_TEST_LOG", str(tmp_path / "log.txt"))
    monkeypatch.syspath_prepend(str(tmp_path / "path"))

    def install_version(version):
        install(tmp_path / "path", version)
        importlib.invalidate_caches()

    install_version("1.0")
    return install_version


def test_other_version_of_the_package_makes_a_store_of_its_own(installed, sample, tmp_path):
    data = DataConfig(cache=tmp_path / "cache", heads=("verb",), modalities=("detections",), frames=4)
    config = ExtractConfig(detections=BackboneConfig(name="mine", weights="none"), theta=None, readers=1)
    table = read_clip_table(sample / "clips.csv", ("verb",))
    first = extract_tokens(table, data, config)
    assert extract_tokens(table, data, config).n_written == 0
    installed("1.1")
    second = extract_tokens(table, data, config)
    assert (first.n_written, second.n_written) == (12, 12)
    assert first.stores != second.stores
    identities = Cache.open(data.cache).identities("detections")
    codes = [identities[report.stores["detections"].stem]["backbone"]["code"] for report in (first, second)]
    assert codes == ["lab-backbones 1.0", "lab-backbones 1.1"]


def test_backbone_of_another_package_takes_weights_from_a_file(installed, tmp_path):
    wanted, other = (build_backbone("mine", "detections", (4, 3, 6), seed=seed).state_dict() for seed in (3, 0))
    save_file({**wanted, "head.weight": torch.ones(2, 8)}, tmp_path / "w.safetensors")
    found = build_backbone("mine", "detections", (4, 3, 6), str(tmp_path / "w.safetensors")).state_dict()
    assert tensors_digest(found) == tensors_digest(wanted) != tensors_digest(other)


def test_unknown_names_are_told_the_nearest_one_of_any_package(installed):
    with pytest.raises(ConfigError, match=r"Unknown backbone 'mime'. Did you mean 'mine'\?"):
        build_backbone("mime", "detections", (4, 3, 6))
    with pytest.raises(ConfigError, match=r"Unknown backbone 'swin3d_tt'. Did you mean 'swin3d_t'\?"):
        build_backbone("swin3d_tt", "video", (4, 3, 32, 32))


def test_entry_point_that_gives_no_backbone_says_so(installed):
    with pytest.raises(ConfigError, match="Backbone none_at_all: its entry point gives a Linear, expected a karmma"):
        build_backbone("none_at_all", "detections", (4, 3, 6))


@pytest.mark.slow
def test_no_cluster_four_workers_and_a_threaded_one_give_the_same_bytes(slow_home):
    _, address = slow_home.scheduler(1, 2)
    for cache, args, n_built in (("a", (), 2), ("b", ("--workers", "4"), 5), ("c", ("--scheduler", address), 2)):
        slow_home.log.unlink(missing_ok=True)
        code, said = ended(slow_home.extract("--cache", cache, *args))
        told = ["Extracted 12 (clip, view, modality).", f"Next: karmma train-teacher --cache {cache}"]
        assert (code, said) == (0, told), "\n".join(said)
        built = slow_home.noted("built")
        assert len(built) <= n_built
        assert set(built.values()) <= {1}
        assert slow_home.noted("ran").total() == 12
        assert contents(slow_home.folder / cache, "leases") == {}
    found = [contents(slow_home.folder / cache) for cache in "abc"]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_killed_worker_costs_its_shard_and_no_other(slow_home):
    run = slow_home.extract("--cache", "c", "--workers", "2")
    until(lambda: slow_home.receipts("c"))
    os.kill(next(pid for pid in slow_home.noted("ran") if pid != run.pid), signal.SIGKILL)
    done = slow_home.receipts("c")
    assert ended(run)[0] == 0
    assert slow_home.receipts("c").items() >= done.items()
    assert len(slow_home.receipts("c")) == 12
    assert slow_home.noted("ran").total() <= 13
    assert contents(slow_home.folder / "c", "leases") == {}


@pytest.mark.slow
def test_lost_scheduler_is_one_line_and_another_cluster_goes_on(slow_home):
    scheduler, address = slow_home.scheduler(2, 1)
    run = slow_home.extract("--cache", "c", "--scheduler", address)
    until(lambda: slow_home.receipts("c"))
    scheduler.kill()
    code, said = ended(run)
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("ClusterError: The cluster was lost: ")
    assert said[0].endswith("What was finished is kept; give the command again, on any cluster.")
    done = slow_home.receipts("c")
    assert 0 < len(done) < 12
    code, said = ended(slow_home.extract("--cache", "c", "--workers", "2"))
    assert code == 0, "\n".join(said)
    assert slow_home.receipts("c").items() >= done.items()
    assert ended(slow_home.extract("--cache", "whole"))[0] == 0
    assert contents(slow_home.folder / "c") == contents(slow_home.folder / "whole")
    assert contents(slow_home.folder / "c", "leases") == {}


@pytest.mark.slow
def test_error_in_a_worker_is_one_line(slow_home):
    assert ended(slow_home.extract("--cache", "c"))[0] == 0
    (shard,) = (slow_home.folder / "c").glob("tokens/detections/*/tokens/c/3")
    next((slow_home.folder / "c").glob("receipts/tokens/detections/*/view0/3.json")).unlink()
    shutil.rmtree(shard)
    shard.write_text("a file where a folder has to be")
    code, said = ended(slow_home.extract("--cache", "c", "--workers", "2"))
    assert code == 1
    assert len(said) == 1
    assert said[0].startswith("CacheError: ")
    assert "tokens/c/3/0/0/0: cannot be written: Not a directory" in said[0]
    assert contents(slow_home.folder / "c", "leases") == {}


@pytest.mark.slow
def test_workers_end_with_the_command_that_started_them(slow_home):
    run = slow_home.extract("--cache", "c", "--workers", "2")
    until(lambda: slow_home.receipts("c"))
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    code, said = ended(run)
    again = "karmma extract --cache c --workers 2"
    assert (code, said[-1]) == (130, f"Interrupted. What was finished is kept. To go on: {again}")
    run = slow_home.extract("--cache", "c", "--workers", "2")
    until(lambda: len(slow_home.receipts("c")) > 4)
    run.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in slow_home.noted("built")), 30)
    assert ended(slow_home.extract("--cache", "c"))[0] == 0
    assert contents(slow_home.folder / "c", "leases") == {}
