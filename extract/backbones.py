"""Backbones by name: built under a seed, filled from named or local weights, and told apart by a digest."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.models import WeightsEnum
from torchvision.models.video import Swin3D_B_Weights, Swin3D_S_Weights, Swin3D_T_Weights

from ..data.errors import ConfigError, nearest
from ..data.modality import MODALITIES, in_order
from ..data.tensors import read_tensors
from .backbone import Backbone
from .frames import build_frames, pretrained_frames
from .layout import LayoutTransformer
from .pretrained import build_pretrained
from .spectrogram import SpectrogramTransformer
from .video_swin import VideoSwin, swin_network
from .weights import plugged_in

__all__ = ["BACKBONES", "Backbone", "build_backbone"]

SHAPES = {"video": "[T, 3, H, W]", "flow": "[T, 3, H, W]", "audio": "[T, mels, steps]", "detections": "[T, n, 6]"}
SUFFIXES = (".safetensors", ".pth", ".pt")


Build = Callable[[str, tuple[int, ...]], Backbone]  # modality, input shape


@dataclass(frozen=True)
class Recipe:
    """How to build a backbone, for which modalities, and how to get the weights that have a name.

    named: name of weights -> how to fetch their tensors.  build_named: the same where they come with the backbone.
    """

    modalities: tuple[str, ...]
    build: Build
    named: Mapping[str, Callable[[], Mapping[str, Tensor]]] = field(default_factory=dict)
    build_named: Mapping[str, Build] = field(default_factory=dict)

    @property
    def weights(self) -> list[str]:
        """Names that weights may have, besides 'none' and files."""
        return [*self.named, *self.build_named]


def _swin(kinetics400: WeightsEnum | None = None, **sizes: Any) -> Recipe:
    def build(modality: str, input_shape: tuple[int, ...]) -> Backbone:
        return VideoSwin(swin_network(**sizes), modality, input_shape)

    named = {"kinetics400": lambda: fetched(kinetics400)} if kinetics400 else {}
    return Recipe(("video", "flow", "audio"), build, named)


def _ast(**sizes: Any) -> Recipe:
    return Recipe(("audio",), lambda modality, input_shape: SpectrogramTransformer(input_shape, **sizes))


def _stlt(n_spatial: int, n_temporal: int, width: int = 768, n_heads: int = 12, dropout: float = 0.1) -> Recipe:
    def build(modality: str, input_shape: tuple[int, ...]) -> Backbone:
        return LayoutTransformer(input_shape, width, n_heads, n_spatial, n_temporal, dropout)

    return Recipe(("detections",), build)


MICRO = {
    "embed_dim": 48,
    "depths": (2, 2),
    "num_heads": (3, 6),
    "window": (4, 3, 3),
    "mlp_ratio": 2.0,
    "stochastic_depth": 0.0,
}
BACKBONES: dict[str, Recipe] = {
    "swin3d_t": _swin(Swin3D_T_Weights.KINETICS400_V1, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin3d_s": _swin(Swin3D_S_Weights.KINETICS400_V1, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin3d_b": _swin(Swin3D_B_Weights.KINETICS400_V1, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
    # For clips of 8 x 48 x 48: things move by more than 4 pixels from frame to frame, so patches are 8 wide; windows
    # of 3 x 3 divide both stages, 6 x 6 and 3 x 3, so nothing is padded.
    "swin3d_micro": _swin(patch=(2, 8, 8), **MICRO),
    # The same for 84 x 84, whose patches are those of a teacher with DINOv2.
    "swin3d_micro_p14": _swin(patch=(2, 14, 14), **MICRO),
    "ast_t": _ast(width=192, depth=12, n_heads=3, patches=(16, 10)),
    # A pitch shows in the positions alone; at 0.02 so small a model takes hundreds of steps to notice them.
    "ast_micro": _ast(width=96, depth=3, n_heads=3, patches=(8, 6), position_std=0.5),
    "stlt_12": _stlt(n_spatial=4, n_temporal=8),
    # The paper says 9 layers and no more; 3 + 6 keeps the proportion of its authors' 4 + 8.
    "stlt_9": _stlt(n_spatial=3, n_temporal=6),
    "stlt_micro": _stlt(n_spatial=1, n_temporal=2, width=64, n_heads=4),
}


def build_backbone(
    name: str,
    modality: str,
    input_shape: tuple[int, ...],
    weights: str = "none",
    seed: int = 0,
    clip_token: bool | None = None,
) -> Backbone:
    """Build a backbone for clips of one shape.

    name: one of BACKBONES, timm:<model>, hf:<model>, or that of an entry point of the group `karmma.backbones`.
    input_shape: as in `DataConfig.input_shape`.  weights: "none" (random under `seed`; the global random state stays
    as it was), "kinetics400" (torchvision's), "pretrained" (timm's or the hub's own), or a local file .safetensors,
    .pth or .pt, with the names that the backbone's `fitted` knows.  clip_token: whether one of the tokens stands for
    the whole clip; None leaves it to the backbone.
    Raises ConfigError if name, modality, shape and weights do not exist or do not go together.
    """
    recipe = _recipe(name, modality, tuple(input_shape))
    state = _read_weights(name, recipe, weights)
    build = recipe.build_named.get(weights, recipe.build)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        backbone = build(modality, tuple(input_shape))
    if state is not None:
        _fill(backbone, state, f"weights {weights!r} for {name}")
    if clip_token is not None:
        backbone.choose_clip_token(clip_token)
    return backbone


def find_recipe(name: str) -> Recipe:
    """Return the recipe of a name; raises ConfigError with the nearest known one if there is none."""
    family, _, model = name.partition(":")
    if family == "timm" and model:
        pictures = ("video", "flow", "audio")
        named = {"pretrained": partial(pretrained_frames, model)}
        return Recipe(pictures, lambda *given: build_frames(model, *given), named)
    if family == "hf" and model:
        every = ("video", "flow", "audio")
        own = {"pretrained": partial(build_pretrained, model, with_weights=True)}
        return Recipe(every, partial(build_pretrained, model, with_weights=False), build_named=own)
    if name in BACKBONES:
        return BACKBONES[name]
    plugins = plugged_in()
    if name not in plugins.names:
        known = {*BACKBONES, *plugins.names, "timm:<model>", "hf:<model>"}
        raise ConfigError(f"Unknown backbone {name!r}. {nearest(name, known)}")
    return Recipe(MODALITIES, partial(_build_plugin, name, plugins[name].load()))


def _build_plugin(name: str, build: Build, modality: str, input_shape: tuple[int, ...]) -> Backbone:
    backbone = build(modality, input_shape)
    if not isinstance(backbone, Backbone):
        raise ConfigError(
            f"Backbone {name}: its entry point gives a {type(backbone).__name__}, expected a "
            "karmma.extract.backbone.Backbone. Derive the class from it."
        )
    return backbone


def _recipe(name: str, modality: str, input_shape: tuple[int, ...]) -> Recipe:
    """Look up a recipe and check that it takes this modality in this shape."""
    recipe = find_recipe(name)
    in_order([modality])
    if modality not in recipe.modalities:
        fit = ", ".join(other for other, its in BACKBONES.items() if modality in its.modalities)
        takes = ", ".join(recipe.modalities)
        raise ConfigError(f"Backbone {name} takes {takes}, not {modality}. For {modality} choose one of {fit}.")
    wanted = SHAPES[modality]
    named = dict(zip(wanted.strip("[]").split(", "), input_shape, strict=False))
    fixed = all(int(word) == size for word, size in named.items() if word.isdigit())
    if len(input_shape) != wanted.count(",") + 1 or min(input_shape) < 1 or not fixed:
        raise ConfigError(
            f"Backbone {name}: {modality} comes as {wanted}, not as {list(input_shape)}. Correct the shape."
        )
    return recipe


def _read_weights(name: str, recipe: Recipe, weights: str) -> Mapping[str, Tensor] | None:
    """Read a state dict from where `weights` says; None for random weights, and for those that come with the model."""
    if weights == "none" or weights in recipe.build_named:
        return None
    if weights in recipe.named:
        return recipe.named[weights]()
    path = Path(weights)
    if path.suffix not in SUFFIXES:
        of_this = " nor ".join(["none", *recipe.weights])
        having = ", ".join(other for other, its in BACKBONES.items() if weights in its.weights)
        if having:
            raise ConfigError(
                f"There are no {weights} weights for {name}, only for {having}. Set weights to none or to a file."
            )
        raise ConfigError(
            f"Unknown weights {weights!r} for {name}: neither {of_this} nor a file {', '.join(SUFFIXES)}."
        )
    return read_tensors(path)


def fetched(weights: WeightsEnum) -> Mapping[str, Tensor]:
    """Fetch torchvision's weights, or take them from its cache."""
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:  # no network; a download with another hash
        raise ConfigError(
            f"{weights.url}: cannot be fetched: {error}. Fetch it elsewhere and set weights to the file."
        ) from None


def _fill(backbone: Backbone, state: Mapping[str, Tensor], where: str) -> None:
    """Copy `state`, as the backbone fits it, into the backbone; every name and shape has to be there."""
    state = backbone.fitted(state)
    own = backbone.state_dict()
    misfits = [name for name in sorted(own.keys() & state.keys()) if own[name].shape != state[name].shape]
    wrong = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [f"{name}: {[*state[name].shape]}, not {[*own[name].shape]}" for name in misfits],
    }
    if any(wrong.values()):
        said = [f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in wrong.items() if names]
        raise ConfigError(f"{where}: {'; '.join(said)}. Choose the backbone and input size they were made for.")
    backbone.load_state_dict(state)
