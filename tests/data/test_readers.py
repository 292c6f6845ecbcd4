import os
import signal
import subprocess
import sys
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError, InstallationError
from karmma.data.modality import ABSENT, FAILED, PRESENT
from karmma.data.raw import read_clip
from karmma.data.readers import ReaderPool
from karmma.data.views import draw_view

DATA = DataConfig(
    frames=4,
    size=32,
    flow_size=32,
    audio_segment_s=0.128,
    audio_hop=64,
    audio_steps=32,
    audio_window=256,
    audio_mels=24,
)
NAMES = ("video", "flow", "audio")
SOUND = 0.3 * np.sin(2 * np.pi * 700 * np.arange(32_000) / 16_000)
# Put on the path of the readers: an `av.open` that does to the process what the name of the file says.
TREACHEROUS = """
import os, signal, time
import av

def open_file(file, *args, plain=av.open, **kwargs):
    name = os.path.basename(file)
    if name.startswith("segv"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if name.startswith("exit"):
        os._exit(3)
    if name.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if name.startswith("memory"):
        raise MemoryError
    if name.startswith("hang"):
        time.sleep(60)
    if name.startswith("bug"):
        raise ZeroDivisionError("seventeen")
    if name.startswith("loud"):
        os.write(1, b"a library prints")
    if name.startswith("once") and not os.path.exists(file + ".met"):
        open(file + ".met", "w").close()
        os.kill(os.getpid(), signal.SIGSEGV)
    return plain(file, *args, **kwargs)

av.open = open_file
"""
SCRIPT = """
import hashlib, json, multiprocessing, os, sys, time
from pathlib import Path
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.readers import ReaderPool

video = Path(sys.argv[1])
pool = ReaderPool(1, DataConfig(frames=4, size=32))

def read():
    array = pool.submit([(Clip("a", video, 0.0, 2.0, {}), 0, ("video",))])[0].result()["video"].array
    print(os.getpid(), pool._readers[0].process.pid, hashlib.sha256(array).hexdigest(), flush=True)

def read_and_close():
    read()
    pool.close()
"""


def clip(video, start_s=0.0, stop_s=2.0, clip_id="a", **sources):
    return Clip(clip_id, Path(video), start_s, stop_s, sources)


def same(one, other):
    """Say whether two readings of a clip are equal, bit by bit."""
    return one.keys() == other.keys() and all(
        (one[m].state, one[m].reason) == (other[m].state, other[m].reason)
        and (one[m].array is None) == (other[m].array is None)
        and (
            one[m].array is None
            or (one[m].array.dtype == other[m].array.dtype and one[m].array.tobytes() == other[m].array.tobytes())
        )
        for m in one
    )


def in_process(one, view, names):
    return read_clip(one, draw_view(one.clip_id, view, DATA), names, DATA)


OTHERS = set()  # children that tests before these have left, such as the resource tracker of multiprocessing


@pytest.fixture(scope="module", autouse=True)
def _others():
    OTHERS.update(children())
    yield
    OTHERS.clear()


def children():
    """Return the processes whose parent this one is, zombies included."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:
            continue
        if int(text.rpartition(")")[2].split()[1]) == os.getpid():
            found.append(int(stat.parent.name))
    return [pid for pid in found if pid not in OTHERS]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def ends_soon(pid, within_s=5):
    end = time.monotonic() + within_s
    while is_alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_alive(pid)


@pytest.fixture
def on_path(tmp_path, monkeypatch):
    """Return a function that puts a module where the readers of this process and of its scripts find it first."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder))

    def write(name: str, source: str) -> None:
        (folder / name).write_text(source)

    return write


@pytest.fixture
def treacherous(on_path):
    on_path("sitecustomize.py", TREACHEROUS)


@pytest.fixture
def video(film):
    return film("fine.mp4", [k / 25 for k in range(50)], sound=SOUND)


@pytest.fixture
def pool():
    n_files = len(os.listdir("/proc/self/fd"))
    with ReaderPool(2, DATA, patience_s=30) as pool:
        yield pool
    assert children() == []
    assert len(os.listdir("/proc/self/fd")) == n_files


@pytest.mark.parametrize("n_readers", [1, 3])
def test_readers_give_what_reading_in_process_gives_in_any_order(film, video, wav, tmp_path, n_readers):
    silent = film("silent.mp4", [k / 25 for k in range(50)])
    clips = [clip(path, k / 5, k / 5 + 0.5, f"{path.stem}/{k}") for path in (video, silent) for k in range(4)]
    clips += [clip(video, clip_id="own", audio=wav("own.wav", SOUND)), clip(tmp_path / "none\udcff.mp4", 0.0, None)]
    orders = [(one, at % 3, NAMES[at % 2 :]) for at, one in enumerate(clips)]
    mixed = [orders[at] for at in np.random.default_rng(0).permutation(len(orders))]
    with ReaderPool(n_readers, DATA) as pool:
        found = [future.result() for future in pool.submit(mixed)]
    assert all(same(one, in_process(*order)) for one, order in zip(found, mixed, strict=True))
    assert {reading.state for one in found for reading in one.values()} == {PRESENT, ABSENT, FAILED}
    assert children() == []


def test_readings_from_readers_can_be_written_to(pool, video):
    (future,) = pool.submit([(clip(video), 0, ("video",))])
    array = future.result()["video"].array
    assert array.flags.writeable
    assert array.flags.c_contiguous
    assert pool.submit([]) == []


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("segv.wav", "ended the reader process (SIGSEGV). Fetch the file again or convert it."),
        ("exit.wav", "ended the reader process (exit code 3). Fetch the file again or convert it."),
        ("kill.wav", "ended the reader process (SIGKILL). Fetch the file again or convert it, or use fewer readers"),
        ("memory.wav", "ended the reader process (SIGKILL). Fetch the file again or convert it, or use fewer readers"),
    ],
)
def test_crash_in_a_group_fails_the_guilty_modality_of_that_clip_alone(treacherous, pool, video, wav, name, end):
    guilty = wav(name, SOUND)
    clips = [clip(video, k / 5, k / 5 + 0.5, f"c{k}", **({"audio": guilty} if k == 2 else {})) for k in range(4)]
    found = [future.result() for future in pool.submit([(one, 1, NAMES) for one in clips])]
    failed = found[2].pop("audio")
    assert (failed.state, failed.array) == (FAILED, None)
    assert failed.reason.startswith(f"{guilty}: reading audio {end}")
    for at, one in enumerate(clips):
        assert same(found[at], in_process(one, 1, NAMES[:2] if at == 2 else NAMES))


def test_crash_that_does_not_come_again_fails_nothing(treacherous, pool, film):
    path = film("once.mp4", [k / 25 for k in range(50)])
    (future,) = pool.submit([(clip(path), 0, ("video",))])
    assert same(future.result(), in_process(clip(path), 0, ("video",)))
    assert path.with_name("once.mp4.met").exists()


def test_reader_killed_while_idle_is_replaced(pool, video):
    expected = in_process(clip(video), 0, NAMES)
    for _ in range(3):
        assert same(pool.submit([(clip(video), 0, NAMES)])[0].result(), expected)
        for pid in children():
            os.kill(pid, signal.SIGKILL)


def test_clip_that_takes_too_long_fails_and_its_neighbours_do_not(treacherous, video, wav):
    slow = wav("hang.wav", SOUND)
    orders = [(clip(video, audio=slow), 0, ("video", "audio")), (clip(video, 0.5, 1.0), 0, ("video",))]
    start = time.monotonic()
    with ReaderPool(1, DATA, patience_s=1.5) as pool:
        first, second = (future.result() for future in pool.submit(orders))
    assert time.monotonic() - start < 15
    assert first["audio"].reason.startswith(f"{slow}: reading audio did not end within 1.5 s.")
    assert same({"video": first["video"]}, in_process(clip(video), 0, ("video",)))
    assert same(second, in_process(clip(video, 0.5, 1.0), 0, ("video",)))


def test_library_that_prints_does_not_disturb_the_answers(treacherous, pool, film, capfd):
    path = film("loud.mp4", [k / 25 for k in range(50)])
    assert same(pool.submit([(clip(path), 0, ("video",))])[0].result(), in_process(clip(path), 0, ("video",)))
    out, err = capfd.readouterr()
    assert (out, err) == ("", "a library prints")


def test_bug_in_a_reader_raises_with_its_traceback_and_the_pool_reads_on(treacherous, pool, film, video):
    bad, good = pool.submit([(clip(film("bug.mp4", [0.0, 0.1])), 0, ("video",)), (clip(video), 0, ("video",))])
    with pytest.raises(RuntimeError, match=r"(?s)Traceback .* in open_file\n.*ZeroDivisionError: seventeen"):
        bad.result()
    assert good.result()["video"].state == PRESENT
    assert pool.submit([(clip(video), 0, ("video",))])[0].result()["video"].state == PRESENT


def test_setting_that_no_clip_can_be_read_with_is_refused_in_one_line(video, tmp_path):
    (tmp_path / "raft.safetensors").write_bytes(b"no weights")
    settings = {"flow_method": "raft_small", "flow_weights": tmp_path / "raft.safetensors"}
    with ReaderPool(1, DATA.model_copy(update=settings)) as pool:
        (future,) = pool.submit([(clip(video), 0, ("flow",))])
        with pytest.raises(ConfigError, match=r"raft\.safetensors: not a readable weights file"):
            future.result()


@pytest.mark.parametrize(
    ("module", "source", "told"),
    [
        ("av.py", "raise ImportError('libavcodec.so.62: no such\\nfile')", r"av .*\(libavcodec.so.62: no such file\)"),
        ("cv2.py", "raise OSError('libGL.so.1: cannot open')", r"cv2 cannot be loaded \(libGL.so.1: cannot open\)"),
        (
            "h5py.py",
            "raise ImportError('HDF5 2.0, built for 1.14')",
            r"needs cannot be loaded \(HDF5 2.0, built for 1.14",
        ),
        ("h5py.py", "import nothing_like_it", r"nothing_like_it cannot be loaded \(No module named"),
        ("cv2.py", "import os; os.kill(os.getpid(), 4)", r"ended as it loaded its libraries \(SIGILL\)"),
    ],
)
def test_library_that_does_not_load_is_an_installation_error(on_path, pool, tmp_path, module, source, told):
    on_path(module, source)
    (tmp_path / "pack.h5").touch()
    orders = [(clip(tmp_path / f"pack.h5::{name}"), 0, ("video",)) for name in "abc"]
    for future in pool.submit(orders):
        with pytest.raises(InstallationError, match=told) as caught:
            future.result()
        assert f"anew into {sys.prefix}" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_closing_cancels_what_is_still_asked(treacherous, film, video):
    slow = film("hang.mp4", [0.0, 0.1])
    pool = ReaderPool(1, DATA)
    futures = [pool.submit([(one, 0, ("video",))])[0] for one in (clip(video), clip(slow), clip(video))]
    futures[0].result()
    start = time.monotonic()
    pool.close()
    assert time.monotonic() - start < 2
    assert futures[0].result()["video"].state == PRESENT
    for future in futures[1:]:
        with pytest.raises(CancelledError):
            future.result(timeout=1)
    pool.close()
    assert children() == []


def run_script(tmp_path, tail, video, **how):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + tail)
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", script, video],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_pool_works_in_processes_started_by_any_method(tmp_path, video, method):
    tail = f"""
if __name__ == "__main__":
    read()
    process = multiprocessing.get_context({method!r}).Process(target=read_and_close, daemon=True)
    process.start()
    process.join()
    read()
    pool.close()
"""
    with run_script(tmp_path, tail, video) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    first, other, again = (line.split() for line in out.splitlines())
    assert first == again
    assert other[2] == first[2]
    assert len({first[0], first[1], other[0], other[1]}) == 4


def test_readers_end_when_their_parent_is_killed(tmp_path, video):
    with run_script(tmp_path, "read()\ntime.sleep(60)", video) as process:
        reader = int(process.stdout.readline().split()[1])
        assert is_alive(reader)
        process.kill()
    assert ends_soon(reader)


def test_ctrl_c_ends_a_run_and_its_busy_readers_at_once(treacherous, tmp_path, film, video):
    film("hang.mp4", [0.0, 0.1])
    tail = "\nwith pool:\n    read()\n    video = video.with_name('hang.mp4')\n    read()"
    with run_script(tmp_path, tail, video, start_new_session=True) as process:
        reader = int(process.stdout.readline().split()[1])
        time.sleep(0.3)
        start = time.monotonic()
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate(timeout=10)[1]
    assert time.monotonic() - start < 2
    assert ends_soon(reader, 1)
    assert process.returncode == -signal.SIGINT
    assert err.count("Traceback") == 1
    assert err.endswith("KeyboardInterrupt\n")


@pytest.mark.slow
def test_memory_of_a_reader_stays_flat_over_a_thousand_clips(film):
    path = film("tiny.mp4", [0.0, 0.04, 0.08, 0.12], sound=SOUND[:3200])
    orders = [(clip(path, 0.0, 0.16, f"c{k}"), 1, NAMES) for k in range(4)]

    def resident_kb():
        lines = Path(f"/proc/{children()[0]}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

    with ReaderPool(1, DATA) as pool:
        for at in range(250):
            assert all(future.result()["video"].state == PRESENT for future in pool.submit(orders))
            if at == 50:
                early = resident_kb()
        assert resident_kb() - early < 20_000
