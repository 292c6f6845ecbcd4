"""The device is chosen once, and one that is not there is refused in one line."""

import pytest
import torch
from karmma.data.device import choose_device
from karmma.data.errors import ConfigError


def test_auto_takes_cuda_where_there_is_one():
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("meta").type == "meta"


@pytest.mark.parametrize("name", ["foo", "cuda:99"])
def test_device_that_is_not_there_is_named(name):
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value).startswith(f"device = {name!r}: ")
    assert str(caught.value).endswith("Use auto or cpu.")
    assert "\n" not in str(caught.value)
