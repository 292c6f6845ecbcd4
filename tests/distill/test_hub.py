"""A student as a shared folder: the same logits bit by bit, a card filled in from the run, and no pickle accepted."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from karmma.data.errors import ConfigError, ExportError, RunError
from karmma.data.noise import noise
from karmma.distill import hub
from karmma.distill.hub import StudentHub, save_student
from karmma.distill.results import Evaluation, SubsetRow
from karmma.distill.student import load_student

HEADS = {"verb": 4, "noun": 6}
PRESENT = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
FILES = {"README.md", "config.json", "model.safetensors"}


@pytest.fixture
def run(write_student_run, data, config):
    """A finished and evaluated run of a student of sound and boxes."""
    run = write_student_run(data, config.model_copy(update={"modalities": ("audio", "detections")}), HEADS)
    names = {"verb": 0.25, "noun": 0.125, "action": 0.0625}
    some = {**names, "noun": None}
    rows = [SubsetRow("all", subset, 8, 7, names, names, names, names, names) for subset in ("A+D", "A", "D")]
    rows.append(SubsetRow("tail", "A+D", 2, 1, some, some, some, some, some))
    evaluation = Evaluation(
        "student-made", "KARMMA_S", "v" * 16, "test", 1, 5, "c" * 16, names, tuple(rows), (), (), {},
        {"clip 9": "gone"}, "f" * 16,
    )  # fmt: skip
    evaluation.write(run.path / "evaluation" / "test", {})
    return run


def logits(student):
    backbones = getattr(student, "student", student).backbones
    inputs = {m: torch.from_numpy(noise(m, b.input_shape, 4)) for m, b in backbones.items()}
    with torch.no_grad():
        return student({m: x[PRESENT[:, at]] for at, (m, x) in enumerate(inputs.items())}, PRESENT).logits


def assert_same_bits(found, wanted):
    assert list(found) == list(wanted)
    for head, values in wanted.items():
        assert torch.equal(found[head], values)


def test_saved_and_loaded_student_gives_the_same_logits_bit_by_bit(run, tmp_path):
    wanted = logits(load_student(run, torch.device("cpu"))[0])
    first = StudentHub.of_run(run)
    assert_same_bits(logits(first), wanted)
    first.save_pretrained(tmp_path / "first")
    second = StudentHub.from_pretrained(tmp_path / "first")
    assert not second.training
    assert second.modalities == ("audio", "detections")
    assert second.classes == run.config["classes"]
    second.save_pretrained(tmp_path / "second")
    assert_same_bits(logits(StudentHub.from_pretrained(str(tmp_path / "second"))), wanted)
    for name in FILES:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_folder_holds_safetensors_config_and_card_and_names_no_clip(run):
    folder = save_student(run)
    assert folder == run.path / "hub"
    assert {path.name for path in folder.iterdir()} == FILES
    config = json.loads((folder / "config.json").read_text())
    assert {name: config[name] for name in run.config} == run.config
    assert b"clip 7" not in (folder / "config.json").read_bytes()
    assert b"clip 9" not in (folder / "config.json").read_bytes()


def test_card_is_filled_in_from_the_run(run, tmp_path):
    text = (save_student(run, tmp_path / "shared", "cc-by-nc-4.0") / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.library_name == "karmma"
    assert {"audio", "detections", "karmma"} <= set(card.data.tags)
    for said in (
        "# student-made",
        "any subset of audio, detections (A+D) and answers with 2 heads",
        "this one had no teacher",
        "\n\n| head | classes |",
        "| verb | 4 |\n| noun | 6 |\n\n| modality |",
        "| audio | ast_micro | float32 [4, 24, 32] |",
        "| detections | stlt_micro | float32 [4, 3, 6] |",
        "missing modality: B.5",
        "verb 50.0 %, noun 50.0 %, action -, loss 1.250.",
        "loss 1.250.\n\nTop-1 accuracy in percent on split `test`, 8 clips",
        "\n\n| subset | verb | noun | action | clips that have all of it |",
        "| A+D | 25.0 (25.0) | 12.5 (12.5) | 6.2 (6.2) | 7 |",
        "| commonest class | 25.0 | 12.5 | 6.2 |  |\n\n## How",
        "cc-by-nc-4.0, as stated by whoever exported it.",
        "Clip table `cccccccccccccccc`",
        'StudentHub.from_pretrained("path/or/name")',
        '"embed_dim": 16',
    ):
        assert said in text, said
    assert text.count("clip 7") == text.count("clip 9") == 0


def test_card_of_a_run_without_evaluation_or_licence_says_so(run, tmp_path):
    shutil.rmtree(run.path / "evaluation")
    text = (save_student(run, tmp_path / "shared") / "README.md").read_text()
    assert huggingface_hub.ModelCard(text).data.license == "unknown"
    assert "Not stated. Licences of the training data" in text
    assert "commonest class" not in text


def test_push_sends_exactly_the_folder(run, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            sent["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, **how):
            sent["files"] = {path.name for path in Path(folder_path).rglob("*") if path.is_file()}
            sent["logits"] = logits(StudentHub.from_pretrained(folder_path))
            sent["card"] = (Path(folder_path) / "README.md").read_text()
            return f"https://huggingface.co/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    student = StudentHub.of_run(run)
    assert student.push_to_hub("somebody/student", token="t").endswith("somebody/student/commit/1")
    assert sent["files"] == FILES
    assert sent["token"] == "t"
    assert_same_bits(sent["logits"], logits(student))
    assert 'from_pretrained("somebody/student")' in sent["card"]


def test_push_to_a_hub_that_is_not_there_is_one_line(run, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.hub_mixin.HfApi", lambda token: huggingface_hub.HfApi("http://127.0.0.1:9", "t")
    )
    with pytest.raises(ExportError, match=r"somebody/student: cannot be pushed: .*refused"):
        StudentHub.of_run(run).push_to_hub("somebody/student")
    with pytest.raises(ExportError, match="a b: cannot be pushed: "):
        StudentHub.of_run(run).push_to_hub("a b")


def test_student_on_the_hub_is_fetched_as_safetensors(run, tmp_path, monkeypatch):
    folder, asked = save_student(run), []

    def fetch(repo_id, filename, **how):
        asked.append((repo_id, filename, how["revision"]))
        return str(folder / filename)

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", fetch)
    monkeypatch.setattr(hub, "hf_hub_download", fetch)
    monkeypatch.chdir(tmp_path)
    found = StudentHub.from_pretrained("somebody/student", revision="v1")
    assert asked == [("somebody/student", name, "v1") for name in ("config.json", "model.safetensors")]
    assert_same_bits(logits(found), logits(StudentHub.of_run(run)))


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="somebody/student: no such folder, and no student of that name can be had"):
        StudentHub.from_pretrained("somebody/student", cache_dir=tmp_path)
    with pytest.raises(RunError, match="a b: no such folder, and no student of that name"):
        StudentHub.from_pretrained("a b")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "best.pth", "last.ckpt"])
def test_pickled_weights_are_refused_unread(run, name):
    folder = save_student(run)
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(RunError, match=rf"its weights are pickled \({name}\), which is never read"):
        StudentHub.from_pretrained(folder)


def test_folders_that_hold_no_student_are_said(run, tmp_path):
    folder = save_student(run, tmp_path / "shared")
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())

    def said(text, changed):
        (folder / "config.json").write_text(json.dumps(changed))
        with pytest.raises(RunError, match=text):
            StudentHub.from_pretrained(folder)

    said("a teacher's run, expected a student's", {**config, "kind": "teacher"})
    said("config.json is not that of a student of this version", {"model_type": "vit"})
    said("config.json is not that of a student of this version", [1])
    said("other labels: its weights are for .*verb 4.*names verb 3, noun 6", {
        **config, "classes": {**config["classes"], "verb": ["a", "b", "c"]},
    })  # fmt: skip
    said("other labels: its weights are for", {**config, "classes": {"action": ["a"]}})
    (folder / "config.json").write_text("{not json")
    with pytest.raises(RunError, match=r"config.json is damaged"):
        StudentHub.from_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:64])
    with pytest.raises(RunError, match=r"model.safetensors: damaged"):
        StudentHub.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(RunError, match=r"model.safetensors: no such weights file"):
        StudentHub.from_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(RunError, match=r"no student here \(no config.json\)"):
        StudentHub.from_pretrained(folder)
    for missing in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(RunError, match=r"no such folder. Name one that save_pretrained wrote"):
            StudentHub.from_pretrained(missing)


def test_other_labels_than_expected_are_named(run):
    folder, classes = save_student(run), run.config["classes"]
    assert StudentHub.from_pretrained(folder, classes=classes).classes == classes
    for expected, said in (
        ({"verb": classes["verb"]}, "its heads are verb, noun, expected verb"),
        ({**classes, "verb": ["verb 0", "take"]}, "verb: class 1 is 'verb 1', expected 'take'"),
        ({**classes, "noun": classes["noun"][:5]}, "noun: 6 classes, expected 5"),
    ):
        with pytest.raises(RunError, match=f"other labels: {said}"):
            StudentHub.from_pretrained(folder, classes=expected)


def test_folder_with_something_else_in_it_is_left_alone(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("mine")
    for path, stranger in (("mine", "thesis.tex"), ("file", "file")):
        with pytest.raises(ConfigError, match=rf"something else is there \({stranger}\)"):
            save_student(run, tmp_path / path)
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years"
    again = save_student(run, save_student(run, tmp_path / "shared"))
    assert {path.name for path in again.iterdir()} == FILES
