"""Predictions of raw files: those of the student's own forward pass, on whatever the files have."""

import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import av
import karmma
import numpy as np
import pytest
import torch
from karmma.data.annotations import Clip
from karmma.data.config import DataConfig
from karmma.data.errors import CacheError, ConfigError, MediaError, RunError
from karmma.data.footage import footage_clip
from karmma.data.media import Reading
from karmma.data.modality import FAILED, PRESENT, subsets
from karmma.data.raw import read_clip
from karmma.data.readers import ReaderPool
from karmma.data.runs import RunFolder
from karmma.data.views import draw_view
from karmma.distill.evaluate import subset_logits
from karmma.distill.prediction import Failure, Prediction
from karmma.distill.stage import distill_student
from karmma.distill.stream import ClipStream
from karmma.distill.student import load_student

CPU = torch.device("cpu")
M = ("video", "audio", "detections")


@pytest.fixture(scope="module")
def predictor(student_run):
    return karmma.load(student_run, "cpu")


@pytest.fixture(scope="module")
def by_hand(student_run):
    """Return a function that reads a clip, runs the student on it alone and returns probabilities by head."""
    student, data, _ = load_student(RunFolder.open(student_run), CPU)

    def predict(clip, modalities):
        found = read_clip(clip, draw_view(clip.clip_id, 0, data), M, data)
        used = [m for m in M if m in modalities and found[m].state == PRESENT]
        inputs = {m: torch.from_numpy(found[m].array[None]) for m in used}
        with torch.inference_mode():
            logits = student(inputs, torch.tensor([[m in used for m in M]])).logits
        return {head: values.softmax(1)[0].numpy() for head, values in logits.items()}

    return predict


@pytest.fixture(scope="module")
def silent(sample, tmp_path_factory):
    """A film like the sample's, without a sound track."""
    path = tmp_path_factory.mktemp("silent") / "silent.mp4"
    with av.open(str(sample / "videos/clip_0002.mp4")) as film, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    return path


def files_of(sample, row):
    return sample / f"videos/clip_{row:04d}.mp4", sample / f"boxes/clip_{row:04d}.json"


@pytest.mark.parametrize("modalities", subsets(M), ids="+".join)
def test_prediction_is_that_of_the_student_on_the_clip_as_read(predictor, by_hand, sample, modalities):
    video, boxes = files_of(sample, 1)
    said = predictor.predict(video, modalities, files={"detections": boxes})
    clip = Clip("c", video, 0.0, None, {"detections": boxes}, video.stem)
    wanted = by_hand(clip, modalities)
    assert list(said) == ["verb", "noun"]
    for head, values in wanted.items():
        assert said[head].dtype == np.float32
        assert np.abs(said[head] - values).max() < 1e-6
        assert said[head].sum() == pytest.approx(1, abs=1e-5)
    assert said.present == modalities
    assert said.missing == {m: "not asked for" for m in M if m not in modalities}


def test_clip_that_was_read_once_is_answered_for_any_subset_of_its_readings(predictor, sample):
    video, boxes = files_of(sample, 2)
    clip = footage_clip(video, predictor.data, files={"detections": boxes})
    with ReaderPool(1, predictor.data) as pool:
        readings = predictor.read(clip, M, pool)
    for modalities in subsets(M):
        said = predictor.answer(clip, {name: readings[name] for name in modalities})
        alone = predictor.predict(video, modalities, files={"detections": boxes})
        assert said.present == alone.present == modalities
        assert said.missing == alone.missing
        assert all(np.array_equal(said[head], alone[head]) for head in said)
    said = predictor.answer(clip, {"audio": Reading(FAILED, None, "damaged.")})
    assert isinstance(said, Failure)
    assert "audio failed: damaged" in str(said)


def test_stretch_of_a_film_is_the_clip_with_these_times(predictor, by_hand, sample):
    video, _ = files_of(sample, 3)
    said = predictor.predict(video, start_s=0.5, stop_s=1.25)
    wanted = by_hand(Clip("c", video, 0.5, 1.25, {"detections": None}), M)
    for head, values in wanted.items():
        assert np.abs(said[head] - values).max() < 1e-6
    whole = predictor.predict(video)
    assert np.abs(said["verb"] - whole["verb"]).max() > 1e-4
    assert (said.start_s, said.stop_s, whole.stop_s) == (0.5, 1.25, None)


def test_film_without_sound_and_boxes_is_predicted_from_what_it_has(predictor, silent):
    said, alone = predictor.predict(silent), predictor.predict(silent, ["video"])
    assert said.present == ("video",)
    assert "has no sound track" in said.missing["audio"]
    assert said.missing["detections"] == "no boxes were given"
    assert said.failed == ()
    assert np.array_equal(said["verb"], alone["verb"])


def test_sound_file_alone_is_predicted_from_its_sound(predictor, sample, tmp_path):
    import wave

    with wave.open(str(tmp_path / "s.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes((3000 * np.sin(np.arange(32_000) / 7)).astype("<i2").tobytes())
    said = predictor.predict(tmp_path / "s.wav")
    assert said.present == ("audio",)
    assert "has no video stream" in said.missing["video"]


def test_frames_with_a_rate_are_predicted(predictor, tmp_path):
    import cv2

    (tmp_path / "frames").mkdir()
    for number in range(1, 17):
        cv2.imwrite(str(tmp_path / "frames" / f"{number:04d}.jpg"), np.full((48, 64, 3), 10 * number, np.uint8))
    said = predictor.predict(tmp_path / "frames", rates={"video": 8.0})
    assert said.present == ("video",)
    assert "holds frames and no sound" in said.missing["audio"]
    with pytest.raises(MediaError, match=r"frames: .*numbered frames have no times\. Set video_fps"):
        predictor.predict(tmp_path / "frames")


@pytest.mark.parametrize("batch_size", [3, 8])
def test_many_give_what_each_gives_alone_in_order_and_one_bad_file_stops_nothing(
    predictor, sample, silent, tmp_path, batch_size
):
    (tmp_path / "bad.mp4").write_bytes(b"no film")
    paths = [files_of(sample, row)[0] for row in (0, 1, 2, 3, 4)]
    paths[2:2] = [tmp_path / "bad.mp4", silent]
    counts = []
    clips = [footage_clip(path, predictor.data) for path in paths]
    found = list(predictor.predict_all(clips, batch_size=batch_size, count=counts.append))
    assert [one.path for one in found] == [str(path) for path in paths]
    assert sum(counts) == len(paths)
    assert isinstance(found[2], Failure)
    assert str(found[2]).startswith(f"{tmp_path}/bad.mp4: video and audio failed: not a media file: ")
    for one in found[:2] + found[3:]:
        alone = predictor.predict(one.path)
        assert one.present == alone.present
        for head in alone:
            assert np.abs(one[head] - alone[head]).max() < 1e-5


def test_each_backbone_runs_once_a_batch_and_only_on_clips_that_have_its_modality(predictor, sample, silent):
    paths = [files_of(sample, 1)[0], silent, files_of(sample, 0)[0]]
    clips = [footage_clip(path, predictor.data) for path in paths]
    seen = []
    hooks = [
        backbone.register_forward_hook(lambda _, given, out, name=name: seen.append((name, len(given[0]))))
        for name, backbone in predictor.student.backbones.items()
    ]
    found = list(predictor.predict_all(clips))
    for hook in hooks:
        hook.remove()
    assert [one.present for one in found] == [M[:2], M[:1], M[:2]]
    assert sorted(seen) == [("audio", 2), ("video", 3)]


def test_failure_is_raised_by_name_and_if_allowed_it_counts_as_missing_and_is_told(predictor, sample, tmp_path):
    video, _ = files_of(sample, 0)
    bad = tmp_path / "mic.wav"
    bad.write_bytes(b"no sound")
    with pytest.raises(MediaError) as raised:
        predictor.predict(video, files={"audio": bad})
    assert str(raised.value).startswith(f"{video}: audio failed: {bad}: not a media file")
    assert "Or predict from what is left with --allow-failures" in str(raised.value)
    said = predictor.predict(video, files={"audio": bad}, allow_failures=True)
    assert said.failed == ("audio",)
    assert "not a media file" in said.missing["audio"]
    assert np.array_equal(said["noun"], predictor.predict(video, ["video"])["noun"])
    with pytest.raises(MediaError, match="audio failed") as raised:
        predictor.predict(video, ["audio"], files={"audio": bad}, allow_failures=True)
    assert "what is left" not in str(raised.value)


@pytest.mark.parametrize(
    ("modalities", "said"),
    [
        (["audio"], r"has none of the student's modalities that were asked for \(audio: .* has no sound track\)"),
        (
            ["detections"],
            r"has none of the student's modalities that were asked for \(detections: no boxes were given\)",
        ),
    ],
)
def test_film_with_none_of_the_modalities_is_told_which_and_why(predictor, silent, modalities, said):
    with pytest.raises(MediaError, match=said):
        predictor.predict(silent, modalities)
    (found,) = predictor.predict_all([footage_clip(silent, predictor.data)], modalities)
    assert isinstance(found, Failure)


def test_what_is_asked_for_in_vain_is_said(predictor, sample):
    video, _ = files_of(sample, 0)
    for modalities, said in (
        (["flow"], "This student does not know flow. Choose from video, audio, detections."),
        (["vidoe"], "Unknown modality 'vidoe'. Did you mean 'video'?"),
        ([], "No modality chosen."),
    ):
        with pytest.raises(ConfigError) as raised:
            predictor.predict(video, modalities)
        assert said in str(raised.value)
    with pytest.raises(MediaError, match=r"no\.mp4: no such file"):
        predictor.predict("no.mp4")
    with pytest.raises(MediaError, match=r"the clip starts at 90\.000 s, the file ends at"):
        predictor.predict(video, start_s=90.0)


@pytest.fixture
def spoilt(student_run, tmp_path):
    """A copy of the run, to be spoilt."""
    return Path(shutil.copytree(student_run, tmp_path / "student-tiny"))


def rewrite(run, **changes):
    path = run / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_run_that_cannot_be_used_is_refused_with_what_to_do(spoilt, tmp_path):
    def refused(error=RunError):
        with pytest.raises(error) as raised:
            karmma.load(spoilt, "cpu")
        return str(raised.value)

    with pytest.raises(RunError, match="nothing: no run here"):
        karmma.load(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="device = 'gpu7'"):
        karmma.load(spoilt, "gpu7")
    rewrite(spoilt, kind="teacher")
    assert "a teacher's run, expected a student's: a teacher starts from cached tokens" in refused()
    assert "karmma distill" in refused()
    rewrite(spoilt, kind="sweep")
    assert "config.json is not that of a student of this version: 'kind'" in refused()
    rewrite(spoilt, kind="student", classes={"verb": ["a", "b"], "noun": list("abcdef")})
    assert "other labels: its weights are for noun 6, verb 4, its config.json names verb 2, noun 6" in refused()
    rewrite(spoilt, classes={"verb": list("abcd"), "colour": list("abcdef")})
    assert "its config.json names verb 4, colour 6" in refused()
    rewrite(spoilt, classes=None)
    assert "config.json is not that of a student" in refused()
    rewrite(spoilt, classes={"verb": list("abcd")}, data={"frames": 4, "unheard_of": 1})
    assert "unheard_of" in refused()
    (spoilt / "config.json").write_text("[]")
    assert "config.json is not that of a student" in refused()
    (spoilt / "config.json").write_text("{")
    assert "config.json: damaged, not JSON" in refused(CacheError)


def test_run_without_its_end_or_its_checkpoint_is_refused(spoilt):
    weights = (spoilt / "best.safetensors").read_bytes()
    (spoilt / "best.safetensors").write_bytes(weights[:1000])
    with pytest.raises(RunError, match=r"best\.safetensors: damaged"):
        karmma.load(spoilt)
    (spoilt / "best.safetensors").unlink()
    with pytest.raises(RunError, match=r"best\.safetensors: no such checkpoint"):
        karmma.load(spoilt)
    (spoilt / "result.json").unlink()
    with pytest.raises(RunError, match="this run did not finish"):
        karmma.load(spoilt)


def test_flow_that_is_released_or_needs_weights_is_asked_for(make_student, tmp_path, sample):
    seen = {"modalities": ("video", "flow"), "flow_method": "released"}
    released = karmma.load(make_student(tmp_path / "a", data=seen), "cpu")
    said = released.predict(files_of(sample, 0)[0])
    assert said.missing == {"flow": "this student saw released flow, and none was given"}
    raft = seen | {"flow_method": "raft_small", "flow_weights": Path("raft.pth")}
    run = make_student(tmp_path / "b", data=raft)
    with pytest.raises(ConfigError, match=r"its flow is computed with raft_small\. Name its weights by flow_weights"):
        karmma.load(run, "cpu")
    assert karmma.load(run, "cpu", "raft.pth").data.flow_weights == Path("raft.pth")


def test_student_that_diverged_does_not_answer(spoilt, sample):
    predictor = karmma.load(spoilt, "cpu")
    with torch.no_grad():
        next(predictor.student.fusion.mlp.parameters()).fill_(torch.nan)
    with pytest.raises(MediaError, match="answers with what is no number"):
        predictor.predict(files_of(sample, 0)[0])


def test_likeliest_classes_and_actions_are_those_of_all_products():
    draw = np.random.default_rng(0)
    classes = {"verb": tuple("abcde"), "noun": tuple("vwxyz"), "hand": ("left", "right")}
    probs = {head: draw.dirichlet(np.ones(len(names))).astype(np.float32) for head, names in classes.items()}
    said = Prediction("f", 0.0, None, probs, classes, ("video",))
    best = sorted(zip(classes["verb"], probs["verb"].tolist(), strict=True), key=lambda pair: -pair[1])
    assert said.top("verb", 3) == best[:3]
    assert said.top("hand", 9) == said.top("hand", 2)
    every = [
        ((v, n, h), float(p) * float(q) * float(r))
        for (v, p), (n, q), (h, r) in product(*(zip(classes[x], probs[x], strict=True) for x in classes))
    ]
    every.sort(key=lambda pair: -pair[1])
    assert [names for names, _ in said.actions(7)] == [names for names, _ in every[:7]]
    assert [prob for _, prob in said.actions(7)] == pytest.approx([prob for _, prob in every[:7]])
    assert len(said.actions(99)) == 50
    record = said.record(2)
    assert record["heads"]["verb"][0] == {"class": best[0][0], "prob": best[0][1]}
    assert record["action"][0]["classes"] == dict(zip(classes, every[0][0], strict=True))
    json.dumps(record, allow_nan=False)


def test_one_head_or_a_head_called_action_has_no_joint_action():
    for classes in ({"verb": ("a", "b")}, {"verb": ("a", "b"), "action": ("c", "d")}):
        probs = {head: np.array([0.25, 0.75], np.float32) for head in classes}
        said = Prediction("f", 0.0, None, probs, classes, ("video",))
        assert said.actions() == []
        assert "action" not in said.record(5)


def test_package_and_its_load_wait_for_torch_until_called():
    code = "import karmma, sys; assert callable(karmma.load); assert 'torch' not in sys.modules"
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": path})


def test_data_settings_of_the_run_decide_what_is_seen(predictor):
    assert isinstance(predictor.data, DataConfig)
    assert predictor.data.frames == 4
    assert predictor.modalities == M
    assert predictor.classes["verb"] == ("lift", "lower", "pull", "push")


def test_student_that_was_trained_predicts_what_its_evaluation_computes(table, data, config):
    run = distill_student(table, data, config.model_copy(update={"epochs": 1})).run
    predictor = karmma.load(run, "cpu")
    rows = table.rows("test")[:5]
    with ClipStream(table, data, M, readers=1) as stream:
        found = subset_logits(predictor.student, stream, rows, [M, ("audio",)], CPU)
    for at, clip in enumerate(map(table.clip, rows)):
        boxes = {name: path for name, path in clip.sources.items() if path is not None}
        said = predictor.predict(clip.video, files=boxes)
        for head, logits in found.logits[M].items():
            assert np.abs(said[head] - logits[at].softmax(0).numpy()).max() < 1e-5
        alone = predictor.predict(clip.video, "audio")
        assert np.abs(alone["noun"] - found.logits[("audio",)]["noun"][at].softmax(0).numpy()).max() < 1e-5
    assert tuple(predictor.classes["noun"]) == table.classes("noun")
