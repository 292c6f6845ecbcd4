"""Names in the checkpoints of other projects, as the names that our backbones have."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from ..data.errors import ConfigError

# Video Swin's authors name stages `layers`, with the merging of patches inside; torchvision counts both as `features`.
BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
MLP = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}

# STLT's authors' layers are torch's own; the modules before them have long names.
STLT_LAYER = re.compile(r"(?:frames_embeddings\.layout_embedding\.)?transformer\.layers\.(\d+)\.(.+)")
STLT_WORDS = {
    "self_attn.in_proj_": "qkv.",
    "self_attn.out_proj": "proj",
    "linear1": "ffn.0",
    "linear2": "ffn.3",
    "norm1": "norm_attention",
    "norm2": "norm_ffn",
    "frames_embeddings.layout_embedding.category_box_embeddings.box_embedding": "box",
    "frames_embeddings.layout_embedding.category_box_embeddings.score_embeddings": "score",
    "frames_embeddings.layout_embedding.category_box_embeddings.layer_norm": "norm_boxes",
    "frames_embeddings.layer_norm": "norm_frames",
}
STLT_TABLES = {
    "category": "frames_embeddings.layout_embedding.category_box_embeddings.category_embeddings.weight",
    "position": "frames_embeddings.position_embeddings.weight",
    "frame_kind": "frames_embeddings.frame_type_embedding.weight",
}
# In the modules of the authors, but no part of what they compute: a layer that the others are copied from, an index.
STLT_UNUSED = (
    "frames_embeddings.layout_embedding.encoder_layer.",
    "frames_embeddings.position_ids",
    "prediction_head.",
)


def torchvision_names(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors of a Video Swin checkpoint under torchvision's names.

    One with the authors' names (github SwinTransformer/Video-Swin-Transformer, and mmaction2) is translated, any other
    comes back as it is.  Classification heads and index buffers, which follow from the sizes, are left out.
    """
    bare = {name.removeprefix("module.").removeprefix("backbone."): tensor for name, tensor in state.items()}
    if not any(BLOCK.match(name) for name in bare):
        return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
    heads = ("cls_head.", "head.")
    kept = {name: tensor for name, tensor in bare.items() if not name.startswith(heads)}
    return {_renamed(name): tensor for name, tensor in kept.items() if not name.endswith("relative_position_index")}


def _renamed(name: str) -> str:
    if found := BLOCK.fullmatch(name):
        stage, block, rest = found.groups()
        for theirs, ours in MLP.items():
            rest = rest.replace(theirs, ours)
        return f"features.{2 * int(stage)}.{block}.{rest}"
    if found := MERGING.fullmatch(name):
        return f"features.{2 * int(found[1]) + 1}.{found[2]}"
    return name


def stlt_names(state: Mapping[str, Tensor], n_positions: int) -> Mapping[str, Tensor]:
    """Return the tensors of an STLT checkpoint under the names of `LayoutTransformer`.

    One with the authors' names (github gorjanradevski/revisiting-spatial-temporal-layouts) is translated, any other
    comes back as it is.  n_positions: frames and the clip; the first so many of the checkpoint's positions are taken.
    Raises ConfigError if its categories are neither Something-Something's nor Action Genome's.
    """
    prefixes = [name.removesuffix(STLT_TABLES["position"]) for name in state if name.endswith(STLT_TABLES["position"])]
    if not prefixes:
        return state
    bare = {name.removeprefix(prefixes[0]): tensor for name, tensor in state.items() if name.startswith(prefixes[0])}
    for name in STLT_TABLES.values():
        if name not in bare:
            raise ConfigError(f"STLT checkpoint: no {name}. Choose one that its authors' code wrote.")
    tables = {ours: bare.pop(theirs) for ours, theirs in STLT_TABLES.items()}
    category, frame_kind, has_scores = _stlt_tables(tables["category"], tables["frame_kind"])
    out = {"category.weight": category, "frame_kind": frame_kind, "position": tables["position"][:n_positions]}
    for name, tensor in bare.items():
        if not name.startswith(STLT_UNUSED):
            out[_stlt_renamed(name)] = tensor
    if not has_scores:
        width = category.shape[1]
        out |= {"score.weight": category.new_zeros(width, 1), "score.bias": category.new_zeros(width)}
    return out


def _stlt_tables(category: Tensor, frame_type: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Return the rows for our categories [4, D] and kinds of frames [3, D], and whether the scores were trained on.

    Something-Something has our categories, in our order, and leaves scores out.  Action Genome names 35 kinds of
    objects and persons: a hand is a person there, an object the mean of them all; the paper does not say.
    """
    if len(frame_type) != 5:
        raise ConfigError(f"STLT checkpoint: {len(frame_type)} types of frames, expected 5. Choose another.")
    if len(category) == 4:  # padding, hand, object, frame
        return category, frame_type[[2, 3, 4]], False
    if len(category) == 38:  # padding, frame, 35 objects, person
        rows = category[0], category[37], category[2:37].mean(0), category[1]
        return torch.stack(rows), frame_type[[1, 3, 2]], True
    raise ConfigError(
        f"STLT checkpoint: {len(category)} categories, expected 4 (Something-Something) or 38 (Action Genome). "
        "Choose one of these."
    )


def _stlt_renamed(name: str) -> str:
    if found := STLT_LAYER.fullmatch(name):
        part = "spatial" if name.startswith("frames_embeddings") else "temporal"
        name = f"{part}.{found[1]}.{found[2]}"
    for theirs, ours in STLT_WORDS.items():
        name = name.replace(theirs, ours)
    return name
