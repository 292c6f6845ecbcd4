import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.distill.dropout import modality_dropout


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _shares(present, p, n=60_000):
    """Return subset of modalities -> how often it is kept, over n equal clips."""
    kept = modality_dropout(torch.tensor([present] * n), p, _generator())
    rows, counts = kept.unique(dim=0, return_counts=True)
    return {tuple(row): count / n for row, count in zip(rows.int().tolist(), counts.tolist(), strict=True)}


def test_dropout_of_half_keeps_each_single_modality_a_sixth_and_each_larger_set_an_eighth():
    found = _shares([True, True, True], 0.5)
    singles = [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    larger = [(1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    assert set(found) == {*singles, *larger}
    for subset in singles:
        assert found[subset] == pytest.approx(1 / 6, abs=0.007)  # 4.5 standard deviations
    for subset in larger:
        assert found[subset] == pytest.approx(1 / 8, abs=0.007)


def test_dropout_of_two_present_modalities_follows_the_same_law_and_brings_none_back():
    found = _shares([True, False, True], 0.3)
    both, one = 0.7 * 0.7, 0.7 * 0.3 + 0.3 * 0.3 / 2
    assert set(found) == {(1, 0, 1), (1, 0, 0), (0, 0, 1)}
    assert found[1, 0, 1] == pytest.approx(both, abs=0.01)
    assert found[1, 0, 0] == pytest.approx(one, abs=0.01)


def test_dropout_of_everything_keeps_exactly_one_chosen_evenly():
    found = _shares([True, True, False, True], 1.0)
    assert set(found) == {(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 0, 1)}
    for share in found.values():
        assert share == pytest.approx(1 / 3, abs=0.009)


def test_dropout_matches_loop_over_clips_on_the_same_draws():
    present = torch.tensor([[True, True, True], [True, False, True], [False, False, True]] * 50)
    drop, order = torch.rand(2, 150, 3, generator=_generator(7))
    expected = []
    for clip in range(150):
        there = [m for m in range(3) if present[clip, m]]
        kept = [m for m in there if drop[clip, m] >= 0.6]
        if not kept:
            kept = [max(there, key=lambda m, clip=clip: order[clip, m])]
        expected.append([m in kept for m in range(3)])
    assert modality_dropout(present, 0.6, _generator(7)).tolist() == expected


def test_dropout_of_probability_zero_changes_nothing_and_returns_a_new_tensor():
    present = torch.tensor([[True, False, True], [False, True, False]])
    kept = modality_dropout(present, 0.0, _generator())
    assert kept.equal(present)
    assert kept.dtype == torch.bool
    kept[0, 0] = False
    assert present[0, 0]


def test_dropout_of_one_clip_does_not_depend_on_what_others_have():
    present = torch.ones(200, 3, dtype=torch.bool)
    fewer = present.clone()
    fewer[::2, :2] = False
    one, other = (modality_dropout(each, 0.5, _generator(3)) for each in (present, fewer))
    assert one[1::2].equal(other[1::2])


def test_dropout_leaves_the_generator_in_the_same_state_whatever_is_present():
    generators = _generator(1), _generator(1)
    modality_dropout(torch.ones(4, 3, dtype=torch.bool), 0.9, generators[0])
    modality_dropout(torch.tensor([[True, False, False]] * 4), 0.1, generators[1])
    assert generators[0].get_state().equal(generators[1].get_state())


def test_dropout_ignores_the_global_generator():
    present = torch.ones(20, 3, dtype=torch.bool)
    torch.manual_seed(0)
    first = modality_dropout(present, 0.5, _generator())
    torch.manual_seed(1)
    assert modality_dropout(present, 0.5, _generator()).equal(first)
    assert not modality_dropout(present, 0.5, _generator(1)).equal(first)


def test_dropout_of_clip_without_modalities_raises_with_its_row():
    present = torch.tensor([[True, True], [False, False], [True, False], [False, False]])
    with pytest.raises(ValueError, match=r"rows \[1, 3\] have no modality"):
        modality_dropout(present, 0.5, _generator())


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_dropout_of_impossible_probability_raises(p):
    with pytest.raises(ConfigError, match=f"p is {p}, expected 0 to 1"):
        modality_dropout(torch.ones(1, 2, dtype=torch.bool), p, _generator())
