import math

import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.fuse.losses import cross_entropy, info_nce


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def _logs(*rows):
    """Logits whose softmax are the rows."""
    return torch.tensor(rows).log()


def test_cross_entropy_of_two_heads_matches_hand():
    logits = {"verb": _logs([0.5, 0.5], [0.2, 0.8]), "noun": _logs([0.25, 0.25, 0.5], [0.1, 0.1, 0.8])}
    labels = {"verb": torch.tensor([0, 1]), "noun": torch.tensor([2, 0])}
    verb = -(math.log(0.5) + math.log(0.8)) / 2
    noun = -(math.log(0.5) + math.log(0.1)) / 2
    assert cross_entropy(logits, labels).item() == pytest.approx((verb + noun) / 2, rel=1e-6)


def test_cross_entropy_ignores_unlabelled_clips_and_heads():
    logits = {"verb": _logs([0.5, 0.5], [0.2, 0.8]), "noun": _logs([0.25, 0.25, 0.5], [0.1, 0.1, 0.8])}
    labels = {"verb": torch.tensor([-1, 1]), "noun": torch.tensor([-1, -1])}
    assert cross_entropy(logits, labels).item() == pytest.approx(-math.log(0.8), rel=1e-6)


def test_cross_entropy_without_any_label_is_zero_and_belongs_to_the_graph():
    scores = _wave(2, 3).requires_grad_()
    loss = cross_entropy({"verb": scores}, {"verb": torch.tensor([-1, -1])})
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


def test_cross_entropy_values_and_gradients_match_slow_loop():
    labels = {"verb": torch.tensor([0, -1, 3, 1]), "noun": torch.tensor([2, 2, -1, -1]), "tool": torch.full((4,), -1)}
    logits = {head: _wave(4, 5, start=at).requires_grad_() for at, head in enumerate(labels)}
    parts = []
    for head, scores in logits.items():
        clips = [-(scores[i, y] - scores[i].exp().sum().log()) for i, y in enumerate(labels[head].tolist()) if y >= 0]
        if clips:
            parts.append(sum(clips) / len(clips))
    slow, fast = sum(parts) / len(parts), cross_entropy(logits, labels)
    torch.testing.assert_close(fast, slow)
    used = [logits["verb"], logits["noun"]]
    torch.testing.assert_close(torch.autograd.grad(fast, used), torch.autograd.grad(slow, used))


def test_cross_entropy_of_half_precision_is_computed_in_float32():
    logits = {"verb": (20 * _wave(4, 5)).bfloat16()}
    labels = {"verb": torch.tensor([0, 1, 2, 3])}
    exact = cross_entropy({"verb": logits["verb"].float()}, labels)
    assert cross_entropy(logits, labels).equal(exact)


def test_cross_entropy_of_head_without_labels_raises():
    with pytest.raises(ValueError, match="no labels of head 'noun'; found verb"):
        cross_entropy({"noun": _wave(2, 3)}, {"verb": torch.tensor([0, 1])})


def test_info_nce_of_two_clips_matches_hand():
    video = torch.tensor([[2.0, 0.0], [0.0, 3.0]])  # lengths do not matter to a cosine
    audio = torch.tensor([[1.0, 0.0], [3.0, 4.0]])  # cosines: 1, 0.6 / 0, 0.8
    first = -math.log(math.exp(1 / 0.5) / (math.exp(1 / 0.5) + math.exp(0.6 / 0.5)))
    second = -math.log(math.exp(0.8 / 0.5) / (math.exp(0.0) + math.exp(0.8 / 0.5)))
    loss = info_nce({"video": video, "audio": audio}, 0.5)
    assert loss.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_info_nce_symmetric_is_the_mean_of_both_directions():
    video, audio = _wave(4, 3), _wave(4, 3, start=5)
    there = info_nce({"video": video, "audio": audio}, 0.1)
    back = info_nce({"video": audio, "audio": video}, 0.1)
    assert not there.isclose(back)
    torch.testing.assert_close(info_nce({"video": video, "audio": audio}, 0.1, symmetric=True), (there + back) / 2)


def test_info_nce_of_identical_clips_is_the_logarithm_of_their_number():
    same = torch.ones(5, 3)
    assert info_nce({"video": same, "flow": same}, 0.1).item() == pytest.approx(math.log(5), rel=1e-6)


def _slow(tokens, tau, present):
    names, total = list(tokens), 0.0
    for column, name in enumerate(names):
        if name == "video":
            continue
        clips = [i for i in range(len(present)) if present[i, names.index("video")] and present[i, column]]
        losses = []
        for i in clips:
            similar = []
            for j in clips:
                a, b = tokens["video"][i], tokens[name][j]
                similar.append((a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt()) / tau)
            losses.append(torch.stack(similar).exp().sum().log() - similar[clips.index(i)])
        if len(clips) > 1:
            total = total + sum(losses) / len(losses)
    return total / (len(names) - 1)


@pytest.mark.parametrize("missing", [False, True])
def test_info_nce_values_and_gradients_match_slow_loop(missing):
    tokens = {name: _wave(5, 4, start=at).requires_grad_() for at, name in enumerate(("flow", "video", "audio"))}
    present = torch.ones(5, 3, dtype=torch.bool)
    if missing:
        present[[0, 1, 2, 4], [1, 0, 2, 2]] = False
    fast, slow = info_nce(tokens, 0.1, present if missing else None), _slow(tokens, 0.1, present)
    torch.testing.assert_close(fast, slow)
    inputs = list(tokens.values())
    torch.testing.assert_close(
        torch.autograd.grad(fast, inputs), torch.autograd.grad(slow, inputs), rtol=1e-4, atol=1e-6
    )


def test_info_nce_of_clips_without_a_modality_leaves_them_out_even_as_nan():
    tokens = {"video": _wave(4, 3), "audio": _wave(4, 3, start=5)}
    fewer = info_nce({name: values[[0, 3]] for name, values in tokens.items()}, 0.1)
    tokens["video"][1] = tokens["audio"][2] = torch.nan
    inputs = {name: values.requires_grad_() for name, values in tokens.items()}
    loss = info_nce(inputs, 0.1, torch.tensor([[True, True], [False, True], [True, False], [True, True]]))
    torch.testing.assert_close(loss, fewer)
    loss.backward()
    for values in inputs.values():
        assert (values.grad[[1, 2]] == 0).all()
        assert values.grad[[0, 3]].abs().amax(1).min() > 0


def test_info_nce_divides_by_all_other_modalities_even_if_one_has_no_pairs():
    tokens = {"video": _wave(3, 4), "flow": _wave(3, 4, start=1), "audio": _wave(3, 4, start=2)}
    present = torch.tensor([[True, True, False]] * 3)
    alone = info_nce({name: tokens[name] for name in ("video", "flow")}, 0.1)
    torch.testing.assert_close(info_nce(tokens, 0.1, present), alone / 2)


@pytest.mark.parametrize(
    ("names", "present"),
    [
        (("video",), None),
        (("flow", "audio"), None),
        (("video", "audio"), [[True, True], [True, False], [False, True]]),
        (("video", "audio"), [[False, True], [True, False], [False, True]]),
    ],
)
def test_info_nce_without_two_pairs_is_zero_and_belongs_to_the_graph(names, present):
    tokens = {name: _wave(3, 4, start=at).requires_grad_() for at, name in enumerate(names)}
    loss = info_nce(tokens, 0.1, None if present is None else torch.tensor(present))
    loss.backward()
    assert loss.item() == 0
    assert all(values.grad is None or (values.grad == 0).all() for values in tokens.values())


@pytest.mark.parametrize("tau", [0.0, -0.1, math.nan])
def test_info_nce_of_tau_not_above_zero_raises(tau):
    with pytest.raises(ConfigError, match=f"tau is {tau}, expected a number above 0"):
        info_nce({"video": _wave(2, 2), "flow": _wave(2, 2)}, tau)


def test_info_nce_of_present_that_does_not_fit_raises():
    with pytest.raises(ValueError, match=r"present is \(2, 3\), expected bool \[2, 2\]"):
        info_nce({"video": _wave(2, 2), "flow": _wave(2, 2)}, 0.1, torch.ones(2, 3, dtype=torch.bool))
