"""`karmma doctor` names what is wrong before one begins, and nothing that is not."""

import json
import shutil
from importlib.metadata import PackageNotFoundError

import pytest
import torch
from karmma.data import check as check_module
from karmma.data.sample import write_sample
from karmma.distill import checkup as module

SETTINGS = """
preset = "tiny"
[data]
table = "clips.csv"
heads = ["verb"]
modalities = ["video", "audio"]
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder, n_clips=12)
    (folder / "karmma.toml").write_text(SETTINGS)
    return folder


@pytest.fixture
def doctor(sample, tmp_path, monkeypatch, give):
    """Return a function: what the doctor says of a copy of the sample data, check -> (verdict, found, step)."""
    shutil.copytree(sample, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)

    def run(*options):
        code, out, err = give("doctor", "--json", *options)
        found = {one["check"]: (one["verdict"], one["found"], one["step"]) for one in json.loads(out)["findings"]}
        failed = [name for name, (verdict, *_) in found.items() if verdict == "FAIL"]
        assert code == bool(failed)
        last = err.strip().splitlines()[-1]
        assert last == (
            f"Failed: {', '.join(failed)}. Mend that, then karmma doctor." if failed else "Next: karmma extract"
        )
        assert all(step for verdict, _, step in found.values() if verdict != "PASS")
        return found

    return run


def test_sound_folder_passes_and_what_is_worth_knowing_is_a_warning(doctor):
    found = doctor()
    assert [*found] == [
        "environment", "codecs", "GPU", "table", "files", "frames", "disk",
        "teacher's video", "teacher's audio", "student's video", "student's audio",
    ]  # fmt: skip
    assert found["table"] == ("PASS", "12 clips, 8 to train; 4 of verb", "")
    assert found["frames"] == ("PASS", "first, middle and last of 12 clips decode", "")
    assert found["teacher's video"][:2] == ("WARN", "swin3d_micro with random weights")
    assert found["student's video"][:2] == ("PASS", "swin3d_micro, from scratch")
    if not torch.cuda.is_available():
        assert found["GPU"][0] == "WARN"


def test_clip_whose_last_frame_is_broken_is_found_though_its_file_opens(doctor, tmp_path):
    """The last pictures of the film are overwritten; its header, which lies behind them, is whole."""
    film = tmp_path / "videos" / "clip_0003.mp4"
    data = bytearray(film.read_bytes())
    at = data.index(b"mdat")
    size = int.from_bytes(data[at - 4 : at], "big")
    data[at + size // 2 : at + size - 8] = bytes(size - 8 - size // 2)
    film.write_bytes(data)
    found = doctor()
    assert found["files"][0] == "PASS"
    assert found["frames"][0] == "FAIL"
    assert found["frames"][1].startswith("clip_0003: video from ")
    assert "clip_0003.mp4" in found["frames"][1]


def test_missing_file_bad_row_and_unknown_label_are_named(doctor, tmp_path):
    (tmp_path / "videos" / "clip_0002.mp4").unlink()
    lines = (tmp_path / "clips.csv").read_text().splitlines()
    (tmp_path / "clips.csv").write_text("\n".join([*lines, lines[1]]) + "\n")
    found = doctor("--clips", "3")
    assert found["table"][0] == "FAIL"
    assert "is taken by line 2" in found["table"][1]
    assert found["files"][0] == "FAIL"
    assert "clip_0002.mp4: no such file" in found["files"][1]
    assert found["frames"][:2] == ("PASS", "first, middle and last of 3 clips decode")


def test_table_without_anything_to_validate_on_fails_and_the_rest_is_still_looked_at(doctor, tmp_path):
    text = (tmp_path / "clips.csv").read_text()
    (tmp_path / "clips.csv").write_text(text.replace(",val,", ",train,"))
    found = doctor()
    assert found["table"][0] == "FAIL"
    assert "no clip of split 'val'" in found["table"][1]
    assert "student's audio" in found


@pytest.mark.parametrize(
    ("assigned", "check", "says"),
    [
        ("extract.video.weights=none.pt", "teacher's video", "no such"),
        ("extract.video.weights=broken.pt", "teacher's video", "broken.pt"),
        ("student.video.name=swin3d_x", "student's video", "Unknown backbone 'swin3d_x'"),
        ("student.audio.name=swin3d_micro", "student's audio", ""),
    ],
)
def test_backbones_are_built_with_their_weights(doctor, tmp_path, assigned, check, says):
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    verdict, found, step = doctor("--clips", "1", "--set", assigned)[check]
    if says:
        assert verdict == "FAIL"
        assert says in found
        assert check.split("'")[0] in ("teacher", "student")
        assert step.startswith("correct [")
    else:
        assert verdict == "PASS"


def test_disk_that_is_too_small_fails_and_a_scarce_one_warns(doctor, monkeypatch):
    usage = shutil.disk_usage(".")
    needed = float(doctor("--clips", "1")["disk"][1].split(" GB")[0])
    assert needed < 0.01
    for decoded_gb, verdict in ((usage.free / 1e9 / 1.1, "WARN"), (usage.free / 1e9 * 1.1, "FAIL")):
        found = doctor("--clips", "1", "--set", f"student.decoded_gb={decoded_gb}")
        assert found["disk"][0] == verdict


def test_disk_counts_what_is_there_of_tokens_and_of_decoded_clips_alone(doctor, tmp_path):
    def needed():
        return float(doctor("--clips", "1", "--set", "student.decoded_gb=0.5")["disk"][1].split(" GB")[0])

    before = needed()
    for name, n_bytes in (("cache/clips.parquet", 10**8), ("inputs/video/1.npy", 2 * 10**8)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        with open(tmp_path / name, "wb") as file:
            file.truncate(n_bytes)
    assert needed() == pytest.approx(before - 0.2)


def test_missing_codec_and_old_package_are_named(doctor, monkeypatch):
    monkeypatch.setattr(check_module, "CODECS", ("h264", "cinepak2000"))
    monkeypatch.setattr(module, "requires", lambda name: ["torch>=99", "karmma-none>=1", 'gradio>=5; extra == "app"'])
    found = doctor("--clips", "1")
    assert found["codecs"][:2] == ("WARN", "not decoded here: cinepak2000")
    assert found["environment"][0] == "FAIL"
    assert "torch 2" in found["environment"][1]
    assert "no karmma-none" in found["environment"][1]
    assert "gradio" not in found["environment"][1]


def test_package_that_is_on_the_path_but_not_installed_is_a_warning(doctor, monkeypatch):
    def no_package(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(module, "requires", no_package)
    assert doctor("--clips", "1")["environment"][0] == "WARN"


def test_without_a_table_the_machine_alone_is_looked_at(tmp_path, monkeypatch, give):
    monkeypatch.chdir(tmp_path)
    code, out, _ = give("doctor", "--json", "--preset", "tiny")
    found = {one["check"]: one for one in json.loads(out)["findings"]}
    assert code == 0
    assert found["clips"]["verdict"] == "WARN"
    assert found["clips"]["step"].startswith("karmma init")
