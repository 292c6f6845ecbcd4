"""Evaluation of a run: predictions once, of students and teachers, against one clip and one subset at a time."""

import numpy as np
import pytest
import torch
from karmma.data.batches import TokenReader
from karmma.data.cache import Cache
from karmma.data.clips import read_clip_table
from karmma.data.config import DataConfig
from karmma.data.errors import IncompleteCacheError, MediaError, TableError
from karmma.data.modality import subsets
from karmma.data.raw import read_clip
from karmma.data.runs import RunFolder
from karmma.data.stores import TokenStore
from karmma.data.views import draw_view
from karmma.distill import evaluate as module
from karmma.distill.config import StudentConfig
from karmma.distill.evaluate import modalities_of, predict_run
from karmma.distill.results import Asked
from karmma.distill.stage import distill_student, evaluate, predictions_path, submit
from karmma.distill.student import load_student
from karmma.extract.config import ExtractConfig
from karmma.extract.stage import extract_tokens
from karmma.fuse.config import TeacherConfig
from karmma.fuse.logits import averaged, load_teacher
from karmma.fuse.stage import train_teacher

M = ("video", "audio", "detections")
MICRO = {"video": "swin3d_micro", "audio": "ast_micro", "detections": "stlt_micro"}
BACKBONES = {modality: {"name": name, "weights": "none"} for modality, name in MICRO.items()}
SMALL = {"embed_dim": 16, "ffn_dim": 16, "n_attention_heads": 2, "epochs": 1, "warmup_epochs": 0, "device": "cpu"}
ASKED = Asked("test", draws=2, device="cpu")


@pytest.fixture(scope="module")
def made(sample, tmp_path_factory):
    """A cache of 24 clips, a teacher and a student, all tiny."""
    folder = tmp_path_factory.mktemp("made")
    data = DataConfig(
        cache=folder / "cache", runs=folder / "runs", modalities=M, frames=4, size=32, max_boxes=3,
        audio_segment_s=0.256, audio_hop=128, audio_mels=24, audio_steps=32,
    )  # fmt: skip
    table = read_clip_table(sample / "clips.csv", data.heads)
    extract_tokens(table, data, ExtractConfig(**BACKBONES, theta=9, device="cpu"))
    teacher = RunFolder.open(train_teacher(table, data, TeacherConfig(**SMALL, n_layers=1)).run)
    student = RunFolder.open(
        distill_student(table, data, StudentConfig(**BACKBONES, **SMALL, theta=9, batch_size=6)).run
    )
    return table, data, teacher, student


@torch.inference_mode()
def test_students_predictions_equal_one_clip_and_one_subset_at_a_time(made, tmp_path):
    table, data, _, run = made
    found = predict_run(run, table, data.cache, ASKED, tmp_path / "p")
    student, _, _ = load_student(run, torch.device("cpu"))
    assert found.rows.tolist() == table.rows("test").tolist()
    for at, row in enumerate(found.rows):
        clip = table.clip(row)
        readings = read_clip(clip, draw_view(clip.clip_id, 0, data), M, data)
        has = [readings[m].array is not None for m in M]
        assert found.present[at].tolist() == has
        for subset in subsets(M):
            mask = torch.tensor([[ok and m in subset for m, ok in zip(M, has, strict=True)]])
            inputs = {m: torch.from_numpy(readings[m].array[None]) for m, on in zip(M, mask[0], strict=True) if on}
            wanted = student(inputs, mask).logits
            for head in ("verb", "noun"):
                assert torch.allclose(found.logits[subset][head][at], wanted[head][0], atol=1e-5)


@torch.inference_mode()
def test_teachers_predictions_equal_one_subset_at_a_time(made, tmp_path):
    table, data, run, _ = made
    found = predict_run(run, table, data.cache, ASKED, tmp_path / "p")
    cache = Cache(data.cache)
    stores = {m: TokenStore.open(cache.tokens_path(m, name)) for m, name in run.config["tokens"].items()}
    model, reader = load_teacher(run, stores), TokenReader(stores, cache.rows(table.clip_ids))
    (batch,) = reader.batches([table.rows("test")], 0)
    for subset in subsets(M):
        mask = batch.present & torch.tensor([m in subset for m in M])
        wanted = model(averaged(batch, model), mask).logits
        for head in ("verb", "noun"):
            assert torch.allclose(found.logits[subset][head], wanted[head], atol=1e-5)


def test_every_backbone_runs_once_per_clip(made, tmp_path, monkeypatch):
    table, data, _, run = made
    seen = []
    load = module.load_student

    def watched(*asked):
        student, *rest = load(*asked)
        for name, backbone in student.backbones.items():
            backbone.register_forward_hook(lambda m, args, out, name=name: seen.append((name, len(args[0]))))
        return student, *rest

    monkeypatch.setattr(module, "load_student", watched)
    found = predict_run(run, table, data.cache, ASKED, tmp_path / "p")
    for column, modality in enumerate(M):
        assert sum(n for name, n in seen if name == modality) == found.present[:, column].sum()


def test_saved_predictions_are_read_until_run_or_clips_change(made, tmp_path, monkeypatch):
    table, data, teacher, student = made
    found = predict_run(student, table, data.cache, ASKED, tmp_path / "p")
    computed = module._by_student
    monkeypatch.setattr(module, "_by_student", lambda *_: pytest.fail("computed again"))
    again = predict_run(student, table, data.cache, ASKED, tmp_path / "p")
    assert again.rows.tolist() == found.rows.tolist()
    other = predict_run(teacher, table, data.cache, ASKED, tmp_path / "p")
    assert not torch.equal(other.logits[M]["verb"], found.logits[M]["verb"])
    monkeypatch.setattr(module, "_by_student", lambda *asked: calls.append(1) or computed(*asked))
    calls = []
    fewer = table.kept(table.clip_ids != table.clip_ids[table.rows("test")[-1]])
    assert len(predict_run(student, fewer, data.cache, ASKED, tmp_path / "p").rows) == len(found.rows) - 1
    assert calls


def test_evaluation_of_other_draws_needs_no_second_prediction(made, monkeypatch):
    table, data, _, student = made
    first = evaluate(student, table, data.cache, ASKED)
    assert predictions_path(student, ASKED).exists()
    monkeypatch.setattr(module, "_by_student", lambda *_: pytest.fail("computed again"))
    assert evaluate(student, table, data.cache, ASKED).was_there
    more = evaluate(student, table, data.cache, Asked("test", draws=4, device="cpu"))
    assert not more.was_there
    assert more.evaluation.rows == first.evaluation.rows
    as_it_is = evaluate(student, table, data.cache, Asked("test", draws=None, device="cpu"))
    assert as_it_is.was_there
    assert as_it_is.evaluation.draws == 4


def test_two_views_of_a_student_are_averaged(made, tmp_path):
    table, data, _, run = made
    found = predict_run(run, table, data.cache, Asked("val", views=2, device="cpu"), tmp_path / "p")
    one = predict_run(run, table, data.cache, Asked("val", device="cpu"), tmp_path / "q")
    assert torch.allclose(found.logits[M]["verb"].exp().sum(1), torch.ones(len(found.rows)), atol=1e-5)
    assert not torch.allclose(found.logits[M]["verb"].softmax(1), one.logits[M]["verb"].softmax(1), atol=1e-4)
    assert Asked("val", views=2).stem == "val-2views"


def test_views_that_the_teachers_cache_lacks_are_told(made, tmp_path):
    table, data, run, _ = made
    with pytest.raises(IncompleteCacheError, match=r"6 of 6 clips of split 'test' have no video tokens of view 1"):
        predict_run(run, table, data.cache, Asked("test", views=2, device="cpu"), tmp_path / "p")


def test_empty_split_and_unreadable_clips_are_told(made, sample, tmp_path):
    _, data, _, run = made
    lines = (sample / "clips.csv").read_text().splitlines()
    (tmp_path / "t.csv").write_text("\n".join(line for line in lines if ",test," not in line) + "\n")
    no_files = read_clip_table(tmp_path / "t.csv", data.heads)  # whose videos are not beside it
    with pytest.raises(TableError, match="no clip in split 'test'"):
        predict_run(run, no_files, data.cache, ASKED, tmp_path / "p")
    with pytest.raises(MediaError, match="No clip of 'val' can be read, such as clip_"):
        predict_run(run, no_files, data.cache, Asked("val", device="cpu"), tmp_path / "p")


def test_clip_that_fails_is_named_and_the_others_count(made, sample, tmp_path):
    table, data, _, run = made
    text = (sample / "clips.csv").read_text()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    bad = str(table.clip_ids[table.rows("test")[0]])
    text = text.replace(f"videos/{bad}.mp4", f"{tmp_path}/bad.mp4").replace(f"boxes/{bad}.json", "")
    text = text.replace("videos/", f"{sample}/videos/").replace("boxes/", f"{sample}/boxes/")
    (tmp_path / "t.csv").write_text(text)
    other = read_clip_table(tmp_path / "t.csv", data.heads)
    found = predict_run(run, other, data.cache, ASKED, tmp_path / "p")
    assert list(found.failed) == [bad]
    assert found.rows.tolist() == table.rows("test")[1:].tolist()
    # Mended, it is read again, and the others are not.
    (tmp_path / "bad.mp4").write_bytes(table.clip(table.rows("test")[0]).video.read_bytes())
    mended = predict_run(run, other, data.cache, ASKED, tmp_path / "p")
    assert mended.failed == {}
    assert mended.rows.tolist() == table.rows("test").tolist()
    assert torch.equal(mended.logits[M]["verb"][1:], found.logits[M]["verb"])


def test_teachers_failed_tokens_are_named_and_clips_with_nothing_left_are_out(made, tmp_path, monkeypatch):
    table, data, run, _ = made
    lost, poor = (str(table.clip_ids[row]) for row in table.rows("test")[:2])
    failures = {"video": {lost: "gone"}, "audio": {lost: "gone", poor: "cut"}, "detections": {lost: "gone"}}
    monkeypatch.setattr(Cache, "failures", lambda self, modality, *_: failures[modality])
    states = TokenReader.states

    def some(self, modality, view):
        found = states(self, modality, view).copy()
        found[table.rows("test")[0]] = 3
        return found

    monkeypatch.setattr(TokenReader, "states", some)
    found = predict_run(run, table, data.cache, ASKED, tmp_path / "p")
    assert set(found.failed) == {lost, poor}
    assert found.failed[poor] == "audio failed: cut"
    assert found.rows.tolist() == table.rows("test")[1:].tolist()


def test_modalities_of_runs_are_in_order(made):
    _, _, teacher, student = made
    assert modalities_of(teacher) == modalities_of(student) == M


def test_submission_of_unlabelled_clips_is_written(made, sample, tmp_path, monkeypatch):
    table, data, _, run = made
    sizes = {head: len(names) for head, names in run.config["classes"].items()}
    monkeypatch.setattr("karmma.distill.challenge.HEADS", sizes)
    lines = (sample / "clips.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [line.split(",") for line in lines[1:]]
    for row in rows:
        if row[columns.index("split")] == "test":
            row[columns.index("verb")] = row[columns.index("noun")] = ""
        row[columns.index("video")] = str(sample / row[columns.index("video")])
        row[columns.index("detections")] = row[columns.index("detections")] and str(sample / row[-1])
    (tmp_path / "t.csv").write_text("\n".join([lines[0], *map(",".join, rows)]) + "\n")
    bare = read_clip_table(tmp_path / "t.csv", data.heads)
    assert submit(run, bare, data.cache, ASKED, tmp_path / "s.json", (2, 3, 3)) == {}
    assert (tmp_path / "s.json").read_text().count('"verb"') == 6
    assert np.array_equal(bare.rows("test"), table.rows("test"))
