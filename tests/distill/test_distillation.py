"""Distillation: masks from a seed, views joined to logits, and the right teacher or none."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.errors import CacheError, ConfigError, IncompleteCacheError, MediaError, StaleCacheError
from karmma.data.identity import input_identity
from karmma.data.readers import ReaderPool
from karmma.data.runs import RunFolder
from karmma.data.stores import LogitStore
from karmma.distill.config import StudentConfig
from karmma.distill.distillation import Distillation
from karmma.distill.dropout import seeded_dropout
from karmma.distill.losses import kl_divergence
from karmma.distill.results import Asked
from karmma.distill.stage import describe_run, distill_student, evaluate
from karmma.distill.teacher import CachedTeacher, find_teacher, known_present
from karmma.fuse.losses import cross_entropy
from karmma.fuse.seeds import clip_seeds

N = 24
WITH_TEACHER = {"teacher": None}


def add_teacher(data, table, name="t" * 16, n_views=2, seed=0, **attributes):
    """Put a teacher's logits into the cache: made up, but of the right shape."""
    cache = Cache(data.cache)
    cache.add_clips(table)
    draw = np.random.default_rng(seed)
    classes = {head: list(table.classes(head)) for head in data.heads}
    sizes = {head: (N, n_views, len(names)) for head, names in classes.items()}
    logits = {head: draw.standard_normal(size).astype(np.float32) for head, size in sizes.items()}
    state = np.ones((N, n_views))
    state[table.split != "train", 1:] = 0
    inputs = {modality: input_identity(modality, data) for modality in data.modalities}
    about = {"teacher": name, "run": "teacher-made", "classes": classes, "inputs": inputs, "tokens": {}} | attributes
    LogitStore.write(cache.logits_path(name), logits, state, cache.row_digests(), about)
    return cache, logits


@pytest.fixture
def course(table, data, config):
    cache, logits = add_teacher(data, table)
    teacher = find_teacher(cache, table, data, config.model_copy(update=WITH_TEACHER))
    with Distillation(table, data, config, teacher, known=None, device=torch.device("cpu")) as course:
        course.made = logits
        yield course


def test_loss_is_equation_5_on_the_logits_of_the_same_clip_and_view(course):
    course.student.eval()
    for epoch in (0, 1, 2):
        batch = next(iter(course.batches(epoch)))
        assert batch.view == epoch % 2
        parts = course.losses(batch)
        output = course.student(batch.inputs, batch.present)
        targets = {head: torch.from_numpy(values[batch.rows, batch.view]) for head, values in course.made.items()}
        ce = cross_entropy(output.logits, {head: labels[batch.rows] for head, labels in course.labels.items()})
        kl = kl_divergence(output.logits, targets)
        assert parts["loss"].item() == pytest.approx(0.7 * ce.item() + 0.3 * kl.item(), abs=1e-5)


def test_masks_come_from_seed_step_and_clip_and_keep_at_least_one(course):
    for epoch in (3, 4, 3):
        for at, (rows, wanted) in enumerate(course.plan(epoch)):
            step = epoch * course.steps_per_epoch + at
            alone = [seeded_dropout(torch.from_numpy(course.present[[row]]), 0.5, clip_seeds(0, step, [clip_id]))
                     for row, clip_id in zip(rows, course.table.clip_ids[rows], strict=True)]  # fmt: skip
            assert torch.cat(alone).numpy().tolist() == wanted.tolist()
            assert wanted.any(axis=1).all()
            assert not (wanted & ~course.present[rows]).any()


def test_masks_are_logged_so_that_they_can_be_replayed(course):
    told = course.about(1)
    plan = course.plan(1)
    assert sum(told["masks"].values()) == len(course.rows["train"])
    (only_video,) = [n for name, n in told["masks"].items() if name == "V"]
    assert only_video == sum((wanted == [True, False, False]).all(axis=1).sum() for _, wanted in plan)
    assert course.about(2) != told
    assert course.about(1) == told


def test_batches_read_only_what_the_masks_keep(course):
    for batch, (rows, wanted) in zip(course.batches(0), course.plan(0), strict=True):
        assert batch.rows.tolist() == rows.tolist()
        assert batch.present.tolist() == wanted.tolist()


def test_every_training_clip_is_seen_once_an_epoch(course):
    seen = np.concatenate([batch.rows for batch in course.batches(1)])
    assert sorted(seen) == course.rows["train"].tolist()


def test_missing_logits_of_a_clip_and_view_raise(course, table):
    train = table.rows("train")
    with pytest.raises(IncompleteCacheError):
        course.teacher.logits(np.array([table.rows("val")[0]]), 1)
    course.teacher.store.states[train[0], 1] = 0
    with pytest.raises(IncompleteCacheError, match="1 training clips have no logits in view 1"):
        course.teacher.require(train)
    course.teacher.store.states[train[0], 1] = 2  # absent: it was asked, and has nothing to say
    course.teacher.require(train)
    assert course.teacher.speaks(train[:2], 1).tolist() == [False, True]


def test_without_teacher_the_loss_is_cross_entropy_alone(table, data, config):
    none = CachedTeacher(None, np.arange(N))
    with Distillation(table, data, config, none, known=None, device=torch.device("cpu")) as course:
        parts = course.losses(next(iter(course.batches(0))))
    assert set(parts) == {"loss", "ce"}
    assert parts["loss"] is parts["ce"]


@pytest.mark.parametrize("how", [{"accumulate": 3}, {"accumulate": 9}, {"recompute": True}], ids=str)
def test_small_memory_gives_the_gradients_of_the_whole_batch(course, table, data, config, how):
    cached = course.teacher
    with Distillation(table, data, config.model_copy(update=how), cached, (course.present, {}), course.device) as other:
        other.student.load_state_dict(course.student.state_dict())
        batch = next(iter(course.batches(1)))
        found = []
        for one in (course, other):
            one.student.train()
            parts = one.learn(batch, 7)
            found.append((parts, {name: p.grad for name, p in one.student.named_parameters() if p.grad is not None}))
    (whole, gradients), (parts, of_parts) = found
    for name, value in whole.items():
        assert parts[name].item() == pytest.approx(value.item(), abs=1e-5)
    assert gradients.keys() == of_parts.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(of_parts[name], gradient, atol=1e-5), name


def test_batch_without_a_clip_has_no_loss_and_no_gradient(course):
    (batch,) = course.stream.batches([(np.arange(0), np.zeros((0, 3), bool))], 0)
    assert {name: value.item() for name, value in course.learn(batch, 0).items()} == {"loss": 0, "ce": 0, "kl": 0}
    assert all(p.grad is None for p in course.student.parameters())


def test_decoded_clips_serve_the_next_run_to_the_same_bytes(table, data, config, tmp_path, monkeypatch):
    plain = distill_student(table, data, config).run
    keeping = config.model_copy(update={"decoded_gb": 1.0})
    asked, submit = [], ReaderPool.submit
    monkeypatch.setattr(ReaderPool, "submit", lambda self, orders: asked.extend(orders) or submit(self, orders))
    for name in ("first", "second"):
        there = data.model_copy(update={"runs": tmp_path / name, "inputs": tmp_path / "inputs"})
        again = distill_student(table, there, keeping).run
        assert (again / "best.safetensors").read_bytes() == (plain / "best.safetensors").read_bytes()
        assert bool(asked) == (name == "first")
        asked.clear()


def test_stage_trains_evaluates_and_does_neither_twice(table, data, config):
    add_teacher(data, table, n_views=1)
    config = config.model_copy(update=WITH_TEACHER)
    report = distill_student(table, data, config)
    assert (report.was_there, report.teacher) == (False, "t" * 16)
    assert distill_student(table, data, config).was_there
    run = RunFolder.open(report.run)
    asked = Asked("test", draws=2, device="cpu")
    first = evaluate(run, table, data.cache, asked)
    assert not first.was_there
    subsets = ["V+A+D", "V+A", "V+D", "A+D", "V", "A", "D"]
    assert [row.subset for row in first.evaluation.of("all")] == subsets
    assert all(file.exists() for file in first.files)
    times = [file.stat().st_mtime_ns for file in first.files]
    again = evaluate(run, table, data.cache, asked)
    assert again.was_there
    assert again.evaluation.rows == first.evaluation.rows
    assert [file.stat().st_mtime_ns for file in first.files] == times


def test_student_without_teacher_trains_beside_a_cache_of_other_clips_or_settings(table, data, config, tmp_path):
    cache, _ = add_teacher(data, table)
    assert known_present(cache, table, data, config) is None
    cache.write_identity("audio", "0" * 16, {"input": {"frames": 99}})
    assert known_present(cache, table, data, config) is None
    assert distill_student(table, data, config).teacher == "none"


def test_same_seed_gives_the_same_student_bit_by_bit(table, data, config, tmp_path):
    runs = [distill_student(table, data.model_copy(update={"runs": tmp_path / name}), config).run for name in "ab"]
    first, second = ((run / "best.safetensors").read_bytes() for run in runs)
    assert first == second


def test_teacher_that_saw_other_views_is_refused_with_the_field(table, data, config):
    add_teacher(data, table)
    other = data.model_copy(update={"view_seed": 7})
    with pytest.raises(StaleCacheError, match=r"video\.view_seed is 0, asked for 7"):
        distill_student(table, other, config.model_copy(update=WITH_TEACHER))


def test_teacher_of_other_classes_is_refused(table, data, config):
    add_teacher(data, table, classes={"verb": list("abcd"), "noun": list(table.classes("noun"))})
    with pytest.raises(StaleCacheError, match=r"classes\.verb is \['a', 'b', 'c', 'd'\], asked for \['lift'"):
        distill_student(table, data, config.model_copy(update=WITH_TEACHER))


def test_several_teachers_are_listed_and_one_can_be_chosen(table, data, config):
    add_teacher(data, table, name="a" * 16)
    cache, _ = add_teacher(data, table, name="b" * 16, run="teacher-b")
    with pytest.raises(CacheError, match=r"2 teachers here: a{16} \(teacher-made\), b{16} \(teacher-b\).*--teacher"):
        find_teacher(cache, table, data, config.model_copy(update=WITH_TEACHER))
    for name in ("b" * 16, "teacher-b", "runs/teacher-b"):
        assert find_teacher(cache, table, data, config.model_copy(update={"teacher": name})).digest == "b" * 16
    with pytest.raises(CacheError, match="no logits of a teacher 'c'"):
        find_teacher(cache, table, data, config.model_copy(update={"teacher": "c"}))


def test_cache_without_teacher_says_what_to_run(table, data, config):
    Cache(data.cache).add_clips(table)
    with pytest.raises(CacheError, match=r"no teacher here\. Run karmma train-teacher"):
        distill_student(table, data, config.model_copy(update=WITH_TEACHER))


def test_teacher_that_saw_another_file_of_a_clip_is_refused(table, data, config, sample, tmp_path):
    add_teacher(data, table)
    text = (sample / "clips.csv").read_text().replace("videos/", f"{sample}/videos/")
    (tmp_path / "t.csv").write_text(text.replace("boxes/", f"{sample}/boxes/"))
    other = read_clip_table(tmp_path / "t.csv", data.heads)
    cache = Cache(data.cache)
    with pytest.raises(StaleCacheError, match=r"15 clip\(s\) are not those that this teacher saw, such as 'clip_0000'"):
        find_teacher(cache, other, data, config.model_copy(update=WITH_TEACHER))


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("karmma", {}),
        ("delta", {"teacher": "none"}),
        ("dropout", {"teacher": "none", "missing": "ignore"}),
        ("baseline", {"teacher": "none", "missing": "ignore", "modality_dropout": 0.0}),
    ],
)
def test_variant_is_the_same_run_as_its_options(table, data, variant, options):
    none = CachedTeacher(None, np.arange(N))
    named, spelled = StudentConfig(variant=variant), StudentConfig(**options)
    assert describe_run(table, data, named, none) == describe_run(table, data, spelled, none)
    assert named.teacher == spelled.teacher


def test_variant_that_is_contradicted_is_refused():
    with pytest.raises(ValueError, match=r"variant baseline means modality_dropout 0\.0, found 0\.5"):
        StudentConfig(variant="baseline", modality_dropout=0.5)
    assert StudentConfig(variant="baseline", modality_dropout="0", teacher=None).teacher == "none"
    assert StudentConfig(variant="delta", missing="B.2").missing == "B.2"


def test_foreign_teacher_of_training_clips_alone_will_do(table, data, config):
    cache, _ = add_teacher(data, table, n_views=1)
    train = table.rows("train")
    (path,) = (cache.path / "logits").glob("*.zarr")
    store = LogitStore.open(path)
    logits = {head: store.values(head) for head in store.heads}
    made_from = np.full(N, "", "<U8")
    made_from[train] = cache.row_digests()[train]
    state = np.zeros((N, 1))
    state[train] = 1
    LogitStore.write(path, logits, state, made_from, store.attributes)
    teacher = find_teacher(cache, table, data, config.model_copy(update=WITH_TEACHER))
    teacher.require(train)
    assert teacher.speaks(train, 0).all()


def test_clip_that_the_teacher_has_nothing_to_say_of_learns_from_its_label(course):
    train, store = course.rows["train"], course.teacher.store
    store.states[train[::2]] = 2
    batch = next(iter(course.batches(0)))
    spoken = course.teacher.speaks(batch.rows, 0)
    assert 0 < spoken.sum() < len(spoken)
    course.student.eval()
    parts = course.losses(batch)
    output = course.student(batch.inputs, batch.present)
    targets = {h: torch.from_numpy(values[batch.rows[spoken], 0]) for h, values in course.made.items()}
    kl = kl_divergence({h: logits[torch.from_numpy(spoken)] for h, logits in output.logits.items()}, targets)
    assert parts["kl"].item() == pytest.approx(kl.item(), abs=1e-5)
    store.states[train] = 2
    assert course.losses(batch)["kl"].item() == 0
    course.student.train()
    assert course.learn(batch, 0)["kl"].item() == 0


def test_student_without_teacher_sees_as_many_views_as_the_cache_has(table, data, config, monkeypatch):
    store = type("Store", (), {"n_views": 4, "path": Path("x.zarr")})
    monkeypatch.setattr("karmma.distill.teacher._whole_stores", lambda *_: {"x": store})
    monkeypatch.setattr("karmma.data.selection.n_missing", lambda cache, table, m, name, view: int(view > 2))
    cache, _ = add_teacher(data, table)
    assert find_teacher(cache, table, data, config).n_views == 3
    assert find_teacher(cache, table, data, config.model_copy(update={"views": 2})).n_views == 2
    assert find_teacher(None, table, data, config).n_views == 1
    with pytest.raises(ConfigError, match=r"views is 5, but .* has 2: a student sees the teacher's"):
        find_teacher(cache, table, data, config.model_copy(update={"views": 5, "teacher": None}))


def broken_table(sample, data, tmp_path, *rows):
    """Return the table with some videos that cannot be read."""
    lines = (sample / "clips.csv").read_text().replace("boxes/", f"{sample}/boxes/").splitlines()
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    for row in range(N):
        own = f"videos/clip_{row:04d}.mp4"
        lines[row + 1] = lines[row + 1].replace(own, "bad.mp4" if row in rows else f"{sample}/{own}")
    (tmp_path / "broken.csv").write_text("\n".join(lines) + "\n")
    return read_clip_table(tmp_path / "broken.csv", data.heads)


def test_batch_whose_clips_all_fail_is_left_out_and_they_are_named(table, sample, data, config, tmp_path):
    train = table.rows("train")
    bad = broken_table(sample, data, tmp_path, *train[:3])
    alone = config.model_copy(update={"modalities": ("video",), "batch_size": 1, "epochs": 1, "allow_failures": 3})
    known = np.ones((N, 1), bool), {}
    run = RunFolder(tmp_path / "run")
    with Distillation(bad, data, alone, CachedTeacher(None, np.arange(N)), known, torch.device("cpu")) as course:
        course.train(run, {})
    assert set(run.result["failed"]) == {str(table.clip_ids[row]) for row in train[:3]}
    assert "video failed: " in next(iter(run.result["failed"].values()))


def test_failures_of_the_extraction_count_and_are_named(table, data, config):
    known = np.ones((N, 3), bool), {"clip_0003": "audio failed: no such file"}
    config = config.model_copy(update={"allow_failures": 1})
    with Distillation(table, data, config, CachedTeacher(None, np.arange(N)), known, torch.device("cpu")) as course:
        course.about(0)
        course.stream.failed["clip_0005"] = "video failed: damaged"
        with pytest.raises(MediaError, match=r"clip_0005: video failed: damaged\. Mend .* --allow-failures 2"):
            course.about(0)


def test_survey_that_fails_leaves_no_reader(sample, data, config, table, tmp_path):
    bad = broken_table(sample, data, tmp_path, table.rows("train")[5])
    with pytest.raises(MediaError):
        Distillation(bad, data, config, CachedTeacher(None, np.arange(N)), None, torch.device("cpu"))
    mine = ["pgrep", "-P", str(os.getpid()), "-f", "karmma.data.reader"]
    assert subprocess.run(mine, capture_output=True, text=True).stdout == ""


def test_allowing_failures_later_goes_on_with_the_same_run(table, data, config):
    none = CachedTeacher(None, np.arange(N))
    allowed = config.model_copy(update={"allow_failures": 2})
    assert describe_run(table, data, allowed, none) == describe_run(table, data, config, none)
