import math

import pytest
import torch
from karmma.fuse.metrics import (
    accuracy,
    calibration_error,
    confidence,
    majority,
    predictions,
    topk_hits,
    wilson_bounds,
)


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def _sure(*classes, n_classes=3):
    """Logits whose largest is at the given classes."""
    return torch.nn.functional.one_hot(torch.tensor(classes), n_classes).float()


LOGITS = {"verb": _sure(0, 1, 2, 0), "noun": _sure(0, 1, 1, 2)}


def test_predictions_are_the_largest_logits():
    found = predictions(LOGITS)
    assert found["noun"].tolist() == [0, 1, 1, 2]
    assert found["noun"].dtype == torch.int64


def test_accuracy_of_action_needs_every_head_right():
    labels = {"verb": torch.tensor([0, 1, 2, 1]), "noun": torch.tensor([0, 2, 1, 2])}
    assert accuracy(LOGITS, labels) == {"action": 0.5, "verb": 0.75, "noun": 0.75}


def test_accuracy_counts_labelled_clips_and_actions_labelled_in_all_heads():
    labels = {"verb": torch.tensor([0, -1, 0, 0]), "noun": torch.tensor([0, 1, -1, 0])}
    assert accuracy(LOGITS, labels) == {"action": 1 / 2, "verb": 2 / 3, "noun": 2 / 3}


def test_accuracy_without_labels_is_not_a_number():
    found = accuracy(LOGITS, {"verb": torch.tensor([0, 1, 2, 0]), "noun": torch.full((4,), -1)})
    assert found["verb"] == 1
    assert math.isnan(found["noun"])
    assert math.isnan(found["action"])


def test_accuracy_of_a_head_called_action_keeps_its_own():
    labels = {"verb": torch.tensor([1, 1, 1, 1]), "action": torch.tensor([0, 1, 1, 2])}
    found = accuracy({"verb": LOGITS["verb"], "action": LOGITS["noun"]}, labels)
    assert found == {"action": 1.0, "verb": 0.25}


def test_accuracy_of_k_guesses_counts_the_k_largest():
    logits = {"verb": torch.tensor([[3.0, 2, 1], [3, 2, 1], [3, 2, 1], [3, 2, 1]])}
    labels = {"verb": torch.tensor([0, 1, 2, -1])}
    assert accuracy(logits, labels, k=1) == {"verb": 1 / 3, "action": 1 / 3}
    assert accuracy(logits, labels, k=2) == {"verb": 2 / 3, "action": 2 / 3}
    assert accuracy(logits, labels, k=9) == {"verb": 1.0, "action": 1.0}


def test_topk_action_of_one_clip_matches_hand():
    """Products: .6 x .5 = .30, .6 x .3 = .18, .3 x .5 = .15, .6 x .2 = .12, .3 x .3 = .09, ..."""
    logits = {"verb": torch.tensor([[0.6, 0.3, 0.1]]).log(), "noun": torch.tensor([[0.5, 0.3, 0.2]]).log()}
    for rank, pair in enumerate([(0, 0), (0, 1), (1, 0), (0, 2), (1, 1)]):
        labels = {"verb": torch.tensor([pair[0]]), "noun": torch.tensor([pair[1]])}
        assert topk_hits(logits, labels, k=rank + 1)["action"].tolist() == [True]
        if rank:
            assert topk_hits(logits, labels, k=rank)["action"].tolist() == [False]


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_topk_action_matches_the_whole_outer_product(k):
    logits = {"verb": 3 * _wave(40, 4), "noun": 3 * _wave(40, 6, start=17), "hand": 3 * _wave(40, 2, start=5)}
    labels = {"verb": torch.arange(40) % 4, "noun": (torch.arange(40) // 4) % 6, "hand": torch.arange(40) % 2}
    labels["noun"][7] = -1
    hits = []
    for clip in range(40):
        verb, noun, hand = (logits[head][clip].softmax(0) for head in ("verb", "noun", "hand"))
        best = (verb[:, None, None] * noun[:, None] * hand).flatten().topk(k).indices.tolist()
        if labels["noun"][clip] >= 0:
            hits.append(int(labels["verb"][clip] * 12 + labels["noun"][clip] * 2 + labels["hand"][clip]) in best)
    assert 0 < sum(hits) < len(hits)
    assert accuracy(logits, labels, k)["action"] == sum(hits) / len(hits)


def test_calibration_error_of_three_bins_matches_hand():
    """Of 0..1/3, 1/3..2/3, 2/3..1: two clips at 0.3, none right; one at 0.5, right; three at 0.9, two right."""
    sure = torch.tensor([0.3, 0.5, 0.9, 0.3, 0.9, 0.9])
    hit = torch.tensor([False, True, True, False, False, True])
    expected = (2 * 0.3 + 1 * 0.5 + 3 * (0.9 - 2 / 3)) / 6
    assert calibration_error(sure, hit, n_bins=3) == pytest.approx(expected)
    assert calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert calibration_error(torch.zeros(2), torch.zeros(2, dtype=torch.bool)) == 0
    assert math.isnan(calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)))


def test_confidence_is_the_largest_probability_and_of_an_action_the_product():
    logits = {"verb": torch.tensor([[0.6, 0.3, 0.1]]).log(), "noun": torch.tensor([[0.5, 0.3, 0.2]]).log()}
    found = confidence(logits)
    assert [round(found[name].item(), 6) for name in ("verb", "noun", "action")] == [0.6, 0.5, 0.3]


def test_majority_is_the_share_of_the_commonest_class_and_combination():
    labels = {"verb": torch.tensor([0, 0, 0, 1, 1, -1]), "noun": torch.tensor([2, 2, 1, 1, -1, 1])}
    assert majority(labels) == {"action": 2 / 4, "verb": 3 / 5, "noun": 3 / 5}


def test_majority_is_what_the_best_constant_guess_reaches():
    labels = {"verb": torch.arange(30) ** 2 % 3, "noun": torch.arange(30) ** 2 % 5}
    best = {"action": 0.0, "verb": 0.0, "noun": 0.0}
    for verb in range(3):
        for noun in range(5):
            found = accuracy({"verb": _sure(*[verb] * 30), "noun": _sure(*[noun] * 30, n_classes=5)}, labels)
            best = {name: max(best[name], found[name]) for name in best}
    assert majority(labels) == best


def test_majority_without_labels_is_not_a_number():
    assert math.isnan(majority({"verb": torch.full((3,), -1)})["verb"])


def test_wilson_bounds_match_published_values():
    low, high = wilson_bounds(15, 20)  # the interval of 75 percent of 20: 53.1 to 88.8 percent
    assert (round(low, 4), round(high, 4)) == (0.5313, 0.8881)
    low, high = wilson_bounds(0, 10)
    assert (low, round(high, 4)) == (0.0, 0.2775)


@pytest.mark.parametrize(("correct", "n"), [(1, 4), (30, 48), (96, 96), (0, 7)])
def test_wilson_bounds_solve_their_equation(correct, n):
    """A bound b is where the share lies z deviations of b's own binomial from b."""
    for bound in wilson_bounds(correct, n):
        assert abs(correct / n - bound) == pytest.approx(1.96 * math.sqrt(bound * (1 - bound) / n), abs=1e-7)


def test_wilson_bounds_of_no_clips_say_nothing():
    assert wilson_bounds(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(("correct", "n"), [(5, 4), (-1, 4)])
def test_wilson_bounds_of_impossible_counts_raise(correct, n):
    with pytest.raises(ValueError, match=f"{correct} correct of {n} clips"):
        wilson_bounds(correct, n)


def test_wilson_bounds_are_never_on_the_wrong_side_of_the_share():
    for n in range(1, 1000):
        for correct in (0, n):
            low, high = wilson_bounds(correct, n)
            assert low <= correct / n <= high
