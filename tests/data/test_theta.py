import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.data.theta import theta_average


def _ramp(n_clips, n_tokens, width):
    """Token i of clip b holds i + 1000 b in every place."""
    at = torch.arange(n_tokens, dtype=torch.float32)[:, None] + 1000 * torch.arange(n_clips)[:, None, None]
    return at.expand(n_clips, n_tokens, width).clone()


def _slow(tokens, theta, sizes):
    groups, start = [], 0
    for size in sizes:
        total = torch.zeros_like(tokens[:, 0])
        for at in range(start, start + size):
            total = total + tokens[:, at]
        groups.append(total / size)
        start += size
    assert len(groups) == theta
    assert start == tokens.shape[1]
    return torch.stack(groups, dim=1)


def test_theta_average_on_seven_tokens_matches_hand():
    tokens = torch.tensor([[[1.0], [3.0], [5.0], [7.0], [10.0], [20.0], [60.0]]])
    assert theta_average(tokens, 3).flatten().tolist() == [2.0, 6.0, 30.0]
    assert theta_average(tokens, 3, balanced=True).flatten().tolist() == [3.0, 8.5, 40.0]
    assert theta_average(tokens, 1).flatten().tolist() == pytest.approx([106 / 7])


def test_theta_average_puts_remainder_in_last_group():
    averaged = theta_average(_ramp(2, 785, 1), 300)[:, :, 0]
    assert averaged.shape == (2, 300)
    assert averaged[0, :2].tolist() == [0.5, 2.5]
    assert averaged[0, 298] == (596 + 597) / 2
    assert averaged[0, 299] == sum(range(598, 785)) / 187  # the last 187 tokens in one group
    assert averaged[1].equal(averaged[0] + 1000)


def test_theta_average_balanced_groups_differ_by_one_token_at_most():
    averaged = theta_average(_ramp(1, 785, 1), 300, balanced=True)[0, :, 0]
    assert averaged[184] == (552 + 553 + 554) / 3  # 185 groups of 3 ...
    assert averaged[185] == (555 + 556) / 2  # ... then 115 of 2
    assert averaged[299] == (783 + 784) / 2


@pytest.mark.parametrize("n_tokens", [4, 5, 7, 8, 11])
@pytest.mark.parametrize("balanced", [False, True])
def test_theta_average_values_and_gradients_match_slow_loop(n_tokens, balanced):
    theta, (size, left) = 4, divmod(n_tokens, 4)
    sizes = [size + (at < left) for at in range(theta)] if balanced else [size] * (theta - 1) + [size + left]
    tokens = torch.sin(torch.arange(2.0 * n_tokens * 3)).reshape(2, n_tokens, 3).requires_grad_()
    weight = torch.cos(torch.arange(2.0 * theta * 3)).reshape(2, theta, 3)
    fast, slow = theta_average(tokens, theta, balanced), _slow(tokens, theta, sizes)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(
        torch.autograd.grad((fast * weight).sum(), tokens), torch.autograd.grad((slow * weight).sum(), tokens)
    )


@pytest.mark.parametrize("n_tokens", [1, 299, 300])
def test_theta_average_of_no_more_than_theta_tokens_returns_them_unchanged(n_tokens):
    tokens = _ramp(1, n_tokens, 2)
    assert theta_average(tokens, 300) is tokens


def test_theta_average_twice_differs_from_once():
    """Averaging cached tokens again is not the same thing, so Theta belongs to the identity of a cache."""
    tokens = _ramp(1, 784, 1)
    assert not theta_average(theta_average(tokens, 300), 100).equal(theta_average(tokens, 100))


def test_theta_average_in_float16_keeps_dtype_and_does_not_overflow():
    tokens = torch.full((1, 785, 2), 60000.0, dtype=torch.float16)
    averaged = theta_average(tokens, 300)
    assert averaged.dtype == torch.float16
    assert averaged.equal(tokens[:, :300])


@pytest.mark.parametrize("theta", [0, -3])
def test_theta_average_below_one_raises(theta):
    with pytest.raises(ConfigError, match=f"theta is {theta}, expected at least 1"):
        theta_average(_ramp(1, 4, 1), theta)


def test_theta_average_of_wrong_rank_raises():
    with pytest.raises(ValueError, match=r"shape \(4, 2\), expected \[B, K, D\]"):
        theta_average(torch.zeros(4, 2), 3)
