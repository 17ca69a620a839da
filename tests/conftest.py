import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small are slower on two threads, and far slower on a busy machine


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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A saved model of random weights; a test that changes files copies it first."""
    import tiny

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), tiny.tokenizer()
    tiny.model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def reader(tiny_folder):
    """The saved model behind the verbs."""
    from medvlm.predictors import load

    return load(tiny_folder, "cpu")
