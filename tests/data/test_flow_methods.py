"""Methods of flow: each sees a known motion with the right sign and size; RAFT is torchvision's own."""

import cv2
import numpy as np
import pytest
import torch
from karmma.data.config import DataConfig
from karmma.data.errors import ConfigError
from karmma.data.flow_methods import flow_identity, flow_method
from safetensors.torch import save_file
from torchvision.models.optical_flow import raft_small


def drift(dx, dy, side=96):
    """Return a texture and the same moved dx to the right and dy down, uint8 [side, side]."""
    noise = np.random.default_rng(0).integers(0, 255, (side + 64, side + 64), np.uint8)
    ground = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX)
    moved = ground[32 - dy : 32 - dy + side, 32 - dx : 32 - dx + side]
    return ground[32 : 32 + side, 32 : 32 + side].copy(), moved.copy()


@pytest.mark.parametrize("name", ["dis", "farneback"])
@pytest.mark.parametrize(("dx", "dy"), [(2, 0), (-3, 1), (0, -2), (4, 4)])
def test_method_sees_a_motion_to_the_right_and_down(name, dx, dy):
    method = flow_method(DataConfig(flow_method=name))
    field = method.compute(*drift(dx, dy))
    assert method.form == "grey"
    assert field.dtype == np.float32
    assert np.median(field[12:-12, 12:-12], axis=(0, 1)) == pytest.approx([dx, dy], abs=0.25)


@pytest.mark.parametrize("name", ["dis", "farneback"])
def test_method_does_not_depend_on_the_number_of_threads(name):
    pair, fields = drift(3, 1), []
    for threads in (1, 2):
        cv2.setNumThreads(threads)
        fields.append(flow_method(DataConfig(flow_method=name)).compute(*pair))
    assert np.array_equal(*fields)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of random weights of the small RAFT."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("raft") / "raft_small.safetensors"
    save_file(raft_small(weights=None).state_dict(), path)
    return path


def test_raft_is_torchvisions_on_the_padded_pair(weights):
    one, two = (np.repeat(picture[:90, :, None], 3, 2) for picture in drift(2, 1, side=100))  # 90 x 100
    method = flow_method(DataConfig(flow_method="raft_small", flow_weights=weights))
    assert method.form == "rgb"
    field = method.compute(one, two)
    assert field.shape == (90, 100, 2)
    torch.manual_seed(0)
    model = raft_small(weights=None).eval()
    padded = [np.pad(picture, ((0, 38), (0, 28), (0, 0)), mode="edge") for picture in (one, two)]
    tensors = [torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255 * 2 - 1 for picture in padded]
    with torch.inference_mode():
        expected = model(*tensors)[-1][0].permute(1, 2, 0).numpy()[:90, :100]
    assert field == pytest.approx(expected, abs=1e-3)


def test_other_weights_are_refused_with_the_file_and_the_cause(tmp_path, weights):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_bytes(b"no weights")
    for name in ("other.safetensors", "text.pth", "none.safetensors"):
        with pytest.raises(ConfigError, match=rf"{name}: "):
            flow_method(DataConfig(flow_method="raft_small", flow_weights=tmp_path / name))
    with pytest.raises(ConfigError, match="not the weights of raft_large"):
        flow_method(DataConfig(flow_method="raft_large", flow_weights=weights))


def test_identity_knows_the_content_of_the_weights_and_not_their_path(tmp_path, weights):
    moved = tmp_path / "moved.safetensors"
    moved.write_bytes(weights.read_bytes())
    one, two = (flow_identity(DataConfig(flow_method="raft_small", flow_weights=path)) for path in (weights, moved))
    assert one == two
    moved.write_bytes(weights.read_bytes() + b" ")
    assert flow_identity(DataConfig(flow_method="raft_small", flow_weights=moved)) != one
    assert flow_identity(DataConfig()) == {}


def test_raft_without_weights_is_refused():
    with pytest.raises(ValueError, match="needs flow_weights"):
        DataConfig(flow_method="raft_small")
