"""Extraction from and into an object store: the bytes of a local cache, one maker a shard, commands that read it."""

import subprocess
import sys
from pathlib import Path

import pytest
from karmma.cli_options import Settings
from karmma.data.cache import Cache
from karmma.data.errors import CacheError
from karmma.data.inventory import take_inventory
from karmma.data.places import place, sizes
from karmma.data.sample import write_sample
from karmma.data.transfer import merge
from karmma.data.verify import verify
from karmma.extract.stage import extract_tokens

RUN = "import sys; from karmma.cli import main; sys.argv[0] = 'karmma'; main()"
SETTINGS = """
preset = "tiny"
[data]
table = "{table}"
media = "{media}"
cache = "{cache}"
heads = ["verb"]
modalities = ["audio", "detections"]
frames = 4
audio_segment_s = 0.256
audio_steps = 32
audio_hop = 128
audio_mels = 24
[extract]
theta = 7
batch_size = 3
shard_rows = 6
threads = 1
readers = 1
[teacher]
epochs = 1
warmup_epochs = 0
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=14)
    return folder


@pytest.fixture
def media(sample, bucket):
    """The address of the sample's files."""
    target = place(f"{bucket}/clips")
    target.fs.put(f"{sample}/", target.path, recursive=True)
    return str(target)


@pytest.fixture
def settings(tmp_path, sample, media, bucket):
    """Return a function that writes settings whose clips lie in the store, and whose cache lies where it is told."""

    def write(name: str, cache: str = f"{bucket}/cache", table: Path = sample / "clips.csv") -> Path:
        file = tmp_path / name / "karmma.toml"
        file.parent.mkdir()
        file.write_text(SETTINGS.format(table=table, media=media, cache=cache))
        return file

    return write


def karmma(*words: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", RUN, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sizes(folder)}


def extract(file: Path) -> int:
    """Extract in this process; return the number of (clip, view, modality) written."""
    sections = Settings(file, None, [], {}, needs_clips=True)
    return extract_tokens(sections.table(), sections.data, sections.extract).n_written


@pytest.mark.slow
def test_extraction_in_the_store_gives_the_bytes_of_a_local_cache(settings, sample, bucket, tmp_path):
    lines = (sample / "clips.csv").read_text().splitlines()
    (tmp_path / "some.csv").write_text("\n".join(lines[:9]) + "\n")
    first, whole = settings("first", table=tmp_path / "some.csv"), settings("whole")
    assert [extract(file) for file in (first, whole, whole)] == [16, 12, 0]  # the last shard is superseded
    assert extract(settings("local", str(tmp_path / "cache"))) == 28
    there, here = place(f"{bucket}/cache"), tmp_path / "cache"
    assert contents(there / "tokens") == contents(here / "tokens")
    assert not sizes(there / "leases")
    assert not list(verify(Cache.open(str(there))))
    shown, wanted = take_inventory(Cache.open(str(there))), take_inventory(Cache.open(here))
    assert [(s.kind, s.name, s.counts, s.is_complete) for s in shown] == [
        (s.kind, s.name, s.counts, s.is_complete) for s in wanted
    ]
    taken = Cache(tmp_path / "merged")
    assert sum(merge(taken, Cache.open(str(there))).values()) == 28
    assert contents(tmp_path / "merged/tokens") == contents(here / "tokens")


@pytest.mark.slow
def test_commands_work_on_a_cache_in_the_store(settings):
    file = settings("stored")
    for words in (["extract"], ["train-teacher"], ["cache", "verify"], ["cache", "info"], ["cache", "prune", "--yes"]):
        found = karmma(*words, "--config", file)
        assert found.returncode == 0, found.stderr
    assert "every store of s3://" in found.stderr


@pytest.mark.slow
def test_two_processes_on_one_store_make_each_shard_once(settings, bucket, tmp_path):
    file = settings("stored")
    command = [sys.executable, "-c", RUN, "extract", "--config", str(file)]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    local = settings("local", str(tmp_path / "cache"))
    extract(local)
    assert contents(place(f"{bucket}/cache/tokens")) == contents(tmp_path / "cache/tokens")
    assert not sizes(place(f"{bucket}/cache/leases"))


def test_bucket_that_is_not_there_is_one_line(settings):
    with pytest.raises(CacheError, match=r"s3://no-such-bucket/cache/\S*: .*bucket does not exist"):
        extract(settings("none", "s3://no-such-bucket/cache"))
