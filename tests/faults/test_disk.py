"""A full or read-only disk and short memory: one clear line, exit code 1, and a cache as good as before."""

import re
import shutil
import subprocess

import pytest
from karmma.cli_options import Settings
from karmma.data.cache import Cache
from karmma.data.errors import CacheError
from karmma.data.plan import plan_orders, plan_shards
from karmma.extract.engine import Engine

N_CLIPS = 15
ROOM = """
import resource
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {room} * 2**20, -1))
"""
# What a file may hold, as a quota would have it.
FILE_SIZE = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, -1))"
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


@pytest.fixture
def cache(clean, files_of, tmp_path):
    """What lies in a cache that lacks its second shard in both modalities."""
    cache = shutil.copytree(clean, tmp_path / "cache")
    for receipt in cache.glob("receipts/tokens/*/*/view0/1.json"):
        receipt.unlink()
    return files_of(cache)


def require_clear_line(running, *parts):
    code, said = running.ended()
    assert code == 1, said
    assert "Traceback" not in said
    *_, line = said.strip().splitlines()
    assert all(part in line for part in parts), said


def require_sound(cache, receipts):
    """Require that everything with a receipt is what it was, and that nothing lies about half done."""
    assert receipts.items() <= cache.receipts.items()
    cache.require_sound()
    assert cache.left_over == []


def test_disk_that_is_full_is_one_line_and_room_makes_it_good(start, extracted, cache):
    receipts = cache.receipts
    full = start("full", "extract", before=FILE_SIZE.format(size=2000))  # an audio shard has more, a receipt less
    require_clear_line(full, "CacheError: ", "tokens/c/1/0/0/0: cannot be written: File too large. Free space")
    require_sound(cache, receipts)
    again = start("again", "extract").succeeded()
    assert sorted(row.split("/")[0] + row[-9:] for row in again.made) == [
        f"{modality}view0-1 {at}" for modality in ("audio", "detections") for at in (0, 1)
    ]
    require_sound(cache, receipts)
    assert cache.tokens == extracted.tokens


def test_disk_with_no_room_at_all_is_one_line(start, files_of, tmp_path):
    full = start("full", "extract", before=FILE_SIZE.format(size=600))
    require_clear_line(full, "CacheError: ", "clips.parquet: cannot be written: File too large. Free space")
    assert files_of(tmp_path / "cache").below() == {}


@pytest.fixture
def mounted(tmp_path):
    """Return a function that mounts a file system in memory as the cache of this test, or mounts it otherwise."""
    cache, is_there = tmp_path / "cache", []
    cache.mkdir()

    def mount(options):
        how = f"{'remount,' if is_there else ''}{options}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", cache], capture_output=True)
        if done.returncode and not is_there:
            pytest.skip("needs the right to mount a file system in memory")
        assert done.returncode == 0, done.stderr
        is_there.append(True)

    yield mount
    if is_there:
        subprocess.run(["umount", cache], check=True)


@pytest.mark.parametrize("room_kb", [16, 64, 128, 160])
def test_file_system_that_fills_up_is_one_line_and_room_makes_it_good(
    start, extracted, mounted, files_of, tmp_path, room_kb
):
    cache = files_of(tmp_path / "cache")
    mounted(f"size={room_kb}k")
    require_clear_line(start("full", "extract"), "CacheError: ", "cannot be written: No space left on device. Free")
    cache.require_sound()
    assert cache.left_over == []
    mounted("size=16m")
    start("again", "extract").succeeded()
    cache.require_sound()
    assert cache.tokens == extracted.tokens


@pytest.mark.slow
def test_cache_that_is_read_only_takes_no_logits_and_the_training_is_not_lost(start, clean, mounted, tmp_path):
    mounted("size=16m")
    shutil.copytree(clean, tmp_path / "cache", dirs_exist_ok=True)
    mounted("ro")
    train = ("train-teacher", "--runs", tmp_path / "runs", "--resume")
    require_clear_line(start("refused", *train), "CacheError: ", "cannot be written: Read-only file system")
    mounted("rw")
    again = start("again", *train).succeeded()
    assert "steps, " not in again.said  # all of them were made before
    assert [path.name for path in (tmp_path / "cache/logits").iterdir()]


def test_disk_that_becomes_read_only_half_way_is_one_line_and_the_next_run_completes(start, extracted, cache):
    receipts = cache.receipts
    refused = start("refused", "extract", before=READ_ONLY_AFTER_ONE_SHARD)
    require_clear_line(refused, "CacheError: ", str(cache.cache), "Read-only file system")
    assert receipts.items() < cache.receipts.items()
    start("again", "extract").succeeded()
    require_sound(cache, receipts)
    assert cache.tokens == extracted.tokens


@pytest.mark.parametrize("command", ["train-teacher", pytest.param("distill", marks=pytest.mark.slow)])
def test_disk_that_is_full_while_a_model_is_trained_is_one_line_and_room_makes_it_good(
    start, clean, left, tmp_path, command
):
    shutil.copytree(clean, tmp_path / "cache")
    options = ("--save-minutes", "0", "--resume") + (("--teacher", "none") if command == "distill" else ())
    start("plain", command, "--runs", tmp_path / "plain-runs", *options).succeeded()
    shutil.rmtree(tmp_path / "cache" / "logits", ignore_errors=True)
    runs = ("--runs", tmp_path / "runs")
    full = start("full", command, *runs, *options, before=FILE_SIZE.format(size=20_000))
    require_clear_line(full, "CacheError: ", "cannot be written: File too large. Free space")
    assert not [*tmp_path.glob("runs/*/result.json"), *tmp_path.glob("cache/logits/*")]
    start("again", command, *runs, *options).succeeded()
    ours, theirs = (next((tmp_path / name).iterdir()) for name in ("runs", "plain-runs"))
    assert left(ours) == left(theirs)


@pytest.mark.parametrize("where", ["a file/cache", "/dev/null/cache", "/proc/karmma/cache"])
def test_folder_that_cannot_be_written_is_one_line(start, tmp_path, where):
    (tmp_path / "a file").write_text("not a folder")
    refused = start("refused", "extract", "--cache", tmp_path / where)
    require_clear_line(refused, "CacheError: ", str(tmp_path / where), "hoose a folder that can be")


def test_complete_cache_may_be_read_only_and_nothing_is_written_to_it(start, clean, tmp_path):
    cache = shutil.copytree(clean, tmp_path / "cache")
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir())]
    before = {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))}
    for folder in folders:
        folder.chmod(0o555)  # which the superuser does not heed
    try:
        again = start("again", "extract").succeeded()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert again.made == []
    assert "Nothing to do: the cache is complete." in again.said
    assert {path: path.stat().st_mtime_ns for path in (cache, *cache.rglob("*"))} == before


def test_batch_too_large_for_the_memory_is_one_line_and_a_smaller_one_completes(start, extracted, cache):
    receipts = cache.receipts
    short = start("short", "extract", "--batch-size", 4000000, before=ROOM.format(room=2000))
    require_clear_line(short, "MemoryShortError: Out of memory for", "Lower --batch-size (4000000)")
    require_sound(cache, receipts)
    start("again", "extract").succeeded()
    assert cache.tokens == extracted.tokens


@pytest.mark.slow
def test_whatever_memory_there_is_the_cache_stays_sound_and_is_not_said_to_be_damaged(start, extracted, cache):
    """Interpreter and libraries may abort, or hang, where not even their threads have room: how they end is theirs."""
    receipts = cache.receipts
    for room in (0, 4, 8, 16, 24, 32, 48, 64, 80, 100, 150, 200, 300, 500):
        short = start(f"room{room}", "extract", before=ROOM.format(room=room))
        assert "damaged" not in short.ended()[1]
        short.kill()
        assert receipts.items() <= cache.receipts.items()
        cache.require_sound()
    start("again", "extract").succeeded()
    require_sound(cache, receipts)
    assert cache.tokens == extracted.tokens


def test_retry_makes_the_failed_clips_and_no_others(start, extracted, files_of, sample, tmp_path):
    table = (sample / "all.csv").read_text().replace("videos/clip_0004.mp4", f"{tmp_path}/later.mp4")
    table = table.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/")
    (tmp_path / "clips.csv").write_text(table)
    options, cache = ("--table", tmp_path / "clips.csv"), files_of(tmp_path / "cache")
    first = start("first", "extract", *options)
    assert (first.ended()[0], len(first.made)) == (3, 2 * N_CLIPS), first.said
    assert "failed: audio of clip_0004: " in first.said
    before = cache.tokens
    shutil.copyfile(sample / "videos" / "clip_0004.mp4", tmp_path / "later.mp4")
    second = start("second", "extract", *options)
    assert (second.ended()[0], second.made) == (3, []), second.said
    assert cache.tokens == before
    (row,) = start("third", "extract", *options, "--retry-failed").succeeded().made
    assert re.fullmatch("audio/.*/view0-2 0", row)
    assert cache.tokens == extracted.tokens
    changed = [name for name, data in cache.tokens.items() if before[name] != data]
    assert {name.partition(".zarr/")[2] for name in changed} == {"tokens/c/2/0/0/0", "state/c/2/0"}


def test_engine_that_ran_out_of_space_makes_the_shards_when_it_is_asked_again(sample, clean, cache):
    """A worker of a cluster keeps its engine, so what failed once must not be held for ever."""
    chosen = {"data": {"cache": cache.cache, "modalities": ("detections",)}, "extract": {"threads": 1}}
    settings = Settings(sample / "settings.toml", None, [], chosen, needs_clips=True)
    table, opened = settings.table(), Cache.open(cache.cache)
    (name,) = opened.identities("detections")
    orders = plan_orders(opened, table, plan_shards(opened, table, "detections", name, n_views=1, shard_rows=2))
    shard = cache.cache / "tokens" / "detections" / f"{name}.zarr" / "tokens/c/1/0/0/0"
    shard.unlink()
    (shard / "in the way").mkdir(parents=True)
    with Engine(settings.data, settings.extract, {"detections": name}) as engine:
        with pytest.raises(CacheError, match="tokens/c/1/0/0/0: cannot be written: Is a directory"):
            engine.make(orders, lambda n: None)
        shutil.rmtree(shard)
        assert engine.make(orders, lambda n: None) == []
    assert shard.read_bytes() == (clean / shard.relative_to(cache.cache)).read_bytes()
