"""Clips a second from one long video: one pass for neighbouring clips against a seek for every clip.

    python bench/decode.py [--repeats 5] [--video FILE]

Draws a five-minute H.264 video (456 x 256, 30 frames a second, a key frame every 250 frames, as x264 does by default)
and cuts 60 clips of 2 to 6 seconds out of it, as they lie in annotated kitchen videos: some overlap, some leave gaps.
Every way gives the same arrays, uint8 [32, 3, 224, 224] of the clean view; a way that does not is named.  Ways take
turns, so that a busy machine is busy for all of them; medians are printed.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.media import EPSILON_S
from karmma.data.raw import read_clips
from karmma.data.readers import ReaderPool
from karmma.data.video import video_picture
from karmma.data.views import draw_view, view_times

SECONDS, FPS, WIDTH, HEIGHT, N_CLIPS = 300, 30, 456, 256, 60
WINDOW = 16
DATA = DataConfig()
VIEW = draw_view("", 0, DATA)


def draw_video(path: Path) -> None:
    """Write textured squares that drift at different speeds, with a little noise: neither flat nor random."""
    generator = np.random.default_rng(0)
    texture = cv2.GaussianBlur(generator.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8), (0, 0), 4)
    squares = [(generator.integers(0, 255, (48, 48, 3), np.uint8), *generator.uniform(-90, 90, 2)) for _ in range(8)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(SECONDS * FPS):
            picture = np.roll(texture, (number // 3, number // 2), (0, 1))
            for square, x_speed, y_speed in squares:
                x, y = int(x_speed * number / FPS) % (WIDTH - 48), int(y_speed * number / FPS) % (HEIGHT - 48)
                picture[y : y + 48, x : x + 48] = square
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def cut_clips(path: Path) -> list[Clip]:
    """Return clips as annotators leave them: one about every five seconds, 2 to 6 seconds long."""
    generator = np.random.default_rng(1)
    starts = np.sort(generator.uniform(0, SECONDS - 7, N_CLIPS))
    lengths = generator.uniform(2, 6, N_CLIPS)
    spans = zip(starts, lengths, strict=True)
    return [Clip(f"{at}", path, float(start), float(start + length), {}) for at, (start, length) in enumerate(spans)]


def by_readers(clips: list[Clip], n_readers: int) -> list[np.ndarray]:
    """Read as extraction does: windows of clips, handed to reader processes."""
    with ReaderPool(n_readers, DATA) as pool:
        windows = [clips[at : at + WINDOW] for at in range(0, len(clips), WINDOW)]
        futures = [future for window in windows for future in pool.submit([(clip, 0, ("video",)) for clip in window])]
        return [future.result()["video"].array for future in futures]


def in_one_pass(clips: list[Clip]) -> list[np.ndarray]:
    """Read all clips in this process, in one pass over the video."""
    found = read_clips(clips, [VIEW] * len(clips), [("video",)] * len(clips), DATA)
    return [readings["video"].array for readings in found]


def by_plain_pyav(clips: list[Clip]) -> list[np.ndarray]:
    """Open, seek and decode for every clip, converting the wanted frames only."""
    out = []
    for clip in clips:
        times = view_times(VIEW, clip.start_s, clip.stop_s)
        array, done, latest = np.empty(DATA.input_shape("video"), np.uint8), 0, None
        with av.open(str(clip.video)) as container:
            stream = container.streams.video[0]
            container.seek(int(times[0] / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                while done < len(times) and latest is not None and times[done] < frame.time - EPSILON_S:
                    array[done] = video_picture(latest.to_ndarray(format="rgb24"), VIEW, DATA.size)
                    done += 1
                latest = frame
                if done == len(times):
                    break
        out.append(array)
    return out


def by_opencv(clips: list[Clip]) -> list[np.ndarray]:
    """Open, set the frame number and grab for every clip, retrieving the wanted frames only."""
    out = []
    for clip in clips:
        wanted = np.floor(view_times(VIEW, clip.start_s, clip.stop_s) * FPS + 1e-6).astype(int)
        array, at = np.empty(DATA.input_shape("video"), np.uint8), int(wanted[0])
        capture = cv2.VideoCapture(str(clip.video))
        capture.set(cv2.CAP_PROP_POS_FRAMES, at)
        for place, number in enumerate(wanted):
            while at <= number:
                capture.grab()
                at += 1
            array[place] = video_picture(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB), VIEW, DATA.size)
        capture.release()
        out.append(array)
    return out


def cpu_s() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in used)


def main() -> None:
    """Time every way in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--video", type=Path, help="another video of at least five minutes at 30 frames a second")
    given = parser.parse_args()
    ways: dict[str, Callable[[list[Clip]], list[np.ndarray]]] = {
        "karmma, 2 reader processes": lambda clips: by_readers(clips, 2),
        "karmma, 1 reader process": lambda clips: by_readers(clips, 1),
        "karmma, in one pass in this process": in_one_pass,
        "plain PyAV, a seek a clip": by_plain_pyav,
        "OpenCV, a seek a clip": by_opencv,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = given.video or Path(folder) / "long.mp4"
        if given.video is None:
            draw_video(path)
        clips = cut_clips(path)
        expected = in_one_pass(clips)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(given.repeats):
            for name, way in ways.items():
                start, cpu = time.perf_counter(), cpu_s()
                arrays = way(clips)
                seconds[name].append((time.perf_counter() - start, cpu_s() - cpu))
                off = max(float(np.abs(a.astype(int) - b).mean()) for a, b in zip(arrays, expected, strict=True))
                if off > 1:
                    print(f"{name}: differs by {off:.2f} grey levels on average in one clip")
    print(f"{'':38}{'clips/s':>9}{'CPU s':>8}{'of PyAV':>9}{'of OpenCV':>11}")
    columns = {name: zip(*runs, strict=True) for name, runs in seconds.items()}
    medians = {name: [statistics.median(column) for column in both] for name, both in columns.items()}
    for name, (wall, cpu) in medians.items():
        ratios = [medians[other][0] / wall for other in list(ways)[-2:]]
        print(f"{name:38}{N_CLIPS / wall:9.1f}{cpu:8.1f}{ratios[0]:8.2f}x{ratios[1]:10.2f}x")


if __name__ == "__main__":
    main()
