"""Settings: every default has a source; layers, paths and errors."""

from pathlib import Path

import pytest
from karmma.cli_options import SECTIONS
from karmma.data.config import DataConfig, digest
from karmma.data.errors import ConfigError
from karmma.data.settings import assigned, read_preset, read_toml, resolve, rooted, write_toml
from karmma.distill.config import StudentConfig
from karmma.extract.config import ExtractConfig
from karmma.fuse.config import TeacherConfig

# design.md section 5, the paper's sec. 4.
PAPER = {
    TeacherConfig: {
        "embed_dim": 768, "n_layers": 2, "n_attention_heads": 8, "attention_dropout": 0.3, "batch_size": 32,
        "weight_decay": 0.05, "clip_norm": 1.0, "min_lr": 1e-5, "max_lr": 5e-4, "warmup_epochs": 10, "epochs": 100,
        "alpha": 0.7, "beta": 0.3, "tau": 0.1, "missing": "ignore",
    },
    StudentConfig: {
        "embed_dim": 384, "n_layers": 1, "n_attention_heads": 8, "attention_dropout": 0.0, "batch_size": 6,
        "weight_decay": 0.01, "clip_norm": 2.0, "min_lr": 1e-5, "max_lr": 1e-4, "warmup_epochs": 10, "epochs": 100,
        "gamma": 0.7, "kl_lambda": 0.3, "modality_dropout": 0.5, "missing": "B.5", "theta": 300,
    },
    ExtractConfig: {"theta": 300},
    DataConfig: {"frames": 32, "size": 224, "audio_rate": 16000, "audio_hop": 80, "audio_mels": 128},
}  # fmt: skip


@pytest.mark.parametrize("model", SECTIONS.values())
def test_every_default_says_where_it_comes_from(model):
    for name, field in model.model_fields.items():
        source = (field.json_schema_extra or {}).get("source", "")
        assert source.startswith(("paper, ", "ours: ")), name
        assert len(source) > len("paper, "), name
        assert field.description, name


@pytest.mark.parametrize("model", PAPER)
def test_paper_preset_has_every_value_of_the_paper(model):
    section = next(name for name, known in SECTIONS.items() if known is model)
    found = resolve(SECTIONS, ("preset paper", read_preset("paper")))[section]
    assert {name: getattr(found, name) for name in PAPER[model]} == PAPER[model]


def test_paper_preset_has_the_paper_backbones():
    found = resolve(SECTIONS, ("preset paper", read_preset("paper")))
    teacher = {name: getattr(found["extract"], name).name for name in ("video", "flow", "audio", "detections")}
    student = {name: getattr(found["student"], name).name for name in ("video", "flow", "audio", "detections")}
    assert teacher == {"video": "swin3d_b", "flow": "swin3d_b", "audio": "swin3d_b", "detections": "stlt_12"}
    assert student == {"video": "swin3d_t", "flow": "swin3d_t", "audio": "ast_t", "detections": "stlt_9"}


def test_later_layer_wins_field_by_field():
    layers = ("a", {"data": {"frames": 8, "size": 64}}), ("b", {"data": {"size": "32"}})
    data = resolve(SECTIONS, *layers)["data"]
    assert (data.frames, data.size) == (8, 32)


def test_nested_assignment_replaces_one_name_only():
    layers = ("tiny", read_preset("tiny")), ("--set", assigned("extract.video.name=swin3d_s"))
    extract = resolve(SECTIONS, *layers)["extract"]
    assert (extract.video.name, extract.video.weights) == ("swin3d_s", "none")


def test_theta_none_keeps_all_tokens():
    assert resolve(SECTIONS, ("--set", assigned("extract.theta=none")))["extract"].theta is None


def test_all_errors_are_said_at_once_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        resolve(SECTIONS, ("k.toml", {"data": {"frmes": 8, "size": "big"}, "techer": {}}))
    text = str(caught.value)
    assert "k.toml: unknown option data.frmes. Did you mean 'frames'?" in text
    assert "data.size = 'big'" in text
    assert "unknown section [techer]. Did you mean 'teacher'?" in text


def test_unknown_modality_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown modality 'flwo'\. Did you mean 'flow'\?"):
        resolve(SECTIONS, ("option", {"data": {"modalities": ["flwo"]}}))


def test_unknown_preset_names_the_nearest():
    with pytest.raises(ConfigError, match=r"Unknown preset 'tinny'\. Did you mean 'tiny'\?"):
        read_preset("tinny")


def test_missing_and_malformed_settings_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no\.toml: no such settings file"):
        read_toml(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[data\n")
    with pytest.raises(ConfigError, match=r"bad\.toml: not a TOML file: .*line 1"):
        read_toml(tmp_path / "bad.toml")


def test_paths_in_a_settings_file_are_relative_to_it(tmp_path):
    (tmp_path / "w.safetensors").touch()
    (tmp_path / "whisper").mkdir()
    written = {
        "preset": "tiny",
        "data": {"table": "clips.csv", "cache": "s3://bucket/cache"},
        "extract": {
            "video": {"name": "swin3d_t", "weights": "w.safetensors"},
            "audio": {"name": "hf:whisper", "weights": "none"},
        },
    }
    found = rooted(written, tmp_path)
    assert found["data"]["table"] == str(tmp_path / "clips.csv")
    assert found["data"]["cache"] == "s3://bucket/cache"
    assert found["extract"]["video"] == {"name": "swin3d_t", "weights": str(tmp_path / "w.safetensors")}
    assert found["extract"]["audio"] == {"name": f"hf:{tmp_path / 'whisper'}", "weights": "none"}


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_written_settings_give_the_same_again_from_any_folder(tmp_path, monkeypatch, preset):
    """Paths are relative to where they were given, None is a word or left out, and every field is in the file."""
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    own = {
        "data": {"table": "clips.csv", "modalities": "audio", "crop_box": "0,0,4,4", "cache": "s3://bucket/cache"},
        "extract": {"theta": "none", "video": {"name": "swin3d_s", "weights": "weights.pth"}},
        "teacher": {"theta": "none", "tokens": {"audio": "0" * 16}},
    }
    sections = resolve(SECTIONS, (preset, read_preset(preset)), ("--set", own))
    write_toml(tmp_path / "written" / "all.toml", sections)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = resolve(SECTIONS, ("file", rooted(read_toml(tmp_path / "written" / "all.toml"), tmp_path / "written")))
    assert found["data"].table == tmp_path / "clips.csv"
    assert found["extract"].video.weights == str(tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    for name, section in sections.items():
        given, again = (rooted({name: each.model_dump(mode="json")}, tmp_path) for each in (section, found[name]))
        assert again == given


def test_assignment_without_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set teacher\.max_lr: expected section\.field=value"):
        assigned("teacher.max_lr")


def test_digest_does_not_depend_on_the_order_of_keys():
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def test_input_settings_name_what_the_modality_sees_and_no_more():
    data = DataConfig(table=Path("x.csv"))
    assert "audio_hop" in data.input_settings("audio")
    assert not {"size", "table", "heads", "modalities"} & set(data.input_settings("audio"))
    assert {"size", "flow_clamp_px", "crop_min"} <= set(data.input_settings("flow"))
    assert "flow_clamp_px" not in data.input_settings("video")


def test_names_may_be_a_list_or_a_text_with_commas():
    for value in (["audio", "video"], "audio,video", " audio , video "):
        assert resolve(SECTIONS, ("x", {"data": {"modalities": value}}))["data"].modalities == ("video", "audio")
    assert resolve(SECTIONS, ("x", {"data": {"heads": "verb"}}))["data"].heads == ("verb",)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ({"data": 3}, "k.toml: [data] must be a table, found 3."),
        ({"data": {"heads": ["loss"]}}, "a head cannot be called 'loss'"),
        ({"data": {"heads": ["a.b"]}}, "a head cannot be called 'a.b'"),
        ({"data": {"audio_steps": 100}}, "is 17856; they must agree within one hop, so set audio_steps to 223"),
        ({"data": {"frames": 1}}, "data.frames = 1"),
        ({"teacher": {"missing": "B.9"}}, "teacher.missing = 'B.9'"),
    ],
)
def test_value_that_does_not_fit_is_one_line(layer, said):
    with pytest.raises(ConfigError) as caught:
        resolve(SECTIONS, ("k.toml", layer))
    assert said in str(caught.value)
    assert ".." not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_preset_that_is_no_text_is_refused():
    with pytest.raises(ConfigError, match="Unknown preset 3"):
        read_preset(3)


def test_fields_that_do_not_fit_each_other_are_said_of_the_file_that_sets_them():
    layers = (("preset tiny", {"data": {"frames": 8}}), ("mine.toml", {"data": {"flow_method": "raft_small"}}))
    with pytest.raises(ConfigError, match=r"^mine\.toml: data: flow_method raft_small needs flow_weights"):
        resolve({"data": DataConfig}, *layers, ("option", {"data": {"size": 64}}))


def test_truth_is_no_number():
    with pytest.raises(ConfigError, match=r"mine\.toml: data\.crop_min = True: expected a value, not true or false\."):
        resolve({"data": DataConfig}, ("mine.toml", {"data": {"crop_min": True, "flip": True}}))
