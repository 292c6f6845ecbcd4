import cv2
import numpy as np
import pytest
from karmma.data.config import DataConfig
from karmma.data.errors import MediaError
from karmma.data.flow import FlowPairs, flow_picture, pair_ends
from karmma.data.media import Frame, Media
from karmma.data.video import Shown, frames_at
from karmma.data.views import View

WHOLE = View(0, (0.5,), 1.0, (0.5, 0.5), False)
MIRRORED = View(1, (0.5,), 1.0, (0.5, 0.5), True)


def texture(side=96):
    noise = np.random.default_rng(0).integers(0, 255, (side, 2 * side), np.uint8)
    return cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)


def drifting(n, dx, dy=0, side=64):
    """Pictures of a texture that moves dx to the right and dy down from frame to frame."""
    ground = texture()
    out = []
    for k in range(n):
        left, top = 96 - dx * k, 16 - dy * k
        out.append(np.repeat(ground[top : top + side, left : left + side, None], 3, 2))
    return out


def fields(path, times, stop_s, step_s, short_side=256):
    with Media(path) as media:
        pairs = collected(media, times, stop_s, step_s, short_side)
        return pairs.ends, list(pairs.fields())


def collected(media, times, stop_s, step_s, short_side=256):
    ends, forward = pair_ends(np.array(times), stop_s, step_s)
    data = DataConfig(flow_step_s=step_s, flow_size=short_side)
    pairs, n = FlowPairs(media, len(times), data), len(times)
    for shown in frames_at(media, times, ends):
        sides = [[], []]
        for place in shown.places:
            i = place % n
            sides[int((place < n) != forward[i])].append(i)
        pairs.take(shown, *sides)
    return pairs


def test_pair_ends_point_forward_and_at_the_end_of_the_clip_backward():
    ends, forward = pair_ends(np.array([0.0, 0.9, 0.95, 0.99]), 1.0, 0.05)
    assert ends == pytest.approx([0.05, 0.95, 0.9, 0.94])
    assert forward.tolist() == [True, True, False, False]


def test_flow_pairs_are_the_frames_on_display_at_both_ends(film):
    path = film("a.mp4", [k / 25 for k in range(50)])
    ends, _ = fields(path, [0.0, 0.05, 0.51, 1.99], 2.0, 0.1)
    assert ends == pytest.approx(np.array([[0, 0.08], [0.04, 0.12], [0.48, 0.60], [1.88, 1.96]]))


def test_flow_pairs_on_one_frame_take_its_neighbour(film):
    path = film("a.mp4", [k / 10 for k in range(10)])
    ends, _ = fields(path, [0.02, 0.31, 0.97], 1.0, 0.05)
    assert ends == pytest.approx(np.array([[0.0, 0.1], [0.3, 0.4], [0.8, 0.9]]))


def test_flow_of_a_drift_is_its_speed_to_the_right_and_down(film):
    path = film("a.mp4", [k / 25 for k in range(8)], drifting(8, 2, 1))
    for step_s, factor in [(0.04, 1), (0.08, 2), (0.05, 1.25), (0.02, 0.5)]:
        _, (field, *_) = fields(path, [0.1], 0.32, step_s)
        assert np.median(field[8:-8, 8:-8], axis=(0, 1)) == pytest.approx([2 * factor, factor], abs=0.08 * factor)


def test_flow_at_the_end_of_the_clip_has_the_same_sign(film):
    path = film("a.mp4", [k / 25 for k in range(8)], drifting(8, 2))
    _, found = fields(path, [0.1, 0.31], 0.32, 0.04)
    for field in found:
        assert np.median(field[..., 0]) == pytest.approx(2, abs=0.1)


def test_flow_is_computed_at_the_working_resolution_and_never_grown(film):
    path = film("a.mp4", [k / 25 for k in range(4)], drifting(4, 4))
    assert fields(path, [0.05], 0.16, 0.04, 256)[1][0].shape == (64, 64, 2)
    field = fields(path, [0.05], 0.16, 0.04, 32)[1][0]
    assert field.shape == (32, 32, 2)
    assert np.median(field[4:-4, 4:-4, 0]) == pytest.approx(2, abs=0.15)


def test_flow_of_a_still_is_exactly_zero(film):
    path = film("a.mp4", [k / 25 for k in range(4)], drifting(4, 0))
    field = np.zeros((64, 64, 2), np.float32)
    assert flow_picture(field, WHOLE, 16, 20.0).reshape(3, -1).T.tolist() == [[128, 128, 0]] * 256
    assert np.abs(fields(path, [0.05], 0.16, 0.04)[1][0]).mean() < 0.02


def test_flow_does_not_depend_on_the_number_of_threads(film):
    path = film("a.mp4", [k / 25 for k in range(4)], drifting(4, 3))
    cv2.setNumThreads(2)
    one = fields(path, [0.05], 0.16, 0.04)[1][0]
    assert (one == fields(path, [0.05], 0.16, 0.04)[1][0]).all()
    assert cv2.getNumThreads() == 1


@pytest.mark.parametrize(
    ("u", "v", "levels"),
    [
        (0, 0, [128, 128, 0]),
        (10, 0, [192, 128, 64]),  # 128 + 63.5 and 63.5 round to even
        (-10, 0, [64, 128, 64]),
        (0, 20, [128, 255, 127]),
        (0, -20, [128, 1, 127]),
        (500, -500, [255, 1, 180]),
        (3, 4, [147, 153, 32]),
    ],
)
def test_flow_picture_encodes_by_hand(u, v, levels):
    field = np.full((8, 8, 2), (u, v), np.float32)
    assert flow_picture(field, WHOLE, 8, 20.0)[:, 3, 3].tolist() == levels


def test_flow_picture_mirrored_turns_u_into_256_minus_u():
    field = (np.random.default_rng(1).standard_normal((20, 20, 2)) * 12).astype(np.float32)
    plain, mirrored = (flow_picture(field, view, 20, 20.0).astype(int) for view in (WHOLE, MIRRORED))
    assert (mirrored[0] == 256 - plain[0][:, ::-1]).all()
    assert (mirrored[1:] == plain[1:, :, ::-1]).all()


def test_flow_picture_keeps_its_values_when_the_crop_is_resized():
    field = np.full((64, 64, 2), (5, -2.5), np.float32)
    half = View(1, (0.5,), 0.5, (0.2, 0.9), False)
    for size in (16, 32, 64):
        assert flow_picture(field, half, size, 20.0)[:2].reshape(2, -1).T.tolist() == [[160, 112]] * size**2


def test_flow_picture_magnitude_tells_of_motions_that_cancel():
    field = np.zeros((16, 16, 2), np.float32)
    field[:, ::2, 0], field[:, 1::2, 0] = 10, -10
    u, v, magnitude = flow_picture(field, WHOLE, 8, 20.0)
    assert (u == 128).all()
    assert (v == 128).all()
    assert (magnitude == 64).all()


def test_flow_of_a_single_frame_fails(film):
    with Media(film("a.mp4", [0.0])) as media:
        pairs = FlowPairs(media, 1, DataConfig(flow_size=64))
        (shown,) = frames_at(media, [0.0], [0.05])
        pairs.take(shown, [0], [0])
        with pytest.raises(MediaError, match=r"a\.mp4: one frame only, at 0\.000 s"):
            list(pairs.fields())


def test_flow_of_a_picture_that_changes_size_fails(film):
    with Media(film("a.mp4", [0.0])) as small, Media(film("b.mp4", [0.0], [np.zeros((96, 64, 3), np.uint8)])) as large:
        pairs = FlowPairs(small, 1, DataConfig(flow_size=64))
        one, two = (next(iter(media.frames(0.0))).picture for media in (small, large))
        pairs.take(Shown([0], Frame(0.0, 0.04, lambda: one), None, None), [0], [])
        pairs.take(Shown([1], Frame(0.04, 0.04, lambda: two), None, None), [], [0])
        with pytest.raises(MediaError, match=r"the picture changes size before 0\.040 s"):
            list(pairs.fields())
