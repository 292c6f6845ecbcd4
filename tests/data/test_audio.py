import cmath
import math
import os
import subprocess
import sys
import warnings
from fractions import Fraction

import av
import h5py
import numpy as np
import pytest
from karmma.data.audio import log_mel, mel_filters, read_audio, read_samples
from karmma.data.config import DataConfig
from karmma.data.errors import MediaError
from karmma.data.media import Media
from karmma.data.packs import PackedSound
from karmma.data.views import View, draw_view, view_times

RATE = 16_000
CLEAN = draw_view("", 0, DataConfig())
SMALL = DataConfig(
    frames=4, audio_segment_s=0.128, audio_hop=64, audio_steps=32, audio_window=256, audio_mels=24
)  # 32 x 64 samples = 0.128 s


def tone(hertz, seconds, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def read(path, times, span, data=SMALL):
    with Media(path) as media:
        return read_audio(media, np.array(times), span, CLEAN, data)


def test_mel_filters_by_hand():
    # Below 1000 Hz a mel is 200/3 Hz: a top of 800 Hz is 12 mels, and two filters have their edges at 0, 4, 8, 12 mels.
    filters = mel_filters(1600, 24, 2)  # bins 66.67 Hz = 1 mel apart
    up_down = np.array([0, 1, 2, 3, 4, 3, 2, 1, 0]) / 4 * 2 / (8 * 200 / 3)
    assert filters[0] == pytest.approx([*up_down, 0, 0, 0, 0], abs=1e-9)
    assert filters[1] == pytest.approx([0, 0, 0, 0, *up_down], abs=1e-9)


def test_mel_filters_leave_no_bin_empty_at_the_size_in_use():
    data = DataConfig()
    spectrogram = log_mel(np.random.default_rng(0).standard_normal(4096).astype(np.float32), np.array([2048]), data)
    assert spectrogram.shape == (1, 128)
    assert spectrogram.min() > -9


def test_log_mel_equals_a_slow_transform():
    samples = np.random.default_rng(0).standard_normal(2000).astype(np.float32) * 0.1
    data, center = SMALL, 900
    fast = log_mel(samples, np.array([center]), data)[0]
    window = [0.5 - 0.5 * math.cos(2 * math.pi * n / 256) for n in range(256)]
    part = [samples[center - 128 + n] * window[n] for n in range(256)]
    power = [abs(sum(x * cmath.exp(-2j * math.pi * k * n / 256) for n, x in enumerate(part))) ** 2 for k in range(129)]
    sums = [sum(f * p for f, p in zip(row, power, strict=True)) for row in mel_filters(RATE, 256, 24)]
    slow = [math.log10(max(total, 1e-10)) for total in sums]
    assert fast == pytest.approx(slow, abs=1e-4)


@pytest.fixture(scope="module")
def librosa():
    """The library that the paper's recipe was written with; importing it compiles for half a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import librosa

        librosa.feature.melspectrogram(y=np.zeros(2048, np.float32), sr=RATE)
    return librosa


def reference(librosa, samples):
    """Return librosa's own log-mel spectrogram of samples at 16 kHz by the paper's recipe, [steps, mels]."""
    how = {"n_fft": 512, "win_length": 400, "hop_length": 80, "n_mels": 128, "power": 2.0}
    return np.log10(np.maximum(librosa.feature.melspectrogram(y=samples, sr=RATE, **how), 1e-10)).T


def speechlike(seconds, rate=RATE):
    """Noise under a slow envelope, with gliding tones: all mel bins hear something."""
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(0).standard_normal(len(at)) * 0.05 * (1 + np.sin(9 * at))
    return (noise + 0.3 * np.sin(2 * np.pi * (200 * at + 900 * at**2))).astype(np.float32)


@pytest.mark.slow
def test_log_mel_equals_librosa(librosa):
    samples = speechlike(1.0)
    steps = np.arange(10, 190)
    # 2e-3 of log10 is 0.02 dB; librosa computes in float32 too
    assert log_mel(samples, steps * 80, DataConfig()) == pytest.approx(reference(librosa, samples)[steps], abs=2e-3)


@pytest.mark.slow
def test_read_audio_by_the_papers_recipe_equals_slices_of_librosas_spectrogram(librosa, wav):
    """32 segments of 1.116 s around the frame times, 16 kHz, hop 80, 128 mel bins, 224 steps."""
    samples, data = speechlike(4.0), DataConfig()
    path = wav("a.wav", samples)
    kept = np.rint(samples * 32767) / np.float32(32768)  # as 16 bits hold them
    times = view_times(CLEAN, 0.8, 3.2)
    found = read(path, times, (0.8, 3.2), data)
    assert found.shape == (32, 128, 224)
    whole = reference(librosa, kept.astype(np.float32))
    for segment, time in zip(found, times, strict=True):
        first = round(time * RATE / 80 - 223 / 2)
        assert abs((first + 223 / 2) * 80 / RATE - time) <= 0.0025
        assert segment == pytest.approx(whole[first : first + 224].T, abs=2e-3)


@pytest.mark.slow
def test_resampling_agrees_with_a_reference_resampler(librosa, wav):
    """A chirp of 44.1 kHz at 16 kHz: 60 dB above the difference, where it stays below 6.1 of 8 kHz."""
    at = np.arange(2 * 44_100) / 44_100
    chirp = (0.5 * np.sin(2 * np.pi * (100 * at + 1500 * at**2))).astype(np.float32)  # 100 to 6100 Hz
    path = wav("a.wav", chirp, 44_100)
    with Media(path) as media:
        ours = read_samples(media, (0, 32_000), (0.0, 2.0), RATE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = librosa.resample(chirp, orig_sr=44_100, target_sr=RATE, res_type="soxr_hq")
    inner = slice(400, -400)
    error = ours[inner] - theirs[inner]
    assert 10 * np.log10((theirs[inner] ** 2).mean() / (error**2).mean()) > 60


def test_log_mel_of_silence_is_the_floor():
    assert log_mel(np.zeros(4096, np.float32), np.array([2000]), SMALL) == pytest.approx(np.full((1, 24), -10))


def test_read_audio_of_a_tone_peaks_at_its_mel_bin(wav):
    path = wav("a.wav", tone(1000, 1.0))
    spectrogram = read(path, [0.3, 0.5, 0.6, 0.7], (0.0, 1.0))
    assert spectrogram.shape == (4, 24, 32)
    assert spectrogram.dtype == np.float32
    nearest = mel_filters(RATE, 256, 24)[:, 16].argmax()  # bin 16 of 256 is 1000 Hz
    assert (spectrogram.argmax(axis=1) == nearest).all()


@pytest.mark.parametrize("time", [0.3, 0.3017, 0.5, 0.71])
def test_read_audio_centres_its_segment_on_the_time(wav, time):
    samples = np.zeros(RATE)
    samples[round(time * RATE)] = 1
    loud = read(wav("a.wav", samples), [time], (0.0, 1.0))[0].max(axis=0)
    heard = np.flatnonzero(loud > -9)
    assert abs(heard.mean() - 15.5) <= 0.5 + 0.5  # half a hop of rounding, half for the click's place between hops
    assert len(heard) in (3, 4)  # a window of 4 hops


def test_read_audio_of_overlapping_segments_equals_each_alone(wav):
    path = wav("a.wav", np.random.default_rng(0).standard_normal(RATE) * 0.1)
    times = [0.2, 0.23, 0.25, 0.8]
    together = read(path, times, (0.0, 1.0))
    for place, time in enumerate(times):
        assert together[place] == pytest.approx(read(path, [time], (0.0, 1.0))[0], abs=1e-5)


def test_read_audio_hears_beyond_the_clip_but_not_beyond_the_recording(wav):
    path = wav("a.wav", np.random.default_rng(0).standard_normal(RATE) * 0.1)
    inner = read(path, [0.5], (0.49, 0.51))[0]
    assert inner.min() > -10
    start = read(path, [0.0], (0.0, 1.0))[0]
    assert start[:, :13] == pytest.approx(np.full((24, 13), -10))
    assert start[:, 18:].min() > -9


def test_read_audio_of_a_late_time_equals_the_same_place_read_from_the_start(film, wav):
    samples = np.random.default_rng(0).standard_normal(4 * RATE).astype(np.float32) * 0.1
    path = film("a.mp4", [k / 25 for k in range(100)], sound=samples)
    late, whole = read(path, [3.0], (2.9, 3.1)), read(path, [0.1, 3.0], (0.0, 4.0))
    assert late[0] == pytest.approx(whole[1], abs=2e-3)
    wave_late = read(wav("a.wav", samples), [3.0], (2.9, 3.1))
    wave_whole = read(wav("a.wav", samples), [0.1, 3.0], (0.0, 4.0))
    assert wave_late[0] == pytest.approx(wave_whole[1], abs=1e-5)


@pytest.mark.parametrize(("rate", "channels"), [(44_100, 1), (48_000, 2), (8_000, 1), (16_000, 2)])
def test_read_samples_resamples_in_place_and_mixes_down(wav, rate, channels):
    path = wav("a.wav", np.repeat(tone(440, 2.0, rate)[None], channels, 0), rate)
    first, last = 8_000, 16_000
    with Media(path) as media:
        found = read_samples(media, (first, last), (0.0, 2.0), RATE)
    assert found == pytest.approx(tone(440, 2.0)[first:last], abs=0.01)


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])  # eight planes, and eight channels in one plane
def test_read_samples_mixes_down_eight_channels(tmp_path, codec):
    loud = np.rint(tone(440, 1.0) * 32767).astype(np.int16)
    packed = np.zeros((RATE, 8), np.int16)
    packed[:, :2] = loud[:, None]  # two channels of eight
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="7.1")
        frame = av.AudioFrame.from_ndarray(packed.reshape(1, -1), format="s16", layout="7.1")
        frame.sample_rate = RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with Media(tmp_path / "a.mkv") as media:
        found = read_samples(media, (4_000, 12_000), (0.0, 1.0), RATE)
    assert np.abs(found).max() == pytest.approx(0.125, abs=0.01)


def test_read_audio_of_a_sound_track_agrees_with_its_wave(film, wav):
    samples = tone(500, 1.0) * np.repeat([0.0, 1.0, 0.0, 1.0], RATE // 4)
    track = read(film("a.mp4", [k / 25 for k in range(25)], sound=samples), [0.4, 0.8], (0.0, 1.0))
    wave = read(wav("a.wav", samples), [0.4, 0.8], (0.0, 1.0))
    loud = wave > -2
    assert np.abs(track - wave)[loud].max() < 0.2


def test_read_audio_of_a_clip_without_a_sample_fails(wav):
    path = wav("a.wav", tone(500, 0.5))
    with pytest.raises(MediaError, match=r"a\.wav: has a sound track, but no sample between 2\.000 and 3\.000 s"):
        read(path, [2.5], (2.0, 3.0))


def test_read_samples_of_broken_sound_fails(wav, tmp_path):
    import wave

    with wave.open(str(wav("a.wav", tone(500, 1.0)))) as file:
        assert file.getnframes() == RATE
    floats = np.full(RATE, np.nan, "<f4")
    head = b"RIFF" + (36 + floats.nbytes).to_bytes(4, "little") + b"WAVEfmt \x10\0\0\0\x03\0\x01\0"
    head += RATE.to_bytes(4, "little") + (4 * RATE).to_bytes(4, "little") + b"\x04\0\x20\0data"
    (tmp_path / "nan.wav").write_bytes(head + floats.nbytes.to_bytes(4, "little") + floats.tobytes())
    with pytest.raises(MediaError, match=r"nan\.wav: the sound holds values that are not finite"):
        read(tmp_path / "nan.wav", [0.5], (0.0, 1.0))


def test_grid_sound_starts_where_its_alignment_says(shared_data):
    path = shared_data / "grid/clips/bbaf2n.mp4"
    words = [line.split(",") for line in (shared_data / "grid/words.csv").read_text().splitlines()]
    spoken = [(float(a), float(b)) for clip, a, b, word in words[1:] if clip == "bbaf2n" and word not in ("sil", "sp")]
    middle = float(Fraction(sum(Fraction(a) + Fraction(b) for a, b in spoken), 2 * len(spoken)))
    energy = read(path, [0.1, middle], (0.0, 3.0)).max(axis=1).mean(axis=1)
    assert energy[1] > energy[0] + 1


def test_read_audio_of_wav_flac_and_pack_are_the_same(wav, tmp_path):
    samples = np.rint(speechlike(1.5) * 32767) / np.float32(32768)
    wave = wav("a.wav", samples * (32768 / 32767))
    with av.open(str(tmp_path / "a.flac"), "w") as container:
        stream = container.add_stream("flac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 32768).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate, frame.pts = RATE, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["P01_01"] = samples
    times, span = [0.3, 0.6, 0.9, 1.1], (0.2, 1.2)
    expected = read(wave, times, span)
    assert (read(tmp_path / "a.flac", times, span) == expected).all()
    with PackedSound(tmp_path / "a.h5::P01_01", RATE) as sound:
        packed = read_audio(sound, np.array(times), span, CLEAN, SMALL)
    assert packed == pytest.approx(expected, abs=1e-5)


def test_masked_bands_hold_the_mean_and_nothing_else_changes(wav):
    path = wav("a.wav", speechlike(2.0))
    times, span = np.array([0.50, 0.55, 0.60, 1.2]), (0.4, 1.4)
    clean = read(path, times, span)
    view = View(1, (0.5,) * 4, 1.0, (0.5, 0.5), False, masked_mels=(0.25, 0.125), masked_time=(0.101, 0.1))
    with Media(path) as media:
        masked = read_audio(media, times, span, view, SMALL)
    for segment, was, time in zip(masked, clean, times, strict=True):
        first = math.floor(time * RATE / 64 - 31 / 2 + 0.5 - 1e-6)
        moments = (first + np.arange(32)) * 64 / RATE
        hidden = np.zeros((24, 32), bool)
        hidden[6:9] = True
        hidden[:, (moments > 0.501) & (moments < 0.601)] = True
        assert segment[~hidden] == pytest.approx(was[~hidden])
        assert segment[hidden] == pytest.approx(np.full(hidden.sum(), was.mean()), abs=1e-5)


def test_log_mel_does_not_depend_on_the_number_of_threads():
    ask = "import hashlib, numpy as np; from karmma.data.audio import log_mel; "
    ask += "from karmma.data.config import DataConfig; "
    ask += "sound = np.random.default_rng(0).standard_normal(40_000).astype(np.float32); "
    ask += "print(hashlib.sha256(log_mel(sound, np.arange(500, 39_000, 20), DataConfig()).tobytes()).hexdigest())"
    said = set()
    for threads in ("1", "2", "5"):
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        run = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
        said.add(run.stdout)
    assert len(said) == 1
