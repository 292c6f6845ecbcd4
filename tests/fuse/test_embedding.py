import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.fuse.embedding import STRATEGIES, Embedding

WIDTHS = {"video": 2, "audio": 3}
COUNTS = {"video": 3, "audio": 2}


def _wave(*shape, start=0):
    n = torch.Size(shape).numel()
    return torch.sin(torch.arange(start, start + n, dtype=torch.float32) * 0.7).reshape(shape)


def _embedding(missing):
    """An embedding of width 2 with round learned tokens: video's c is 10, d_i 1, 2, 3; audio's c 20, d_i 4, 5."""
    layer = Embedding(WIDTHS, COUNTS, 2, missing)
    with torch.no_grad():
        for at, name in enumerate(layer.modalities):
            layer.project[name].weight.copy_(_wave(2, WIDTHS[name], start=at))
            layer.project[name].bias.fill_(0.5)
        for name, value in zip(("video", "audio"), (10.0, 20.0), strict=True):
            if name in layer.modality_token:
                layer.modality_token[name].fill_(value)
        for name, values in zip(("video", "audio"), ([1.0, 2.0, 3.0], [4.0, 5.0]), strict=True):
            if name in layer.token_tokens:
                layer.token_tokens[name].copy_(torch.tensor(values)[:, None])
    return layer


def _batch(n_clips=2):
    return {"video": _wave(n_clips, 3, 2), "audio": _wave(n_clips, 2, 3, start=5)}


ADDED = {  # what is added to video's three tokens where it is available
    "ignore": [0, 0, 0],
    "B.1": [10, 10, 10],
    "B.2": [10, 10, 10],
    "B.3": [1, 2, 3],
    "B.4": [0, 0, 0],
    "B.5": [11, 12, 13],
}
STANDS_IN = {  # what takes the place of video's tokens where it is missing
    "ignore": [],
    "B.1": [10],
    "B.2": [10, 10, 10],
    "B.3": [1, 2, 3],
    "B.4": [1, 2, 3],
    "B.5": [11, 12, 13],
}


@pytest.mark.parametrize("missing", STRATEGIES)
def test_embedding_of_available_modality_adds_the_tokens_of_its_equation(missing):
    layer, batch = _embedding(missing), _batch()
    embedded = layer(batch, torch.ones(2, 2, dtype=torch.bool))
    projected = batch["video"] @ layer.project["video"].weight.T + 0.5
    expected = projected + torch.tensor(ADDED[missing], dtype=torch.float32)[:, None]
    torch.testing.assert_close(embedded.tokens[:, :3], expected)
    assert embedded.counts == {"video": 3, "audio": 2}
    assert embedded.keep is None


@pytest.mark.parametrize("missing", STRATEGIES)
def test_embedding_of_modality_missing_everywhere_gives_its_stand_in(missing):
    layer = _embedding(missing)
    embedded = layer({"audio": _batch()["audio"]}, torch.tensor([[False, True], [False, True]]))
    expected = torch.tensor(STANDS_IN[missing], dtype=torch.float32)[:, None].expand(-1, 2)
    n_tokens = embedded.counts["video"]
    assert n_tokens == len(expected)
    assert embedded.tokens[1, :n_tokens].equal(expected)
    assert embedded.keep is None


@pytest.mark.parametrize("missing", STRATEGIES)
def test_embedding_of_mixed_batch_equals_each_clip_alone(missing):
    layer, batch = _embedding(missing), _batch(3)
    present = torch.tensor([[True, True], [False, True], [True, False]])
    together = layer(batch, present)
    for row in range(3):
        alone = layer({name: values[row : row + 1] for name, values in batch.items()}, present[row : row + 1])
        kept = together.tokens[row] if together.keep is None else together.tokens[row][together.keep[row]]
        torch.testing.assert_close(kept, alone.tokens[0])


@pytest.mark.parametrize("missing", ["B.2", "B.3", "B.4", "B.5"])
@pytest.mark.parametrize("present", [[True, True], [True, False], [False, True], [False, False]])
def test_token_count_does_not_change_when_a_modality_is_missing(missing, present):
    embedded = _embedding(missing)(_batch(), torch.tensor([present, present]))
    assert embedded.tokens.shape == (2, 5, 2)
    assert embedded.counts == COUNTS
    assert embedded.keep is None


@pytest.mark.parametrize(
    ("missing", "counts"), [("ignore", {"video": 0, "audio": 2}), ("B.1", {"video": 1, "audio": 2})]
)
def test_token_count_shrinks_where_the_equation_says_so(missing, counts):
    assert _embedding(missing)(_batch(), torch.tensor([[False, True]] * 2)).counts == counts


@pytest.mark.parametrize("missing", STRATEGIES)
def test_linear_of_absent_modality_gets_no_gradient_and_learned_tokens_do(missing):
    layer = _embedding(missing)
    layer(_batch(), torch.tensor([[False, True], [False, True]])).tokens.square().sum().backward()
    assert layer.project["video"].weight.grad is None
    assert layer.project["video"].bias.grad is None
    assert layer.project["audio"].weight.grad.abs().sum() > 0
    for tokens in (layer.modality_token, layer.token_tokens):
        if "video" in tokens:
            assert tokens["video"].grad.abs().min() > 0


def test_token_tokens_under_b4_learn_only_where_the_modality_is_missing():
    layer = _embedding("B.4")
    layer(_batch(), torch.tensor([[False, True], [True, True]])).tokens.square().sum().backward()
    assert layer.token_tokens["video"].grad.abs().min() > 0
    assert layer.token_tokens["audio"].grad is None


def test_embedding_of_half_precision_tokens_computes_in_the_weights_precision():
    batch = {name: values.half() for name, values in _batch().items()}
    present = torch.ones(2, 2, dtype=torch.bool)
    exact = _embedding("B.5")({name: values.float() for name, values in batch.items()}, present)
    assert _embedding("B.5")(batch, present).tokens.equal(exact.tokens)


@pytest.mark.parametrize("missing", ["ignore", "B.1"])
def test_embedding_without_tokens_per_place_takes_any_number_of_them(missing):
    batch = {"video": _wave(1, 7, 2), "audio": _wave(1, 1, 3)}
    assert _embedding(missing)(batch, torch.ones(1, 2, dtype=torch.bool)).counts == {"video": 7, "audio": 1}


def test_learned_tokens_start_small_and_cut():
    layer = Embedding({"video": 2}, {"video": 300}, 64, "B.5")
    assert layer.token_tokens["video"].std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.token_tokens["video"].mean().abs() < 1e-3


def test_embedding_orders_modalities_as_the_project_does():
    assert Embedding({"audio": 3, "video": 2}, COUNTS, 2, "ignore").modalities == ("video", "audio")


@pytest.mark.parametrize(
    ("present", "tokens", "message"),
    [
        (torch.ones(2, 3, dtype=torch.bool), {}, r"present is torch.bool \[2, 3\], expected torch.bool \[B, 2\]"),
        (torch.ones(2, 2), {}, r"present is torch.float32 \[2, 2\]"),
        (torch.tensor([[True, False]]), {"video": None}, "present has clips with video, but no tokens of video"),
        (torch.tensor([[True, True]]), {"video": torch.zeros(1, 3, 5)}, r"video are \[1, 3, 5\], expected \[1, 3, 2\]"),
        (torch.tensor([[True, True]]), {"audio": torch.zeros(1, 9, 3)}, r"audio are \[1, 9, 3\], expected \[1, 2, 3\]"),
        (torch.tensor([[True, True]]), {"flow": torch.zeros(1, 9, 3)}, "'flow' given to a model of video, audio"),
    ],
)
def test_embedding_of_input_that_does_not_fit_raises(present, tokens, message):
    batch = {name: values for name, values in (_batch(1) | tokens).items() if values is not None}
    with pytest.raises(ValueError, match=message):
        _embedding("B.5")(batch, present)


def test_embedding_of_unknown_strategy_raises_with_the_nearest():
    with pytest.raises(ConfigError, match=r"strategy 'B5'. Did you mean 'B.5'"):
        Embedding(WIDTHS, COUNTS, 2, "B5")


def test_embedding_of_different_modalities_in_widths_and_counts_raises():
    with pytest.raises(ConfigError, match="given for video, widths for audio, video"):
        Embedding(WIDTHS, {"video": 3}, 2, "B.5")
