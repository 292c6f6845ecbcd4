from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
from karmma.data.errors import MediaError
from karmma.data.media import Media
from karmma.data.video import Converter, frames_at, video_picture
from karmma.data.views import View

UNEVEN = [0.0, 0.04, 0.05, 0.2, 0.21, 0.5, 0.9, 0.95, 1.0, 1.6, 1.61, 1.7, 2.0, 2.02, 2.5, 3.0, 3.1, 3.3, 3.31, 3.5]


def steady(fps, n):
    return [float(Fraction(k) / Fraction(fps)) for k in range(n)]


def numbers(path, times, number_in, peeks=()):
    out = {}
    with Media(path) as media:
        for shown in frames_at(media, times, peeks):
            out |= dict.fromkeys(shown.places, number_in(Converter().rgb(shown.frame)))
    return [out[place] for place in range(len(times) + len(peeks))]


def on_display(starts, time):
    return max((k for k, start in enumerate(starts) if start <= time + 1e-9), default=0)


@pytest.mark.parametrize(
    ("name", "starts"),
    [
        ("a.mp4", steady(24, 60)),
        ("a.mkv", steady("30000/1001", 60)),
        ("a.ts", steady(50, 60)),
        ("a.mp4", steady("60000/1001", 60)),
        ("a.mp4", UNEVEN),
    ],
)
def test_frames_at_any_rate_and_container_show_the_frame_on_display(film, number_in, name, starts):
    path = film(name, starts)
    # Middles of frames, off every boundary by more than the rounding of any container; out of order on purpose.
    times = [*[(a + b) / 2 for a, b in pairwise(starts)][::-3], starts[-1]]
    assert numbers(path, times, number_in) == [on_display(starts, time) for time in times]


def test_frames_at_the_very_start_of_a_frame_show_that_frame(film, number_in):
    starts = steady("30000/1001", 40)
    path = film("a.mp4", starts)
    rounded = [round(start, 3) for start in starts]  # as a table in milliseconds has them
    assert numbers(path, rounded, number_in) == list(range(40))


def test_frames_at_one_late_time_decode_from_its_key_frame_only(film, number_in):
    starts = steady(25, 100)
    path = film("a.mp4", starts)
    with Media(path) as media:
        decoded = [time for time, _ in media.decode(media.pictures, 3.3)]
    assert decoded[0] == pytest.approx(2.88)  # frame 72 = 6 x 12
    assert numbers(path, [3.3], number_in) == [82]
    assert numbers(path, [0.1], number_in) == [2]


def test_frames_at_every_single_time_equal_one_pass(film, number_in):
    path = film("a.mkv", UNEVEN)
    times = np.linspace(0.01, 3.49, 23).tolist()
    assert [numbers(path, [time], number_in)[0] for time in times] == numbers(path, times, number_in)


def test_frames_at_a_stream_that_starts_late_count_from_its_first_frame(film, number_in):
    starts = steady(25, 30)
    path = film("a.mkv", [start + 0.4 for start in starts])
    assert numbers(path, [0.0, 0.3, 1.0], number_in) == [0, 7, 25]


def test_frames_at_the_end_allow_one_frame_and_no_more(film, number_in):
    path = film("a.mp4", steady(25, 50))  # ends at 2.00 s
    assert numbers(path, [1.99, 2.0, 2.039], number_in) == [49, 49, 49]
    with pytest.raises(MediaError, match=r"a\.mp4: frame at 2\.050 s wanted, the video ends at 2\.000 s"):
        numbers(path, [1.0, 2.05], number_in)


def test_frames_at_peeks_beyond_the_end_show_the_last_frame(film, number_in):
    path = film("a.mp4", steady(25, 50))
    assert numbers(path, [1.0], number_in, peeks=[9.0, 0.5]) == [25, 49, 12]


def test_frames_at_names_the_neighbours_of_a_frame(film):
    path = film("a.mp4", steady(25, 30))
    with Media(path) as media:
        first, inner, last = frames_at(media, [0.0, 0.5, 1.17])
    assert first.before is None
    assert (first.time, first.after.time) == pytest.approx((0, 0.04))
    assert (inner.before.time, inner.time, inner.after.time) == pytest.approx((0.44, 0.48, 0.52))
    assert last.after is None
    assert last.before.time == pytest.approx(1.12)


def test_frames_at_a_file_cut_short_fail_with_where_it_breaks_off(film, tmp_path):
    noise = [np.random.default_rng(k).integers(0, 255, (64, 64, 3), np.uint8) for k in range(50)]
    whole = film("a.mkv", steady(25, 50), noise).read_bytes()
    short = tmp_path / "short.mkv"
    short.write_bytes(whole[: len(whole) // 2])
    with Media(short) as media, pytest.raises(MediaError, match=r"short\.mkv: (frame at 1\.900 s wanted|the frame at)"):
        list(frames_at(media, [0.1, 1.9]))


def test_media_that_is_no_media_or_not_there_says_so(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no video at all" * 50)
    with Media(tmp_path / "a.mp4") as media, pytest.raises(MediaError, match=r"a\.mp4: not a media file: Invalid data"):
        _ = media.pictures
    with Media(tmp_path / "b.mp4") as media, pytest.raises(MediaError, match=r"b\.mp4: no such file"):
        _ = media.pictures


def test_duration_is_counted_over_the_packets(film):
    for name in ("a.mp4", "a.mkv"):
        with Media(film(name, steady(25, 50))) as media:
            assert media.duration_s == pytest.approx(2.0, abs=2e-3)


# A display matrix sends x, y to a x + c y, b x + d y; what the viewer shall see, by hand, of [[1, 2], [3, 4]].
@pytest.mark.parametrize(
    ("a", "b", "c", "d", "seen"),
    [
        (1, 0, 0, 1, [[1, 2], [3, 4]]),
        (0, 1, -1, 0, [[3, 1], [4, 2]]),
        (-1, 0, 0, -1, [[4, 3], [2, 1]]),
        (0, -1, 1, 0, [[2, 4], [1, 3]]),
        (-1, 0, 0, 1, [[2, 1], [4, 3]]),
        (0, 1, 1, 0, [[1, 3], [2, 4]]),
    ],
)
def test_to_rgb_turns_and_mirrors_as_the_file_says(film, a, b, c, d, seen):
    levels = np.array([[0, 60, 120], [0, 180, 240]])[:, 1:]  # what 1, 2, 3, 4 stand for
    picture = np.repeat(np.repeat(levels, 32, 0), 48, 1)[..., None].repeat(3, 2).astype(np.uint8)  # [64, 96, 3]
    one = 65536
    matrix = [a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30]
    path = film("a.mp4", [0.0, 0.04], [picture] * 2, matrix=matrix)
    with Media(path) as media:
        frame = next(frames_at(media, [0.0])).frame
        rgb, grey = Converter().rgb(frame), Converter().grey(frame, 64)
    assert rgb.shape == ((64, 96, 3) if b == 0 else (96, 64, 3))
    height, width = rgb.shape[:2]
    quarters = rgb[height // 4 :: height // 2, width // 4 :: width // 2, 0]
    assert np.abs(quarters - levels.ravel()[np.array(seen) - 1]).max() <= 3
    assert np.abs(grey[height // 4 :: height // 2, width // 4 :: width // 2].astype(int) - quarters).max() <= 3


@pytest.mark.parametrize("color_range", [1, 2])  # MPEG 16..235, JPEG 0..255
def test_to_rgb_gives_full_range_whatever_the_file_uses(film, color_range):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, 32:] = 255
    with Media(film("a.mp4", [0.0, 0.04], [picture] * 2, color_range=color_range)) as media:
        frame = next(frames_at(media, [0.0])).frame
        assert (frame.picture.color_range == 2) == (color_range == 2)  # limited may go without saying
        rgb = Converter().rgb(frame)
    assert rgb[:, :24].max() <= 2
    assert rgb[:, 40:].min() >= 253


def test_to_grey_shrinks_to_the_short_side_and_never_grows(film):
    wide = np.zeros((64, 128, 3), np.uint8)
    with Media(film("a.mp4", [0.0], [wide])) as media:
        frame = next(frames_at(media, [0.0])).frame
        assert Converter().grey(frame, 32).shape == (32, 64)
        assert Converter().grey(frame, 256).shape == (64, 128)


def test_video_picture_crops_and_mirrors():
    picture = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    view = View(1, (0.5,), 0.5, (1.0, 0.0), True)  # side 2, top right
    out = video_picture(picture, view, 2)
    assert out.shape == (3, 2, 2)
    assert out[0].tolist() == [[5 * 3, 4 * 3], [11 * 3, 10 * 3]]


def test_odd_files_show_first_and_last_frame_where_expected(shared_data):
    odd = shared_data / "odd"
    for name, first, last in [
        ("torchcodec/h264_10bits.mp4", 0.0, 0.966667),
        ("file_type/fixture-null.webm", 0.007, 4.218),
        ("androidx/mp4/iibbibb_editlist_videoonly.mp4", 0.0, 11.0),
        ("androidx/mkv/sample_last_cluster.mkv", 0.067, 1.034),
        ("mmaction2/tests/data/test.avi", 0.04, 6.56),
    ]:
        with Media(odd / name) as media:
            shown = list(frames_at(media, [0.0, last - first]))
        assert [shown[0].time, shown[-1].time] == pytest.approx([0, last - first], abs=1e-3), name


def test_color_of_a_view_is_brightness_then_contrast_then_saturation():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    view = View(1, (0.5,), 1.0, (0.5, 0.5), False, None, (1.2, 0.7, 0.4))
    values = (picture * 1.2 - 128) * 0.7 + 128
    grey = (values @ [0.299, 0.587, 0.114])[..., None]
    slow = np.clip(np.rint(grey + 0.4 * (values - grey)), 0, 255)
    assert np.abs(video_picture(picture, view, 16).transpose(1, 2, 0) - slow).max() <= 1
    assert np.mean(video_picture(picture, view, 16).transpose(1, 2, 0) == slow) > 0.999


def test_color_of_the_clean_view_changes_no_byte():
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    assert (video_picture(picture, View(0, (0.5,), 1.0, (0.5, 0.5), False), 16) == picture.transpose(2, 0, 1)).all()


def test_crop_box_is_cut_before_the_view(film):
    picture = np.arange(64 * 96 * 3, dtype=np.uint32).reshape(64, 96, 3).astype(np.uint8)
    view = View(0, (0.5,), 1.0, (0.5, 0.5), False, (30, 20, 50, 40))
    assert (video_picture(picture, view, 20).transpose(1, 2, 0) == picture[20:40, 30:50]).all()
    with Media(film("a.mp4", [0.0])) as media:
        frame = next(frames_at(media, [0.0])).frame
        assert Converter().grey(frame, 16, (0, 0, 32, 40)).shape == (20, 16)
        with pytest.raises(MediaError, match=r"crop_box \(0, 0, 65, 40\) does not fit into a picture of 64 x 64"):
            Converter().grey(frame, 16, (0, 0, 65, 40))


@pytest.mark.parametrize("form", ["bgra", "bgr0", "gray", "yuv420p10le", "yuva420p", "yuv444p"])
def test_frames_of_any_form_and_odd_size_come_out_in_their_colors(tmp_path, form):
    """65 x 49 pixels, a smooth ramp, in a codec without loss; alpha is left out."""
    ramp = np.add.outer(np.arange(49) * 2, np.arange(65)).astype(np.uint8)
    picture = np.dstack([ramp, 255 - ramp, np.full_like(ramp, 90)])
    picture = np.repeat(ramp[..., None], 3, 2) if form == "gray" else picture
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 65, 49, form
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with Media(tmp_path / "a.mkv") as media:
        rgb = Converter().rgb(next(frames_at(media, [0.05])).frame)
    assert rgb.shape == (49, 65, 3)
    assert np.abs(rgb.astype(int) - picture).mean() < 2.5
