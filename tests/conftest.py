"""What tests in every room share: the real clips, where they are to be had."""

import os
from pathlib import Path

import pytest

BESIDE = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and weights; without it a test is skipped, or fails if KARMMA_SHARED is set."""
    named = os.environ.get("KARMMA_SHARED")
    folder = Path(named) if named else BESIDE
    if folder.is_dir():
        return folder.resolve()
    if named:
        pytest.fail(f"KARMMA_SHARED={named}: no such folder")
    pytest.skip("needs the folder ../shared")
