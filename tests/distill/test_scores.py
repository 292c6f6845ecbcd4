"""What predictions are worth, against loops that count clip by clip."""

import itertools

import numpy as np
import pytest
import torch
from karmma.data.clips import read_clips
from karmma.data.config import DataConfig
from karmma.data.errors import TableError
from karmma.data.runs import RunFolder
from karmma.distill.groups import groups
from karmma.distill.results import Asked, Evaluation
from karmma.distill.scores import RATES, judge, labels_of
from karmma.distill.subsets import Predictions, averaged_over

M = ("video", "audio")
SUBSETS = [("video", "audio"), ("video",), ("audio",)]
CLASSES = {"verb": ["lift", "pull", "push"], "noun": ["ball", "box", "cup", "kite"]}
N = 40


def wave(*shape, start=0):
    n = int(np.prod(shape))
    return torch.sin(torch.arange(start, start + n, dtype=torch.float64) * 0.7).reshape(shape).float() * 3


@pytest.fixture
def table(tmp_path):
    """40 test clips of three participants, one of them unseen, and 30 training clips in which some classes are rare."""
    rows = []
    for at in range(30):
        verb, noun = CLASSES["verb"][min(at // 13, 2)], CLASSES["noun"][min(at // 9, 3)]
        rows.append(f"t{at},v.mp4,train,P{at % 2},{verb},{noun}")
    for at in range(N):
        verb = "" if at == 5 else CLASSES["verb"][at % 3]
        rows.append(f"c{at},v.mp4,test,P{at % 3},{verb},{CLASSES['noun'][at * 7 % 4]}")
    (tmp_path / "t.csv").write_text("\n".join(["clip_id,video,split,participant,verb,noun", *rows]) + "\n")
    return read_clips(DataConfig(table=tmp_path / "t.csv"))


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "student-1")
    settings = {"modalities": M, "missing": "B.5", "modality_dropout": 0.5, "seed": 3}
    run.start({"kind": "student", "teacher": "none", "settings": settings, "data": {}, "classes": CLASSES})
    run.finish({})
    return run


@pytest.fixture
def found(table):
    """Made-up logits of the 40 clips, the third of which has no audio."""
    present = np.ones((N, 2), bool)
    present[2, 1] = False
    sizes = {head: len(names) for head, names in CLASSES.items()}
    logits = {s: {h: wave(N, n, start=17 * at + len(h)) for h, n in sizes.items()} for at, s in enumerate(SUBSETS)}
    return Predictions(table.rows("test"), present, logits)


def judged(run, table, found, draws=3):
    return judge(run, table, found, Asked("test", draws=draws), "digest")


def test_accuracy_top5_and_complete_match_a_loop(run, table, found):
    evaluation, _ = judged(run, table, found)
    labels = labels_of(run, table, found.rows)
    for row, subset in zip(evaluation.of("all"), SUBSETS, strict=True):
        right, five, n = 0, 0, 0
        for at in range(N):
            if labels["verb"][at] < 0:
                continue
            n += 1
            verb, noun = (found.logits[subset][head][at].softmax(0) for head in ("verb", "noun"))
            right += int(verb.argmax() == labels["verb"][at] and noun.argmax() == labels["noun"][at])
            best = (verb[:, None] * noun).flatten().topk(5).indices.tolist()
            five += int(labels["verb"][at] * 4 + labels["noun"][at]) in best
        assert row.n_clips == n == N - 1
        assert row.accuracy["action"] == pytest.approx(right / n)
        assert row.top5["action"] == pytest.approx(five / n)
        assert row.n_complete == (n if subset == ("video",) else n - 1)
        assert row.low["action"] < row.accuracy["action"] < row.high["action"]


def test_groups_are_by_participant_and_by_training_counts(run, table, found):
    labels = labels_of(run, table, found.rows)
    counted = groups(table, found.rows, labels)
    assert list(counted) == ["all", "seen", "unseen", "tail"]
    for at in range(N):
        has = at != 5
        assert bool(counted["unseen"]["action"][at]) == (has and at % 3 == 2)
        assert bool(counted["seen"]["action"][at]) == (has and at % 3 != 2)
        # Of 30 training clips, 4 push (13 percent) and 3 with kites (10): no other fits into a fifth.
        rare_verb, rare_noun = has and at % 3 == 2, at * 7 % 4 == 3
        assert bool(counted["tail"]["verb"][at]) == rare_verb
        assert bool(counted["tail"]["noun"][at]) == rare_noun
        assert bool(counted["tail"]["action"][at]) == (has and (rare_verb or rare_noun))


def test_missing_rates_are_what_masking_every_clip_gives_on_average(run, table, found):
    """Each subset is left with a known probability (sec. 3.4); many draws come near the sum over subsets."""
    evaluation, _ = judged(run, table, found, draws=300)
    labels = labels_of(run, table, found.rows)
    for row, rate in zip(evaluation.rates, RATES, strict=True):
        total, n = 0.0, 0
        for at, keeps in itertools.product(range(N), itertools.product((True, False), repeat=2)):
            if labels["verb"][at] < 0:
                continue
            chance = np.prod([1 - rate if keep else rate for keep in keeps])
            left = [m for m, keep, has in zip(M, keeps, found.present[at], strict=True) if keep and has]
            options = [left] if left else [[m] for m, has in zip(M, found.present[at], strict=True) if has]
            for option in options:
                logits = found.logits[tuple(option)]
                hit = all(logits[head][at].argmax() == labels[head][at] for head in CLASSES)
                total += chance * hit / len(options)
            n += 0.25
        assert row.rate == rate
        assert row.mean["action"] == pytest.approx(total / n, abs=0.02)
    assert evaluation.rates[0].std["action"] == pytest.approx(0)
    assert evaluation.rates[5].std["action"] > 0


def test_one_draw_has_no_deviation(run, table, found):
    assert judged(run, table, found, draws=1)[0].rates[5].std["action"] is None


def test_draws_are_the_same_every_time(run, table, found):
    assert judged(run, table, found)[0].rates == judged(run, table, found)[0].rates


def test_classes_and_confusion_count_every_labelled_clip_once(run, table, found):
    evaluation, matrices = judged(run, table, found)
    labels = labels_of(run, table, found.rows)
    for head, names in CLASSES.items():
        expected = np.zeros((len(names), len(names)), int)
        for at in range(N):
            if labels[head][at] >= 0:
                expected[labels[head][at], found.logits[M][head][at].argmax()] += 1
        assert np.array_equal(matrices[head], expected)
        for row in (row for row in evaluation.classes if row.head == head):
            own = expected[names.index(row.name)]
            assert row.n_clips == own.sum()
            assert row.accuracy["V+A"] == pytest.approx(own[names.index(row.name)] / own.sum())
        counts = [n for _, _, n in evaluation.confused[head]]
        assert counts == sorted(counts, reverse=True)
        for true, said, n in evaluation.confused[head]:
            assert true != said
            assert n == expected[names.index(true), names.index(said)]


def test_labels_that_the_run_does_not_know_are_refused(run, table, found):
    run.start({**run.config, "classes": {**CLASSES, "noun": ["ball", "box", "cup"]}})
    with pytest.raises(TableError, match="has the noun 'kite', which the run does not know"):
        judged(run, table, found)
    some = np.flatnonzero([text != "kite" for text in table.arrow.column("noun").to_pylist()])
    known = [row for row in found.rows if row in some]
    assert (labels_of(run, table, np.array(known[::-1]))["noun"] >= 0).all()  # others' labels do not matter


def test_split_without_labels_is_refused_and_the_challenge_named(run, table, found, monkeypatch):
    logits = {subset: {head: v[5:6] for head, v in heads.items()} for subset, heads in found.logits.items()}
    bare = Predictions(found.rows[5:6], found.present[5:6], logits)
    evaluation, _ = judged(run, table, bare)  # its noun is labelled
    assert evaluation.rows[0].accuracy["verb"] is None
    assert evaluation.rows[0].accuracy["noun"] is not None
    monkeypatch.setattr(type(table), "labels", lambda self, head, names=None: np.full(self.n_clips, -1))
    with pytest.raises(TableError, match=r"no clip of split 'test' is labelled in verb, noun\..*--challenge"):
        judged(run, table, bare)


def test_written_evaluation_is_read_back_equal_and_only_if_it_fits(run, table, found, tmp_path):
    evaluation, matrices = judged(run, table, found)
    evaluation.write(tmp_path / "test", matrices)
    again = Evaluation.read(tmp_path / "test.json", "digest")
    assert (again.rows, again.rates, again.classes) == (evaluation.rows, evaluation.rates, evaluation.classes)
    assert Evaluation.read(tmp_path / "test.json", "other") is None
    assert Evaluation.read(tmp_path / "none.json", "digest") is None
    names = {path.name for path in tmp_path.glob("test*")}
    kinds = ("", "-rates", "-classes", "-confusion-verb", "-confusion-noun")
    assert names == {"test.json", *(f"test{kind}.csv" for kind in kinds)}
    matrix = (tmp_path / "test-confusion-verb.csv").read_text().splitlines()
    assert matrix[0] == r"true \ predicted,lift,pull,push"
    assert matrix[1] == "lift," + ",".join(map(str, matrices["verb"][0]))


def test_predictions_are_kept_and_read_by_clip_id_if_they_fit(table, found, tmp_path):
    found.save(tmp_path / "p.safetensors", table.clip_ids[found.rows], "digest")
    shuffled = table.clip_ids[::-1]
    again = Predictions.load(tmp_path / "p.safetensors", shuffled, SUBSETS, "digest")
    assert shuffled[again.rows].tolist() == table.clip_ids[found.rows].tolist()
    assert np.array_equal(again.present, found.present)
    for subset in SUBSETS:
        assert all(torch.equal(again.logits[subset][head], found.logits[subset][head]) for head in CLASSES)
    assert Predictions.load(tmp_path / "p.safetensors", shuffled, SUBSETS, "other") is None
    (tmp_path / "p.safetensors").write_bytes(b"damaged")
    assert Predictions.load(tmp_path / "p.safetensors", shuffled, SUBSETS, "digest") is None


def test_views_are_averaged_as_probabilities_over_clips_that_all_views_have(found):
    rows = found.rows[::-1][3:]  # another order, and three clips fewer
    logits = {s: {h: wave(len(rows), v.shape[1], start=5) for h, v in p.items()} for s, p in found.logits.items()}
    both = averaged_over([found, Predictions(rows, found.present[::-1][3:], logits)])
    assert both.rows.tolist() == found.rows[: N - 3].tolist()
    assert both.present[2].tolist() == [True, False]
    for at in (0, 17):
        place = rows.tolist().index(found.rows[at])
        first, second = found.logits[("audio",)]["noun"][at], logits[("audio",)]["noun"][place]
        expected = (first.softmax(0) + second.softmax(0)) / 2
        assert torch.allclose(both.logits[("audio",)]["noun"][at].exp(), expected, atol=1e-6)
