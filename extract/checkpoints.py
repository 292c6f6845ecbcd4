"""Names in the checkpoints of other projects, as the names that our backbones have."""

import re
from collections.abc import Mapping

from torch import Tensor

# Video Swin's authors name stages `layers`, with the merging of patches inside; torchvision counts both as `features`.
BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
MERGING = re.compile(r"layers\.(\d+)\.downsample\.(.+)")
MLP = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}


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
