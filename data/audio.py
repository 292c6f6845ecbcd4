"""Audio: the sound around each moment of a clip as log-mel spectrograms.

Step j of a spectrogram is a window centred on a whole number of hops from the clock's zero; the `audio_steps` steps
around a moment are centred on it to within half a hop.  So neighbouring segments share their windows, and each is
computed once.  Windows see the real sound on both sides of a segment; only beyond the true ends of the recording, and
in holes between time stamps, is there silence.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from .config import DataConfig
from .errors import MediaError
from .views import View

if TYPE_CHECKING:
    import av

# Decoders need some sound before the first exact sample (MP3's bit reservoir, AAC's overlap).
PREROLL_S = 0.25
# Time stamps jitter by less than this (WebM rounds to milliseconds); a larger step is a hole in the sound.
HOLE_S = 0.1
FLOOR = 1e-10
# What recordings have; from a damaged header's 1 Hz, resampling would fill the memory.
SLOWEST_HZ, FASTEST_HZ = 1_000, 1_000_000
# Four hours at 16 kHz, in 1 GiB: what lasts longer has a damaged header, or is no clip.
MOST_SAMPLES = 2**28
# Full scale is 1, or 2^31 where somebody forgot to scale; what is louder still is damage.
LOUDEST = 1e10
# PyAV (seen in 18.1) counts a plane too many from eight on, and reading it ends the process.
CRASHING_PLANES = 8


class Sound(Protocol):
    """Whatever holds the sound of a clip: a media file or a pack."""

    path: Path
    broken: str  # why the last iteration over `sound_frames` ended early, if it did

    @property
    def has_sound(self) -> bool:
        """Whether there is anything to hear."""

    def sound_frames(self, from_s: float) -> "Iterator[tuple[float, av.AudioFrame]]":
        """Yield (time, frame), the first at or before `from_s` wherever there is one."""


def read_audio(sound: Sound, times: np.ndarray, span: tuple[float, float], view: View, data: DataConfig) -> np.ndarray:
    """Return the log-mel spectrogram around each time, float32 [T, mels, steps], log10 of power.

    times, span (start and stop of the clip): seconds on the file's clock.
    Raises MediaError if the file has a sound track of which no sample lies within the clip, or decoding breaks off.
    """
    columns = segment_hops(times, data)
    reach = max(_fft_size(data), data.audio_window) // 2
    first, last = int(columns[0, 0]) * data.audio_hop - reach, int(columns[-1, -1]) * data.audio_hop + reach
    samples = read_samples(sound, (first, last), span, data.audio_rate)
    unique, place = np.unique(columns, return_inverse=True)
    spectrogram = log_mel(samples, unique * data.audio_hop - first, data)
    segments = np.ascontiguousarray(spectrogram[place.reshape(columns.shape)].transpose(0, 2, 1))  # [T, mels, steps]
    return _masked(segments, columns * data.audio_hop / data.audio_rate, span, view)


def _masked(segments: np.ndarray, moments: np.ndarray, span: tuple[float, float], view: View) -> np.ndarray:
    """Put the mean of each segment where the view masks mel bins or a stretch of the clip's time; view 0 masks nothing.

    moments: [T, steps] seconds, so that segments which overlap mask the same sound.  The mean, as it tells nothing.
    Source: SpecAugment (Park et al. 2019), without time warping.
    """
    (low, mels), (early, time) = view.masked_mels, view.masked_time
    n_mels, means = segments.shape[1], segments.mean(axis=(1, 2), keepdims=True)
    if mels:
        band = slice(round(low * n_mels), round((low + mels) * n_mels))
        segments[:, band] = means
    if time:
        shares = (moments - span[0]) / (span[1] - span[0])
        hushed = (shares >= early) & (shares < early + time)  # [T, steps]
        segments = np.where(hushed[:, None, :], means, segments)
    return segments


def segment_hops(times: np.ndarray, data: DataConfig) -> np.ndarray:
    """Return the numbers of the hops on which the windows of each segment are centred, int64 [T, steps], ascending."""
    # Ties all go down, so that segments that lie end to end share no step and lack none.
    centred = times * data.audio_rate / data.audio_hop - (data.audio_steps - 1) / 2
    first = np.floor(centred + 0.5 - 1e-6).astype(np.int64)
    return first[:, None] + np.arange(data.audio_steps)


def read_samples(sound: Sound, wanted: tuple[int, int], span: tuple[float, float], rate: int) -> np.ndarray:
    """Decode samples wanted[0]..wanted[1] (numbered from the clock's zero) at `rate`, mono float32, about -1..1."""
    if wanted[1] - wanted[0] > MOST_SAMPLES:
        raise MediaError(f"{sound.path}: the clip lasts {span[1] - span[0]:.0f} s. Correct start_s and stop_s.")
    out = np.zeros(wanted[1] - wanted[0], np.float32)
    heard = np.zeros(len(out), bool)
    for start_s, frames in _runs(sound, wanted[0] / rate, wanted[1] / rate):
        mono = _resampled(sound.path, frames, rate)
        begin = round(start_s * rate) - wanted[0]
        low, high = max(begin, 0), min(begin + len(mono), len(out))
        if low < high:
            out[low:high] = mono[low - begin : high - begin]
            heard[low:high] = True
    if sound.broken:
        raise MediaError(f"{sound.path}: decoding of the sound breaks off: {sound.broken}. Fetch the file again.")
    clip = slice(max(0, round(span[0] * rate) - wanted[0]), max(0, round(span[1] * rate) - wanted[0]))
    if not heard[clip].any():
        raise MediaError(
            f"{sound.path}: has a sound track, but no sample between {span[0]:.3f} and {span[1]:.3f} s. "
            "Correct start_s and stop_s, or leave the cell of its audio column empty."
        )
    if not (np.abs(out) < LOUDEST).all():
        raise MediaError(f"{sound.path}: the sound holds values that are not finite, or no sound. Convert it again.")
    return out


def _runs(sound: Sound, from_s: float, to_s: float) -> list[tuple[float, list["av.AudioFrame"]]]:
    """Decode the frames from a little before `from_s` up to `to_s`, cut into runs where the time stamps jump."""
    runs: list[tuple[float, list[av.AudioFrame]]] = []
    due = 0.0
    for time, frame in sound.sound_frames(from_s - PREROLL_S):
        if not runs or abs(time - due) > HOLE_S:
            runs.append((time, []))
            due = time
        runs[-1][1].append(frame)
        due += frame.samples / frame.sample_rate
        if time > to_s + HOLE_S:
            break
    return runs


def _resampled(path: Path, frames: list["av.AudioFrame"], rate: int) -> np.ndarray:
    """Return a run of frames as mono float32 at `rate`, resampled in one piece; channels are averaged."""
    import av

    first = frames[0]
    kinds = {(frame.format.name, frame.layout.name, frame.sample_rate) for frame in frames}
    if len(kinds) > 1:
        raise MediaError(f"{path}: the sound changes its form midway ({sorted(kinds)}). Convert the file.")
    if not SLOWEST_HZ <= first.sample_rate <= FASTEST_HZ:
        raise MediaError(f"{path}: states {first.sample_rate} samples a second: damaged. Fetch the file again.")
    channels = first.layout.nb_channels
    # The layout stays: FFmpeg's own mixing to mono would make equal channels louder than one of them.
    resampler = av.AudioResampler(format="flt", layout=first.layout.name, rate=rate)
    given = [_joined(frames)] if channels < CRASHING_PLANES else frames
    try:
        pieces = [piece.to_ndarray() for frame in (*given, None) for piece in resampler.resample(frame)]
    except (av.error.FFmpegError, ValueError) as error:  # a layout that damage made up
        raise MediaError(f"{path}: the sound cannot be resampled: {error}. Convert the file again.") from None
    packed = np.concatenate(pieces, axis=1) if pieces else np.zeros((1, 0), np.float32)
    return packed.reshape(-1, channels).mean(axis=1)  # [n]


def _joined(frames: list["av.AudioFrame"]) -> "av.AudioFrame":
    """Return a run of frames as one, which resamples twice as fast."""
    import av

    first = frames[0]
    samples = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    whole = av.AudioFrame.from_ndarray(samples, format=first.format.name, layout=first.layout.name)
    whole.sample_rate = first.sample_rate
    return whole


def log_mel(samples: np.ndarray, centers: np.ndarray, data: DataConfig) -> np.ndarray:
    """Return log10 of the mel power in a periodic Hann window around each centre, float32 [n, mels], at least -10.

    The transform is `audio_fft` samples long, or the shortest power of two that holds the window and leaves no mel bin
    empty.
    """
    n_fft = _fft_size(data)
    # Only the part of each frame under the window counts; the transform pads it with zeros, which power ignores.
    begins = centers - n_fft // 2 + (n_fft - data.audio_window) // 2
    frames = np.lib.stride_tricks.sliding_window_view(samples, data.audio_window)[begins]  # [n, window]
    hann = (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(data.audio_window) / data.audio_window)).astype(np.float32)
    spectrum = np.fft.rfft(frames * hann, n_fft)  # [n, n_fft // 2 + 1]
    power = np.ascontiguousarray((spectrum.real**2 + spectrum.imag**2).T, np.float32)  # [n_fft // 2 + 1, n]
    mels = np.empty((data.audio_mels, len(frames)), np.float32)
    # Band by band, and not as a product of matrices: its last bits would depend on the number of threads.
    for out, weights in zip(mels, mel_filters(data.audio_rate, n_fft, data.audio_mels), strict=True):
        (heard,) = np.nonzero(weights)
        if not len(heard):  # a transform too short for so many bins, if one was asked for
            out[:] = 0
            continue
        band = slice(heard[0], heard[-1] + 1)
        np.sum(weights[band, None] * power[band], axis=0, out=out)
    return np.log10(np.maximum(mels.T, np.float32(FLOOR)))


def _fft_size(data: DataConfig) -> int:
    return data.audio_fft or _filling_fft(data.audio_rate, data.audio_window, data.audio_mels)


@lru_cache(maxsize=8)
def _filling_fft(rate: int, window: int, n_mels: int) -> int:
    n_fft = 1 << (window - 1).bit_length()
    while not mel_filters(rate, n_fft, n_mels).any(axis=1).all():
        n_fft *= 2
    return n_fft


@lru_cache(maxsize=8)
def mel_filters(rate: int, n_fft: int, n_mels: int) -> np.ndarray:
    """Return triangular filters of equal area from 0 to rate / 2, float32 [n_mels, n_fft // 2 + 1]."""
    edges = mel_edges(rate, n_mels)
    bins = np.arange(n_fft // 2 + 1) * rate / n_fft
    widths = np.array([high - low for low, high in pairwise(edges)])
    rising = (bins - edges[:-2, None]) / widths[:-1, None]
    falling = (edges[2:, None] - bins) / widths[1:, None]
    filters = np.maximum(0, np.minimum(rising, falling)) * (2 / (edges[2:] - edges[:-2]))[:, None]
    return filters.astype(np.float32)


def mel_edges(rate: int, n_mels: int) -> np.ndarray:
    """Return where mel filters begin, peak and end, in Hz, float64 [n_mels + 2]: filter m peaks at m + 1.

    Source: Slaney's Auditory Toolbox: 200/3 Hz a mel below 1000 Hz, 27 steps per factor 6.4 above.
    """
    knee_hz, hz_per_mel, log_step = 1000.0, 200 / 3, np.log(6.4) / 27
    knee, top_hz = knee_hz / hz_per_mel, rate / 2
    top = top_hz / hz_per_mel if top_hz < knee_hz else knee + np.log(top_hz / knee_hz) / log_step
    mel = np.linspace(0, top, n_mels + 2)
    return np.where(mel < knee, mel * hz_per_mel, knee_hz * np.exp(log_step * (mel - knee)))
