"""STLT checkpoints as its authors publish them: the right names and shapes, and the tokens that their network gives."""

import pytest
import torch
from karmma.data.errors import ConfigError
from karmma.data.tensors import read_tensors
from karmma.extract.backbones import build_backbone
from karmma.extract.layout import LayoutTransformer
from safetensors.torch import save_file
from torch import nn

T, N, WIDTH = 5, 3, 16


class Authors(nn.Module):
    """STLT with the module names of its authors, out of torch's own layers; `scores` as for Action Genome."""

    def __init__(self, n_categories, width=WIDTH, n_heads=2, n_spatial=2, n_temporal=3, n_positions=256):
        super().__init__()

        def encoder(n_layers):
            layer = nn.TransformerEncoderLayer(width, n_heads, 4 * width, 0.1, "gelu", batch_first=True)
            return layer, nn.TransformerEncoder(layer, n_layers, enable_nested_tensor=False)

        boxes = nn.Module()
        boxes.category_embeddings = nn.Embedding(n_categories, width, padding_idx=0)
        boxes.box_embedding, boxes.score_embeddings = nn.Linear(4, width), nn.Linear(1, width)
        boxes.layer_norm = nn.LayerNorm(width, eps=1e-12)
        spatial = nn.Module()
        spatial.category_box_embeddings = boxes
        spatial.encoder_layer, spatial.transformer = encoder(n_spatial)
        self.frames_embeddings = nn.Module()
        self.frames_embeddings.layout_embedding = spatial
        self.frames_embeddings.position_embeddings = nn.Embedding(n_positions, width)
        self.frames_embeddings.frame_type_embedding = nn.Embedding(5, width, padding_idx=0)
        self.frames_embeddings.layer_norm = nn.LayerNorm(width, eps=1e-12)
        self.frames_embeddings.register_buffer("position_ids", torch.arange(n_positions)[None])
        self.transformer = encoder(n_temporal)[1]

    def forward(self, boxes, categories, scores, frame_types):
        """boxes [F, n, 4], categories [F, n] (0 = padding), scores [F, n] or None, frame_types [F]; one clip."""
        spatial = self.frames_embeddings.layout_embedding
        embed = spatial.category_box_embeddings
        rows = embed.category_embeddings(categories) + embed.box_embedding(boxes)
        if scores is not None:
            rows = rows + embed.score_embeddings(scores[..., None])
        rows = spatial.transformer(embed.layer_norm(rows), src_key_padding_mask=categories == 0)
        places = self.frames_embeddings.position_embeddings.weight[: len(frame_types)]
        frames = rows[:, 0] + places + self.frames_embeddings.frame_type_embedding(frame_types)
        ahead = torch.ones(len(frames), len(frames), dtype=torch.bool).triu(1)
        return self.transformer(self.frames_embeddings.layer_norm(frames)[None], mask=ahead)[0]


# What the authors number, by data set: the frame's own box, a hand, an object; regular, empty and last frames.
SOMETHING = {"n_categories": 4, "frame": 3, "hand": 1, "object": 2, "types": (2, 3, 4)}
GENOME = {"n_categories": 38, "frame": 1, "hand": 37, "object": 5, "types": (1, 3, 2)}


def authors(numbers, **sizes):
    torch.manual_seed(0)
    network = Authors(numbers["n_categories"], **sizes).eval()
    objects = network.frames_embeddings.layout_embedding.category_box_embeddings.category_embeddings.weight
    if numbers is GENOME:  # all kinds of objects alike, so that any of them is their mean
        with torch.no_grad():
            objects[2:37] = objects[numbers["object"]].clone()
    return network


def detections():
    """One clip [1, T, N, 6]: frames of two boxes, one or three, and one of none."""
    x = (torch.arange(T * N * 6) * 0.7).sin().abs().view(1, T, N, 6)
    x[..., 5] = torch.tensor([[1, 2, 0], [1, 2, 2], [0, 0, 0], [2, 0, 0], [1, 1, 2]])
    return x


def as_authors(x, numbers, with_scores):
    """Return the inputs of the authors' network for one of our clips."""
    clip = torch.cat([x[0], torch.zeros(1, N, 6)])  # their last frame, which is for the clip
    boxes = torch.cat([torch.tensor([0.0, 0, 1, 1]).expand(T + 1, 1, 4), clip[..., :4]], dim=1)
    ids = torch.tensor([0, numbers["hand"], numbers["object"]])[clip[..., 5].long()]
    categories = torch.cat([torch.full((T + 1, 1), numbers["frame"]), ids], dim=1)
    scores = torch.cat([torch.ones(T + 1, 1), clip[..., 4]], dim=1) if with_scores else None
    regular, empty, last = numbers["types"]
    types = [regular if frame[:, 5].any() else empty for frame in x[0]] + [last]
    return boxes, categories, scores, torch.tensor(types)


def ours(state, tmp_path):
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, tmp_path / "stlt.safetensors")
    network = LayoutTransformer((T, N, 6), WIDTH, n_heads=2, n_spatial=2, n_temporal=3, dropout=0.1).eval()
    network.load_state_dict(network.fitted(read_tensors(tmp_path / "stlt.safetensors")))
    return network


@pytest.mark.parametrize("numbers", [SOMETHING, GENOME], ids=["something", "action_genome"])
@pytest.mark.parametrize("prefix", ["", "stlt_backbone.", "module.layout_branch."])
def test_checkpoint_of_the_authors_gives_the_tokens_of_their_network(numbers, prefix, tmp_path):
    theirs = authors(numbers)
    state = {prefix + name: tensor for name, tensor in theirs.state_dict().items()}
    state["prediction_head.fc2.weight"] = torch.ones(174, WIDTH)
    with torch.no_grad():
        wanted = theirs(*as_authors(detections(), numbers, with_scores=numbers is GENOME))
        found = ours(state, tmp_path)(detections())[0]
    assert found.shape == (T + 1, WIDTH)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_objects_of_action_genome_are_the_mean_of_its_kinds(tmp_path):
    torch.manual_seed(0)
    theirs = Authors(38)
    kinds = theirs.frames_embeddings.layout_embedding.category_box_embeddings.category_embeddings.weight
    torch.testing.assert_close(ours(theirs.state_dict(), tmp_path).category.weight[2], kinds[2:37].mean(0))


def test_checkpoint_from_before_scores_were_added_takes_none(tmp_path):
    state = {name: tensor for name, tensor in authors(SOMETHING).state_dict().items() if "score" not in name}
    network = ours(state, tmp_path)
    other = detections()
    other[..., 4] = 0.1
    assert torch.equal(network(other), network(detections()))


def test_published_stlt_of_twelve_layers_has_the_names_and_shapes_that_are_expected(tmp_path):
    with torch.device("meta"):
        theirs = Authors(38, width=768, n_heads=12, n_spatial=4, n_temporal=8).state_dict()
        wanted = build_backbone("stlt_12", "detections", (32, 8, 6))
        found = wanted.fitted(theirs)
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tensor.shape for name, tensor in wanted.state_dict().items()
    }


def test_our_own_stlt_file_is_taken_as_it_is(tmp_path):
    made = build_backbone("stlt_micro", "detections", (T, N, 6), seed=5)
    save_file(made.state_dict(), tmp_path / "own.safetensors")
    again = build_backbone("stlt_micro", "detections", (T, N, 6), str(tmp_path / "own.safetensors"))
    assert torch.equal(again.eval()(detections()), made.eval()(detections()))


def test_checkpoint_of_other_categories_says_what_is_expected(tmp_path):
    with pytest.raises(ConfigError, match=r"9 categories, expected 4 \(Something-Something\) or 38 \(Action Genome\)"):
        ours(Authors(9).state_dict(), tmp_path)


def test_checkpoint_of_other_types_of_frames_says_what_is_expected(tmp_path):
    state = Authors(4).state_dict()
    table = "frames_embeddings.frame_type_embedding.weight"
    with pytest.raises(ConfigError, match="4 types of frames, expected 5"):
        ours(state | {table: state[table][:4]}, tmp_path)
    del state[table]
    with pytest.raises(ConfigError, match=f"no {table}"):
        ours(state, tmp_path)
