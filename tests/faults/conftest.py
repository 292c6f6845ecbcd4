"""The fault harness: commands in processes of their own, killed for real, and what they leave behind."""

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil
import pytest
from karmma.data.cache import Cache
from karmma.data.sample import write_sample
from karmma.data.verify import verify

GIVE_UP_S = 180  # cores may be busy
SETTINGS = """
preset = "tiny"
[data]
table = "all.csv"
heads = ["verb"]
modalities = ["audio", "detections"]
frames = 4
size = 32
audio_segment_s = 0.256
audio_mels = 24
audio_steps = 32
[extract]
theta = 7
batch_size = 2
shard_rows = 2
readers = 1
[teacher]
embed_dim = 16
ffn_dim = 16
epochs = 3
batch_size = 3
threads = 1
[student]
theta = 7
embed_dim = 16
ffn_dim = 16
attention_dropout = 0.1
epochs = 3
warmup_epochs = 1
batch_size = 3
threads = 1
readers = 1
"""
# The command in a session of its own, which notes every row of tokens that it makes; torch was loaded before the fork.
COMMAND = """
import os, sys
from karmma import cli
from karmma.data.drafts import ShardDraft
os.setsid()
said = os.open(folder + "/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(said, 1), os.dup2(said, 2)
put, made = ShardDraft.put, os.open(folder + "/made", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def noted(self, at, *rest):
    os.write(made, f"{self.task.lease} {at}\\n".encode())
    put(self, at, *rest)
ShardDraft.put = noted
exec(before)
sys.argv = ["karmma", *words]
cli.main()
"""


class Running:
    """A command that runs in a process of its own."""

    def __init__(self, context: multiprocessing.context.BaseContext, folder: Path, words: tuple, before: str) -> None:
        self.folder = folder
        told = {"folder": str(folder), "words": [*map(str, words)], "before": before}
        self.process = context.Process(target=exec, args=(COMMAND, told))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """What it has written to its terminal so far."""
        file = self.folder / "said"
        return file.read_text() if file.exists() else ""

    @property
    def made(self) -> list[str]:
        """ "lease place" of every row of tokens that it has made so far."""
        file = self.folder / "made"
        return file.read_text().splitlines() if file.exists() else []

    def ended(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it said."""
        self.process.join(GIVE_UP_S)
        return self.process.exitcode, self.said

    def succeeded(self) -> Self:
        """Wait for its end, which must be a good one."""
        code, said = self.ended()
        assert code == 0, said
        return self

    def until(self, is_so: Callable[[], object]) -> None:
        """Wait until something is so, as long as the command runs."""
        give_up = time.monotonic() + GIVE_UP_S
        while not is_so() and self.process.is_alive():
            assert time.monotonic() < give_up
            time.sleep(0.002)

    def kill(self, alone: bool = False) -> None:
        """End it by SIGKILL, with its readers, which must end by themselves where it is killed alone."""
        readers = []
        with suppress(psutil.NoSuchProcess):  # it has just ended by itself
            readers = psutil.Process(self.pid).children(recursive=True)
        self.process.kill()
        for reader in [] if alone else readers:
            reader.kill()
        give_up = time.monotonic() + GIVE_UP_S
        while any(map(_is_at_work, readers)):
            assert time.monotonic() < give_up
            time.sleep(0.01)
        self.process.join(GIVE_UP_S)


def _is_at_work(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # which remains where nobody collects orphans
    except psutil.NoSuchProcess:
        return False


class Files:
    """What lies in a cache."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def below(self, *names: str) -> dict[str, bytes]:
        """Return every file of one folder by its path in the cache."""
        found = [path for path in self.cache.joinpath(*names).rglob("*") if path.is_file()]
        return {str(path.relative_to(self.cache)): path.read_bytes() for path in found}

    @property
    def tokens(self) -> dict[str, bytes]:
        return self.below("tokens")

    @property
    def receipts(self) -> dict[Path, tuple[int, bytes]]:
        """Time of change and content of the receipts of all shards."""
        found = self.cache.glob("receipts/tokens/*/*/view*/*.json")
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in found}

    @property
    def left_over(self) -> list[Path]:
        """Leases that are still there, and files half written."""
        leases = [path for path in (self.cache / "leases").rglob("*") if path.is_file()]
        return [*leases, *self.cache.rglob("*.tmp")]

    def require_sound(self) -> None:
        """Require that every shard is what its receipt says."""
        assert not self.cache.exists() or not list(verify(Cache(self.cache)))

    def drop_receipts(self, n: int, seed: int) -> list[Path]:
        """Make some shards count as unwritten; return their receipts."""
        dropped = random.Random(seed).sample(sorted(self.receipts), n)
        for receipt in dropped:
            receipt.unlink()
        return dropped


@pytest.fixture(scope="session")
def files_of() -> type[Files]:
    """The class that looks into a cache."""
    return Files


@pytest.fixture(scope="session")
def launch() -> Iterator[Callable[..., Running]]:
    """Return a function that starts `karmma WORDS`; `before` is code to run in its process first."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pandas", "karmma.cli", "karmma.extract.engine", "karmma.distill.distillation"])
    started = []

    def begin(folder: Path, *words: object, before: str = "") -> Running:
        folder.mkdir(parents=True, exist_ok=True)
        started.append(Running(context, folder, words, before))
        return started[-1]

    yield begin
    for running in started:
        running.kill()


@pytest.fixture(scope="session")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of fifteen clips, of a table of all and one of the first seven, and of the settings."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=15)
    lines = (folder / "clips.csv").read_text().splitlines(keepends=True)
    (folder / "all.csv").write_text("".join(lines))
    (folder / "some.csv").write_text("".join(lines[:8]))
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


@pytest.fixture
def start(launch: Callable[..., Running], sample: Path, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Return a function that starts a command on the cache of this test; killed at the test's end, if not before."""
    begun = []

    def begin(name: str, command: str, *options: object, before: str = "") -> Running:
        given = ("--config", sample / "settings.toml", "--cache", tmp_path / "cache", *options)
        begun.append(launch(tmp_path / name, *command.split(), *given, before=before))
        return begun[-1]

    yield begin
    for running in begun:
        running.kill()


@pytest.fixture(scope="session")
def clean(launch: Callable[..., Running], sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of one extraction that nobody disturbed."""
    folder = tmp_path_factory.mktemp("clean")
    launch(folder, "extract", "--config", sample / "settings.toml", "--cache", folder / "cache").succeeded()
    return folder / "cache"


@pytest.fixture
def extracted(clean: Path) -> Files:
    """What lies in the cache that nobody disturbed."""
    return Files(clean)


@pytest.fixture
def cache(tmp_path: Path) -> Files:
    """What lies in the cache that commands of this test fill."""
    return Files(tmp_path / "cache")
