"""Submissions to EPIC-KITCHENS' challenge: the official form, every clip, nothing but scores."""

import json
import zipfile

import numpy as np
import pytest
import torch
from karmma.data.errors import ConfigError, RunError
from karmma.data.runs import RunFolder
from karmma.distill.challenge import require_submittable, write_submission
from karmma.distill.subsets import Predictions

IDS = np.array(["P01_11_0", "P01_11_1", "P02_12_0"])


@pytest.fixture
def found():
    logits = {"verb": torch.arange(6.0).view(2, 3), "noun": torch.arange(8.0).view(2, 4)}
    other = {head: -scores for head, scores in logits.items()}
    return Predictions(np.array([2, 0]), np.ones((2, 2), bool), {("video", "audio"): logits, ("video",): other})


def test_json_has_the_official_fields_and_the_scores_of_all_modalities(found, tmp_path):
    write_submission(tmp_path / "s.json", found, IDS, (1, 3, 4))
    said = json.loads((tmp_path / "s.json").read_text())
    assert {name: said[name] for name in said if name != "results"} == {
        "version": "0.2", "challenge": "action_recognition", "sls_pt": 1, "sls_tl": 3, "sls_td": 4,
    }  # fmt: skip
    assert set(said["results"]) == {"P02_12_0", "P01_11_0"}
    assert said["results"]["P01_11_0"] == {
        "verb": {"0": 3.0, "1": 4.0, "2": 5.0},
        "noun": {"0": 4.0, "1": 5.0, "2": 6.0, "3": 7.0},
    }


def test_zip_holds_it_as_test_json_and_is_the_same_each_time(found, tmp_path):
    for name in ("a.zip", "b.zip", "c.json"):
        write_submission(tmp_path / name, found, IDS)
    with zipfile.ZipFile(tmp_path / "a.zip") as file:
        assert file.namelist() == ["test.json"]
        assert file.read("test.json") == (tmp_path / "c.json").read_bytes()
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_run_of_other_classes_and_other_files_are_refused(tmp_path):
    run = RunFolder(tmp_path / "student-1")
    run.start({"classes": {"verb": ["a"], "word": ["b"]}})
    with pytest.raises(RunError, match="classes are verb 1, word 1, the challenge wants verb 97, noun 300"):
        require_submittable(run, tmp_path / "s.json")
    run.start({"classes": {"verb": ["v"] * 97, "noun": ["n"] * 300}})
    require_submittable(run, tmp_path / "s.zip")
    with pytest.raises(ConfigError, match=r"s\.csv: a submission ends in \.json or \.zip"):
        require_submittable(run, tmp_path / "s.csv")
