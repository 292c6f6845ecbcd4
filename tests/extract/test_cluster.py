"""Shard tasks on a Dask cluster: the same bytes, one build a worker, small results, errors that leave it fit."""

import os
import pickle
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from pathlib import Path

import distributed
import pytest
import torch
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import CacheError, ClusterError
from karmma.data.plan import plan_orders, plan_shards
from karmma.data.sample import write_sample
from karmma.extract import cluster as module
from karmma.extract.cluster import Cluster
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.stage import extract_tokens, open_stores

NAMES = {"video": "swin3d_micro", "flow": "swin3d_micro", "audio": "ast_micro", "detections": "stlt_micro"}
CONFIG = ExtractConfig(
    **{modality: BackboneConfig(name=name, weights="none") for modality, name in NAMES.items()},
    theta=7,
    batch_size=2,
    shard_rows=4,
    threads=1,
    readers=1,
)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=8)
    rows = ["clip_id,video,start_s,stop_s,split,verb,detections"]
    for at in range(24):
        name = f"clip_{at % 8:04d}"
        start_s = 0.2 * (at // 8)
        rows.append(f"c{at:04d},videos/{name}.mp4,{start_s:.1f},{start_s + 0.8:.1f},train,push,boxes/{name}.json")
    (folder / "all.csv").write_text("\n".join(rows) + "\n")
    (folder / "few.csv").write_text("\n".join(rows[:11]) + "\n")
    return folder


@pytest.fixture
def data(tmp_path):
    return DataConfig(
        cache=tmp_path / "cache", heads=("verb",), modalities=("audio", "detections"), frames=4, size=32, max_boxes=3,
        audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip


@pytest.fixture
def scheduler(monkeypatch):
    """Address of a scheduler with one worker, reached over TCP, in this process; what the worker kept ends with it."""
    kept, enter = [], module.Engine.__enter__
    monkeypatch.setattr(module.Engine, "__enter__", lambda self: kept.append(self) or enter(self))
    options = {"n_workers": 1, "threads_per_worker": 1, "processes": False, "protocol": "tcp://"}
    with distributed.LocalCluster(**options, dashboard_address=":0", silence_logs=100) as cluster:
        yield cluster.scheduler_address
    for engine in kept:
        engine.__exit__()


def extract(path, data, **changes):
    return extract_tokens(read_clip_table(path, data.heads), data, CONFIG.model_copy(update=changes))


def contents(cache):
    folder = cache / "tokens"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def leases(cache):
    return [path for path in (cache / "leases").rglob("*") if path.is_file()]


def planned(path, data):
    """Return the names of the stores, and an order for every shard."""
    table, cache = read_clip_table(path, data.heads), Cache(data.cache)
    cache.add_clips(table)
    names = {modality: store.path.stem for modality, store in open_stores(cache, data, CONFIG).items()}
    plan = {"n_views": 1, "shard_rows": CONFIG.shard_rows}
    tasks = [task for m, name in names.items() for task in plan_shards(cache, table, m, name, **plan)]
    return names, plan_orders(cache, table, tasks)


def test_cluster_gives_the_bytes_of_the_plain_engine_and_builds_its_model_once(sample, data, scheduler, monkeypatch):
    plain = data.model_copy(update={"cache": data.cache.with_name("plain")})
    extract(sample / "all.csv", plain)
    built, results, build, result = Counter(), [], module.Engine.__init__, distributed.Future.result

    def counted(self, *args):
        built[threading.current_thread() is threading.main_thread()] += 1
        build(self, *args)

    def watched(self):
        results.append(result(self))
        return results[-1]

    monkeypatch.setattr(module.Engine, "__init__", counted)
    monkeypatch.setattr(distributed.Future, "result", watched)
    report = extract(sample / "all.csv", data, scheduler=scheduler)
    assert report.n_written == 48
    assert contents(data.cache) == contents(plain.cache)
    assert built == {False: 1}
    assert [n for n, _ in results] == [8] * 6
    assert max(len(pickle.dumps(result)) for result in results) < 100  # receipts stay where they are
    assert extract(sample / "all.csv", data, scheduler=scheduler).n_written == 0
    assert leases(data.cache) == []


def readers():
    """Return the reader processes of this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"karmma.data.reader" in (folder / "cmdline").read_bytes():
                found.append(folder.name)
    return found


def test_worker_makes_what_is_appended_and_lets_go_of_an_earlier_extraction(sample, data, scheduler):
    boxes = data.model_copy(update={"modalities": ("detections",)})
    assert extract(sample / "few.csv", boxes, scheduler=scheduler).n_written == 10
    assert extract(sample / "all.csv", boxes, scheduler=scheduler).n_written == 14
    assert len(readers()) == 1
    assert extract(sample / "few.csv", boxes, scheduler=scheduler, theta=2).n_written == 10
    assert len(readers()) == 1  # readers, and a model on the GPU, of what nobody asks for any more
    other = boxes.model_copy(update={"cache": data.cache.with_name("other")})
    extract(sample / "all.csv", other)
    made = contents(data.cache)
    assert {name: made[name] for name in contents(other.cache)} == contents(other.cache)


def test_error_of_a_worker_comes_through_and_leaves_its_worker_fit(sample, data, scheduler):
    names, orders = planned(sample / "all.csv", data)
    blocked = Cache(data.cache).tokens_path("detections", names["detections"]) / "tokens/c"
    blocked.mkdir(parents=True)
    (blocked / "1").write_text("a file where the second shard has to be")
    with Cluster(data, CONFIG.model_copy(update={"scheduler": scheduler}), names) as cluster:
        with pytest.raises(CacheError, match=r"tokens/c/1/.*cannot be written") as caught:
            cluster.make(orders, lambda _: None)
        assert "\n" not in str(caught.value)
        (blocked / "1").unlink()
        assert cluster.make(orders, lambda _: None) == []
    assert extract(sample / "all.csv", data).n_written == 0
    assert leases(data.cache) == []


def test_worker_that_would_make_other_tokens_refuses_and_names_what_differs(sample, data, scheduler):
    names, orders = planned(sample / "few.csv", data)
    other = CONFIG.model_copy(update={"scheduler": scheduler, "seed": 1})  # as if it had other weights
    with Cluster(data, other, names) as cluster, pytest.raises(CacheError, match=r"backbone\.weights is .*, asked for"):
        cluster.make(orders, lambda _: None)
    assert extract(sample / "few.csv", data).n_written == 20


def test_clips_reach_workers_that_live_in_another_folder(sample, data, scheduler, tmp_path, monkeypatch):
    plain = distributed.Client.map

    def elsewhere(self, *orders, **how):
        monkeypatch.chdir(tmp_path)
        return plain(self, *orders, **how)

    monkeypatch.setattr(distributed.Client, "map", elsewhere)
    monkeypatch.chdir(sample)
    report = extract(Path("all.csv"), data, scheduler=scheduler)
    assert report.failures == {"audio": {}, "detections": {}}
    assert report.n_written == 48


class NamedWorker:
    """Stands for the worker that asks for its device."""

    def __init__(self, name):
        self.name = name


@pytest.mark.parametrize(
    ("name", "n_devices", "device"),
    [(0, 4, "cuda:0"), (3, 4, "cuda:3"), (5, 4, "cuda:1"), (0, 0, "auto"), ("tcp://10.0.0.7:41231", 1, "auto")],
)
def test_each_worker_of_a_machine_takes_a_gpu_of_its_own(monkeypatch, name, n_devices, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n_devices)
    monkeypatch.setattr(distributed, "get_worker", lambda: NamedWorker(name))
    assert module._device() == device


@pytest.mark.parametrize(
    ("asked", "own", "given"),
    [
        ("auto", "cuda:3", "cuda:3"),
        ("cuda", "cuda:3", "cuda:3"),
        ("cuda:1", "cuda:3", "cuda:1"),
        ("cpu", "cuda:3", "cpu"),
        ("auto", "auto", "auto"),
        ("cuda", "auto", "cuda"),  # which then says that there is none
    ],
)
def test_device_that_is_asked_for_by_kind_is_the_workers_own_one(monkeypatch, asked, own, given):
    built = []

    class Seen(module.Engine):
        def __init__(self, data, config, names):
            built.append(config.device)
            raise CacheError("seen")

    monkeypatch.setattr(module, "Engine", Seen)
    sent = Cluster(DataConfig(), CONFIG.model_copy(update={"device": asked}), {}).work
    with pytest.raises(CacheError, match="seen"):
        module._engine(*sent, own)
    assert built == [given]


def test_settings_reach_the_workers_with_paths_that_hold_in_their_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.safetensors").write_bytes(b"")
    data = DataConfig(cache=Path("cache"), media=Path("media"))
    config = CONFIG.model_copy(update={"audio": BackboneConfig(name="ast_micro", weights="w.safetensors")})
    sent = Cluster(data, config, {}).work
    assert all(str(tmp_path / name) in sent[0] for name in ("cache", "media"))
    assert str(tmp_path / "w.safetensors") in sent[1]
    address = DataConfig(cache="s3://bucket/cache")
    assert '"s3://bucket/cache"' in Cluster(address, CONFIG, {}).work[0]


@pytest.mark.slow
def test_scheduler_that_is_not_there_is_one_line(sample, tmp_path):
    command = ["extract", "--config", sample / "karmma.toml", "--scheduler", "tcp://127.0.0.1:9", "--modality", "audio"]
    code = "from karmma.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert done.stderr.startswith("ClusterError: scheduler = 'tcp://127.0.0.1:9': cannot be reached: ")


def test_scheduler_without_workers_is_one_line_and_not_a_wait_without_end(monkeypatch):
    monkeypatch.setattr(module, "WORKERS_S", 0.5)
    with distributed.LocalCluster(n_workers=0, processes=False, protocol="tcp://", dashboard_address=":0") as alone:
        config = CONFIG.model_copy(update={"scheduler": alone.scheduler_address})
        with pytest.raises(ClusterError, match="dask worker for it"), Cluster(DataConfig(), config, {}):
            pass
