"""The engine: one decode for all modalities, reading ahead while writing, bounded memory, views, bfloat16, failures."""

import subprocess
import sys
import threading
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.drafts import ShardDraft
from karmma.data.errors import CacheError
from karmma.data.plan import plan_orders, plan_shards
from karmma.data.raw import read_clip
from karmma.data.readers import ReaderPool
from karmma.data.sample import write_sample
from karmma.data.stores import TokenStore
from karmma.data.theta import theta_average
from karmma.data.views import draw_view
from karmma.extract.config import BackboneConfig, ExtractConfig
from karmma.extract.engine import Engine
from karmma.extract.frozen import FrozenBackbone, build_frozen
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
# On the path of the readers: notes every frame that is decoded for pictures.
COUNTING = """
import os
from karmma.data.media import Media

def frames(self, from_s, whole=Media.frames):
    for frame in whole(self, from_s):
        with open(os.environ["KARMMA_TEST_LOG"], "a") as log:
            print(self.path.name, frame.time, file=log)
        yield frame

Media.frames = frames
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=8)
    return folder


@pytest.fixture
def data(tmp_path):
    return DataConfig(
        cache=tmp_path / "cache", heads=("verb",), modalities=("video", "flow", "audio"), frames=4, size=32,
        flow_size=32, max_boxes=3, audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip


@pytest.fixture
def table(sample):
    return read_clip_table(sample / "clips.csv", ("verb",))


def many(sample, n, video=None):
    """A table of n clips with boxes, cut from the 8 videos of the sample, or from one of them."""
    rows = ["clip_id,video,start_s,stop_s,split,verb,detections"]
    for at in range(n):
        name = f"clip_{at % 8 if video is None else video:04d}"
        start_s = 0.1 * (at // 8 % 10)
        rows.append(f"c{at:04d},videos/{name}.mp4,{start_s:.1f},{start_s + 0.5:.1f},train,push,boxes/{name}.json")
    path = sample / f"many_{n}_{video}.csv"
    path.write_text("\n".join(rows) + "\n")
    return read_clip_table(path, ("verb",))


def contents(cache, modality):
    """Return the bytes of every file of a modality's stores."""
    folder = cache / "tokens" / modality
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def planned(table, data, config):
    """Return the names of the stores, and an order for every shard."""
    cache = Cache(data.cache)
    cache.add_clips(table)
    names = {modality: store.path.stem for modality, store in open_stores(cache, data, config).items()}
    plan = {"n_views": config.views, "shard_rows": config.shard_rows}
    tasks = [task for m, name in names.items() for task in plan_shards(cache, table, m, name, **plan)]
    return names, plan_orders(cache, table, tasks)


@pytest.fixture
def decoded(tmp_path, monkeypatch):
    """Return a function that lists the (video, time) of frames decoded since it was called last."""
    log = tmp_path / "frames.log"
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(COUNTING)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("KARMMA_TEST_LOG", str(log))

    def since():
        found = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return found

    return since


def test_modalities_together_share_one_decode_and_equal_each_alone(sample, data, decoded):
    table = many(sample, 16)  # two clips of each video, which overlap
    extract_tokens(table, data, CONFIG.model_copy(update={"batch_size": 4, "shard_rows": 16}))
    together = Counter(decoded())
    assert len({line.split()[0] for line in together}) == 8
    assert set(together.values()) == {1}
    alone = Counter()
    for modality in data.modalities:
        other = data.model_copy(update={"cache": data.cache.with_name(modality), "modalities": (modality,)})
        extract_tokens(table, other, CONFIG.model_copy(update={"batch_size": 4, "shard_rows": 16}))
        assert contents(other.cache, modality) == contents(data.cache, modality)
        alone += Counter(decoded())
    assert alone.total() > 1.5 * together.total()


def test_later_shards_are_read_and_computed_while_one_is_being_written(sample, data, monkeypatch):
    reading, computing, asked, seen = threading.Event(), threading.Event(), [], {}
    plain = {"publish": ShardDraft.publish, "submit": ReaderPool.submit, "tokens": FrozenBackbone.tokens}

    def submit(self, orders):
        asked.extend(clip.clip_id for clip, _, _ in orders)
        if "c0012" in asked:  # of the fourth shard
            reading.set()
        return plain["submit"](self, orders)

    def tokens(self, arrays):
        seen.setdefault("asked before the first batch", len(asked))
        computing.set()
        return plain["tokens"](self, arrays)

    def publish(self, about):
        if self.task.shard == 0:
            computing.clear()
            seen["read meanwhile"], seen["computed meanwhile"] = reading.wait(20), computing.wait(20)
            assert threading.current_thread() is not threading.main_thread()
        return plain["publish"](self, about)

    monkeypatch.setattr(ShardDraft, "publish", publish)
    monkeypatch.setattr(ReaderPool, "submit", submit)
    monkeypatch.setattr(FrozenBackbone, "tokens", tokens)
    report = extract_tokens(many(sample, 24), data.model_copy(update={"modalities": ("detections",)}), CONFIG)
    assert seen == {"asked before the first batch": 12, "read meanwhile": True, "computed meanwhile": True}
    assert report.counts["detections"].total() == 24


def high_water(table, data, config, monkeypatch):
    """Extract; return the most drafts, and the most clips asked for but not yet used, at any time."""
    drafts, waiting, most = weakref.WeakSet(), [0], Counter()
    begin, submit, put = ShardDraft.__init__, ReaderPool.submit, ShardDraft.put

    def watch():
        most["drafts"], most["clips"] = max(most["drafts"], len(drafts)), max(most["clips"], waiting[0])

    def begun(self, *args):
        begin(self, *args)
        drafts.add(self)
        watch()

    def submitted(self, orders):
        waiting[0] += len(orders)
        watch()
        return submit(self, orders)

    def filled(self, *args, **kwargs):
        waiting[0] -= 1
        return put(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ShardDraft, "__init__", begun)
        patch.setattr(ReaderPool, "submit", submitted)
        patch.setattr(ShardDraft, "put", filled)
        report = extract_tokens(table, data, config)
    assert report.n_written == table.n_clips
    return dict(most)


@pytest.mark.parametrize(
    ("batch_size", "shard_rows", "n", "clips"),
    [(1, 4, 60, 12), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((2, 40, 80, 48), (40, 80, 160, 120)))],
)
def test_what_is_in_memory_does_not_grow_with_the_number_of_clips(
    sample, data, monkeypatch, batch_size, shard_rows, n, clips
):
    config, found = CONFIG.model_copy(update={"batch_size": batch_size, "shard_rows": shard_rows}), []
    for n_clips in (n, 2 * n):
        boxes = data.model_copy(update={"modalities": ("detections",), "cache": data.cache.with_name(str(n_clips))})
        found.append(high_water(many(sample, n_clips), boxes, config, monkeypatch))
        assert found[-1]["drafts"] <= 6  # one being written, one waiting, one computed, two and a bit read ahead
        assert found[-1]["clips"] <= clips  # three windows
    assert found[0]["clips"] == found[1]["clips"]


def test_tokens_of_a_view_are_the_backbone_on_that_view_and_for_training_only(data, table):
    data = data.model_copy(update={"modalities": ("video", "audio")})
    report = extract_tokens(table, data, CONFIG.model_copy(update={"views": 3}))
    train = table.split == "train"
    assert 0 < train.sum() < 8
    for modality in ("video", "audio"):
        store = TokenStore.open(report.stores[modality])
        assert store.n_views == 3
        backbone = build_frozen(modality, data, CONFIG)
        for view in range(3):
            wanted = train if view else np.ones(8, bool)
            assert (store.state(np.arange(8), view) != 0).tolist() == wanted.tolist()
        row = int(np.flatnonzero(train & (store.state(np.arange(8), 0) == 1))[0])
        clip, seen = table.clip(row), []
        for view in range(3):
            array = read_clip(clip, draw_view(clip.clip_id, view, data), (modality,), data)[modality].array
            with torch.inference_mode():
                tokens = theta_average(backbone(torch.from_numpy(array)[None]), 7)[0].numpy()
            seen.append(store.read(np.array([row]), view)[0].astype(np.float32))
            np.testing.assert_allclose(seen[-1], tokens, atol=4e-3)
        assert not np.allclose(seen[0], seen[1], atol=2e-2)
        assert not np.allclose(seen[1], seen[2], atol=2e-2)


def test_view_added_later_adds_shards_and_makes_nothing_again(data, table):
    few = data.model_copy(update={"modalities": ("audio", "detections")})
    first = extract_tokens(table, few, CONFIG)
    made = {p: p.stat().st_mtime_ns for p in few.cache.rglob("*") if p.is_file() and p.name != "zarr.json"}
    second = extract_tokens(table, few, CONFIG.model_copy(update={"views": 2}))
    assert (first.n_written, second.n_written) == (2 * 8, 2 * int((table.split == "train").sum()))
    assert first.stores == second.stores
    assert {path: path.stat().st_mtime_ns for path in made} == made
    whole = few.model_copy(update={"cache": few.cache.with_name("whole")})
    extract_tokens(table, whole, CONFIG.model_copy(update={"views": 2}))
    assert contents(few.cache, "audio") == contents(whole.cache, "audio")
    assert extract_tokens(table, few, CONFIG).n_written == 0  # fewer views are there as well


def test_engine_that_could_not_write_gives_its_leases_back_and_goes_on_when_it_can(sample, data):
    few = data.model_copy(update={"modalities": ("detections",)})
    table = many(sample, 24)
    names, orders = planned(table, few, CONFIG)
    blocked = Cache(few.cache).tokens_path("detections", names["detections"]) / "tokens/c"
    blocked.mkdir(parents=True)
    (blocked / "1").write_text("a file where the second shard has to be")
    with Engine(few, CONFIG, names) as engine:
        with pytest.raises(CacheError, match=r"tokens/c/1/.*cannot be written"):
            engine.make(orders, lambda _: None)
        left = [path for path in few.cache.glob("leases/**/*") if path.is_file()]
        assert left == []  # as long as it lives it would keep everybody else from these shards
        (blocked / "1").unlink()
        assert engine.make(orders, lambda _: None) == []
    assert extract_tokens(table, few, CONFIG).n_written == 0


RESIDENT = """
import json, sys
from pathlib import Path
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.extract.config import ExtractConfig
from karmma.extract.frozen import FrozenBackbone
from karmma.extract.stage import extract_tokens

def tokens(self, arrays, plain=FrozenBackbone.tokens):
    print(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0], flush=True)
    return plain(self, arrays)

FrozenBackbone.tokens = tokens
data, config = (kind(**json.loads(text)) for kind, text in zip((DataConfig, ExtractConfig), sys.argv[2:]))
extract_tokens(read_clip_table(Path(sys.argv[1]), ("verb",)), data, config)
"""


@pytest.mark.slow
def test_resident_memory_stays_flat_over_many_clips(sample, data):
    """130 MB of raw clips pass through, in 400 shards."""
    data = data.model_copy(update={"modalities": ("video", "audio"), "size": 48, "frames": 8})
    config = CONFIG.model_copy(update={"theta": None})
    table = many(sample, 1600)
    command = [sys.executable, "-c", RESIDENT, str(table.path), data.model_dump_json(), config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found = [int(line) for line in done.stdout.split()]
    assert len(found) == 1600
    assert max(found[800:]) - max(found[200:400]) < 30_000
