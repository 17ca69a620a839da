import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def shared_data() -> Path | None:
    """The folder of real data beside the project, or the one that MEDVLM_TEST_DATA names."""
    named = os.environ.get("MEDVLM_TEST_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    return folder if (folder / "README.md").is_file() else None


@pytest.fixture(scope="session")
def data() -> Path:
    folder = shared_data()
    if folder is None:
        pytest.skip("the shared data folder is not beside this checkout (set MEDVLM_TEST_DATA)")
    return folder
