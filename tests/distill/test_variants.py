"""What runs are called, and which are repetitions of each other."""

import pytest
from karmma.distill.config import StudentConfig
from karmma.distill.variants import label, variant


def described(teacher="t" * 16, modalities=("video", "flow", "audio"), **settings):
    config = StudentConfig(modalities=modalities, **settings)
    return {"kind": "student", "teacher": teacher, "settings": config.model_dump(mode="json"), "data": {}}


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (described(), "KARMMA_S"),
        (described(modalities=("video",)), "KARMMA_V"),
        (described("none", ("video",)), "Baseline V"),
        (described("none", variant="delta"), "Baseline w/ delta"),
        (described("none", variant="dropout"), "Baseline w/ mod. dropout"),
        (described("none", variant="baseline"), "Baseline"),
        (described("none", variant="delta", missing="B.2"), "Baseline w/ mod. dropout and Eq. (B.2)"),
        (described("none", modality_dropout=0.0), "Baseline w/ Eq. (B.5)"),
        (described(missing="B.1"), "KARMMA_S (B.1)"),
        (described(modality_dropout=0.0), "KARMMA_S (B.5, no dropout)"),
        ({"kind": "teacher"}, "KARMMA_T"),
    ],
)
def test_run_has_the_papers_name(run, name):
    assert label(run) == name


def test_runs_of_one_variant_differ_in_their_seed_alone():
    one = variant(described())
    assert variant(described(seed=7)) == one
    assert variant(described(max_lr=2e-4)) != one
    assert variant(described(teacher="u" * 16)) != one  # another teacher is another thing to learn from
