"""What a sweep varies: how it is written, what is refused, and which settings come of it."""

import optuna
import pytest
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.fuse.config import TeacherConfig
from karmma.fuse.space import Space

DATA = DataConfig(frames=8)
CONFIG = TeacherConfig(epochs=7)


def space(**written):
    return Space(written, DATA, CONFIG)


def suggested(found, n=200):
    """Return what n random trials choose."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [found.suggest(study.ask()) for _ in range(n)]


def test_every_kind_of_dimension_gives_values_of_its_kind_within_its_bounds():
    found = suggested(
        space(max_lr="1e-4..1e-2,log", alpha="0.5, 0.7", batch_size="8..64,step=8", n_layers="1..4", tau="0.1..0.5")
    )
    assert all(1e-4 <= one["max_lr"] <= 1e-2 for one in found)
    # Half of what is drawn by its logarithm lies below the geometric mean.
    assert 70 < sum(one["max_lr"] < 1e-3 for one in found) < 130
    assert {one["alpha"] for one in found} == {"0.5", "0.7"}
    assert {one["batch_size"] for one in found} == {8, 16, 24, 32, 40, 48, 56, 64}
    assert {one["n_layers"] for one in found} == {1, 2, 3, 4}
    assert all(isinstance(one["tau"], float) and 0.1 <= one["tau"] <= 0.5 for one in found)


def test_settings_are_those_of_the_base_but_for_what_was_chosen():
    found = space(**{"modality": "video+audio,video", "theta": "none,2", "norm-first": "true,false"})
    chosen = {"modalities": "video+audio", "theta": "none", "norm_first": "true"}
    data, config = found.settings(chosen)
    assert data == DATA.model_copy(update={"modalities": ("video", "audio")})
    assert config == CONFIG.model_copy(update={"norm_first": True})
    assert found.settings(chosen | {"theta": "2"})[1].theta == 2


def test_grid_is_every_combination_once_and_batches_change_last():
    found = space(alpha="0.1,0.2", batch_size="4,8", tau="0.1,0.2,0.3")
    grid = found.grid()
    assert len(grid) == 12 == len({tuple(sorted(one.items())) for one in grid})
    assert [one["batch_size"] for one in grid] == ["4"] * 6 + ["8"] * 6


def test_grid_of_a_range_is_refused():
    with pytest.raises(ConfigError, match="tau is a range, and a grid needs values"):
        space(tau="0.1..0.3").grid()


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ({}, "Nothing to vary"),
        ({"max_rl": "1,2"}, "'max_rl' is no option that decides a result. Did you mean 'max_lr'?"),
        ({"device": "cpu,cuda"}, "'device' is no option that decides a result"),
        ({"cache": "a,b"}, "'cache' is no option that decides a result"),
        ({"alpha": ""}, "alpha=: expected values, each once"),
        ({"alpha": "0.5,0.5"}, "alpha=0.5,0.5: expected values, each once"),
        ({"alpha": "0.5,many"}, "sweep: teacher.alpha = 'many': Input should be a valid number"),
        ({"alpha": "-1,0.5"}, "sweep: teacher.alpha = '-1': Input should be greater than or equal to 0"),
        ({"tau": "0..1"}, "sweep: teacher.tau = '0': Input should be greater than 0"),
        ({"alpha": "0.7..0.5"}, "alpha=0.7..0.5: expected numbers, the lower one first"),
        ({"alpha": "0..1,log"}, "above 0 with log"),
        ({"alpha": "0.1..1,log,step=0.1"}, "log or a step, not both"),
        ({"alpha": "0.1..1,step=x"}, "alpha=0.1..1,step=x: expected numbers"),
        ({"n_layers": "1..4,step=1.5"}, "n_layers=1..4,step=1.5: expected numbers"),
        ({"missing": "B.1..B.3"}, "missing=B.1..B.3: expected numbers"),
        ({"norm_first": "false..true"}, "norm_first=false..true: expected numbers"),
        ({"modality": "video+smell"}, "data.modalities"),
        ({"theta": "1..none"}, "theta=1..none: expected numbers"),
        ({"alpha": "0.1..inf"}, "teacher.alpha = 'inf': Input should be a finite number"),
        ({"n_layers": "1..2,step=inf"}, "n_layers=1..2,step=inf: expected numbers"),
        ({"alpha": "0.5,0.50"}, "alpha=0.5,0.50: expected values, each once"),
        ({"max_lr": "1e-4,1e-3", "max-lr": "1e-3..1e-2"}, "an option is named twice"),
        ({"heads": "verb,noun"}, "heads cannot vary"),
        ({"holdout": "clips,videos"}, "holdout cannot vary"),
        ({"holdout-seed": "0..9"}, "holdout_seed cannot vary"),
        ({"prune": "true,false"}, "prune cannot vary"),
        ({"max_lr": "1e-6,1e-3"}, "max_lr is 1e-06, below min_lr, 1e-05"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(written, said):
    with pytest.raises(ConfigError) as refused:
        space(**written)
    assert said in str(refused.value)


def test_order_of_writing_decides_no_draw():
    assert suggested(space(alpha="0..1", tau="0.1..1"), 5) == suggested(space(tau="0.1..1", alpha="0..1"), 5)


def test_least_theta_is_known_beforehand():
    assert space(theta="none,300,100").thetas() == [300, 100]
    assert space(theta="100..300").thetas() == [100]
    assert space(alpha="0,1").thetas() == []
    assert Space({"alpha": "0,1"}, DATA, TeacherConfig(theta=5)).thetas() == [5]
