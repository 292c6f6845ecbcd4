"""What every backbone promises: one modality's raw batch in, tokens out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from ..data.errors import ConfigError


class Backbone(nn.Module, ABC):
    """A unimodal feature extractor that owns its normalisation, its layout changes and its input size.

    input_shape: the shape of one clip's array.  n_tokens: K.  width: D.
    clip_token: whether one of the tokens stands for the whole clip, beside those of its parts; None: no choice.
    """

    clip_token: bool | None = None

    def __init__(self, input_shape: tuple[int, ...], n_tokens: int, width: int) -> None:
        super().__init__()
        self.input_shape = tuple(input_shape)
        self.n_tokens = n_tokens
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        """Turn a raw batch [B, *input_shape] into tokens [B, K, D]; raise ConfigError on any other shape."""
        if tuple(x.shape[1:]) != self.input_shape:
            raise ConfigError(
                f"{type(self).__name__}: this backbone was built for clips of shape {list(self.input_shape)}, "
                f"got {list(x.shape[1:])}. Build it for the shape that the data has."
            )
        return self.tokens(x)

    def choose_clip_token(self, wanted: bool) -> None:
        """Give a token for the whole clip, or none; raise ConfigError if this backbone leaves no choice."""
        if self.clip_token is None:
            raise ConfigError(f"{type(self).__name__}: clip_token cannot be chosen for this backbone. Leave it out.")
        self.n_tokens += wanted - self.clip_token
        self.clip_token = wanted

    def fitted(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return a checkpoint's tensors under the names of this module; by default all but a classification head's."""
        return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}

    @abstractmethod
    def tokens(self, x: Tensor) -> Tensor:
        """Compute the tokens of a raw batch of the right shape; every backbone has its own."""
