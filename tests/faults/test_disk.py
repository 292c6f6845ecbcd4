"""A full or read-only disk and short memory: one clear line, exit code 1, and a cache as good as before."""

import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from karmma.cli_options import Settings
from karmma.data.cache import Cache
from karmma.data.config import DataConfig
from karmma.data.errors import CacheError
from karmma.data.plan import plan_orders, plan_shards
from karmma.data.sample import write_sample
from karmma.data.verify import verify
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.engine import Engine
from karmma.extract.frozen import FrozenBackbone, build_frozen

N_CLIPS, GIVE_UP_S = 9, 60
SETTINGS = """
preset = "tiny"
[data]
table = "clips.csv"
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
shard_rows = 3
readers = 1
"""
# The command in a process forked from one that has loaded torch; `room`: MiB of memory that it may still take.
COMMAND = """
import os, resource, sys
from karmma import cli
from karmma.data.drafts import ShardDraft
said = os.open(folder + "/said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(said, 1), os.dup2(said, 2)
put, made = ShardDraft.put, os.open(folder + "/made", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
def noted(self, at, *rest):
    os.write(made, f"{self.task.modality} {self.task.first_row + at}\\n".encode())
    put(self, at, *rest)
ShardDraft.put = noted
exec(before)
if room is not None:
    taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + room * 2**20, -1))
if file_size is not None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, -1))
sys.argv = ["karmma", "extract", *options]
cli.main()
"""
READ_ONLY_AFTER_ONE_SHARD = """
from karmma.data.cache import Cache
write = Cache.write_receipt
def last(*args):
    write(*args)
    def refused(*args, **options):
        raise OSError(30, "Read-only file system")
    os.replace = os.link = os.unlink = os.mkdir = refused
Cache.write_receipt = last
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=N_CLIPS)
    (folder / "settings.toml").write_text(SETTINGS)
    return folder


@pytest.fixture(scope="module")
def extract(sample, tmp_path_factory):
    """Return a function that runs the command on a cache to its end: exit code, what it said, and rows it made."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pandas", "karmma.cli", "karmma.extract.engine"])

    def run(cache: Path, *options: str, room: int | None = None, file_size: int | None = None, before: str = ""):
        folder = tmp_path_factory.mktemp("run")
        given = ("--config", str(sample / "settings.toml"), "--cache", str(cache), *options)
        told = {"folder": str(folder), "options": given, "room": room, "file_size": file_size, "before": before}
        process = context.Process(target=exec, args=(COMMAND, told))
        process.start()
        try:
            process.join(GIVE_UP_S)
        finally:
            process.kill()
            process.join()
        return process.exitcode, (folder / "said").read_text(), (folder / "made").read_text().splitlines()

    return run


@pytest.fixture(scope="module")
def clean(extract, tmp_path_factory):
    """The cache of one run that nobody disturbed."""
    cache = tmp_path_factory.mktemp("clean") / "cache"
    code, said, _ = extract(cache)
    assert code == 0, said
    return cache


@pytest.fixture
def cache(clean, tmp_path):
    """A cache that lacks its second shard in both modalities."""
    cache = shutil.copytree(clean, tmp_path / "cache")
    for receipt in cache.glob("receipts/tokens/*/*/view0/1.json"):
        receipt.unlink()
    return cache


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_clear_line(code: int, said: str, *parts: str):
    assert code == 1
    assert "Traceback" not in said
    *_, line = said.strip().splitlines()
    assert all(part in line for part in parts), said


def require_sound(cache: Path, receipts: dict[str, bytes], *names: str):
    """Require that everything with a receipt is what it was, and that nothing lies about half done."""
    now = files(cache / "receipts" / "tokens")
    assert receipts.items() <= now.items()
    assert list(verify(Cache.open(cache))) == []
    assert not [path for path in (cache / "leases").rglob("*") if path.is_file()]
    assert not list(cache.rglob("*.tmp"))


def test_disk_that_is_full_is_one_line_and_room_makes_it_good(extract, clean, cache):
    receipts = files(cache / "receipts" / "tokens")
    code, said, _ = extract(cache, file_size=3000)  # an audio shard has 4084 bytes, a receipt less than 1500
    require_clear_line(code, said, "CacheError: ", "tokens/c/1/0/0/0: cannot be written: File too large. Free space")
    require_sound(cache, receipts)
    code, said, made = extract(cache)
    assert code == 0, said
    assert {row.split()[1] for row in made} == {"3", "4", "5"}
    require_sound(cache, receipts)
    assert files(cache / "tokens") == files(clean / "tokens")


def test_disk_with_no_room_at_all_is_one_line(extract, tmp_path):
    code, said, _ = extract(tmp_path / "cache", file_size=600)
    require_clear_line(code, said, "CacheError: ", "clips.parquet: cannot be written: File too large. Free space")
    assert files(tmp_path / "cache") == {}


def test_disk_that_becomes_read_only_half_way_is_one_line_and_the_next_run_completes(extract, clean, cache):
    receipts = files(cache / "receipts" / "tokens")
    code, said, _ = extract(cache, before=READ_ONLY_AFTER_ONE_SHARD)
    require_clear_line(code, said, "CacheError: ", str(cache), "Read-only file system")
    assert receipts.items() < files(cache / "receipts" / "tokens").items()
    code, said, _ = extract(cache)
    assert code == 0, said
    require_sound(cache, receipts)
    assert files(cache / "tokens") == files(clean / "tokens")


@pytest.mark.parametrize("where", ["a file/cache", "/dev/null/cache", "/proc/karmma/cache"])
def test_folder_that_cannot_be_written_is_one_line(extract, tmp_path, where):
    (tmp_path / "a file").write_text("not a folder")
    code, said, _ = extract(tmp_path / where)
    require_clear_line(code, said, "CacheError: ", str(tmp_path / where), "hoose a folder that can be")


def test_complete_cache_may_be_read_only_and_nothing_is_written_to_it(extract, clean, tmp_path):
    cache = shutil.copytree(clean, tmp_path / "cache")
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}
    for folder in folders:
        folder.chmod(0o555)  # which the superuser does not heed
    try:
        code, said, made = extract(cache)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert (code, made) == (0, []), said
    assert "Nothing to do: the cache is complete." in said
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))} == before


def test_batch_too_large_for_the_memory_is_one_line_and_a_smaller_one_completes(extract, clean, cache):
    receipts = files(cache / "receipts" / "tokens")
    code, said, _ = extract(cache, "--batch-size", "4000000", room=2000)
    require_clear_line(code, said, "MemoryShortError: Out of memory for", "Lower --batch-size (4000000)")
    require_sound(cache, receipts)
    code, said, _ = extract(cache)
    assert code == 0, said
    assert files(cache / "tokens") == files(clean / "tokens")


@pytest.mark.slow
def test_whatever_memory_there_is_the_cache_stays_sound_and_is_not_said_to_be_damaged(extract, clean, cache):
    """Interpreter and libraries may abort, or hang, where not even their threads have room: how they end is theirs."""
    receipts = files(cache / "receipts" / "tokens")
    for room in (0, 4, 8, 16, 24, 32, 48, 64, 80, 100, 150, 200, 300, 500):
        _, said, _ = extract(cache, room=room)
        assert "damaged" not in said
        assert receipts.items() <= files(cache / "receipts" / "tokens").items()
        assert list(verify(Cache.open(cache))) == []
    code, said, _ = extract(cache)
    assert code == 0, said
    require_sound(cache, receipts)
    assert files(cache / "tokens") == files(clean / "tokens")


def test_retry_makes_the_failed_clips_and_no_others(extract, clean, sample, tmp_path):
    table = (sample / "clips.csv").read_text().replace("videos/clip_0004.mp4", f"{tmp_path}/later.mp4")
    table = table.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/")
    (tmp_path / "clips.csv").write_text(table)
    options, cache = ("--table", str(tmp_path / "clips.csv")), tmp_path / "cache"
    code, said, made = extract(cache, *options)
    assert (code, len(made)) == (3, 2 * N_CLIPS), said
    assert "failed: audio of clip_0004: " in said
    before = files(cache / "tokens")
    shutil.copyfile(sample / "videos" / "clip_0004.mp4", tmp_path / "later.mp4")
    code, said, made = extract(cache, *options)
    assert (code, made) == (3, []), said
    assert files(cache / "tokens") == before
    code, said, made = extract(cache, *options, "--retry-failed")
    assert (code, made) == (0, ["audio 4"]), said
    assert "Extracted 1 " in said
    assert files(cache / "tokens") == files(clean / "tokens")
    changed = [name for name, data in files(cache / "tokens").items() if before.get(name) != data]
    assert {name.partition(".zarr/")[2] for name in changed} == {"tokens/c/1/0/0/0", "state/c/1/0"}


def test_engine_that_ran_out_of_space_makes_the_shards_when_it_is_asked_again(sample, clean, cache):
    """A worker of a cluster keeps its engine, so what failed once must not be held for ever."""
    chosen = {"data": {"cache": cache, "modalities": ("detections",)}, "extract": {"threads": 1}}
    settings = Settings(sample / "settings.toml", None, [], chosen, needs_clips=True)
    table, opened = settings.table(), Cache.open(cache)
    (name,) = opened.identities("detections")
    orders = plan_orders(opened, table, plan_shards(opened, table, "detections", name, n_views=1, shard_rows=3))
    shard = cache / "tokens" / "detections" / f"{name}.zarr" / "tokens/c/1/0/0/0"
    shard.unlink()
    (shard / "in the way").mkdir(parents=True)
    with Engine(settings.data, settings.extract, {"detections": name}) as engine:
        with pytest.raises(CacheError, match="tokens/c/1/0/0/0: cannot be written: Is a directory"):
            engine.make(orders, lambda n: None)
        shutil.rmtree(shard)
        assert engine.make(orders, lambda n: None) == []
    assert shard.read_bytes() == (clean / shard.relative_to(cache)).read_bytes()


def test_tokens_that_are_not_finite_do_not_stop_the_check_of_bfloat16():
    data = DataConfig(audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32)
    backbone = BackboneConfig(name="ast_micro", weights="none")
    config = ExtractConfig(audio=backbone, theta=7, batch_size=3, precision="bfloat16")
    frozen = FrozenBackbone("audio", build_frozen("audio", data, config), config, torch.device("cpu"))
    shape = data.input_shape("audio")
    sound = np.linspace(-1, 1, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    found = frozen.tokens({0: np.full(shape, np.nan, np.float32), 1: sound})
    assert np.isnan(found[0]).any()
    assert np.isfinite(found[1]).all()
    assert frozen.agreement["clips"] == 1
