"""Tiny random models on disk, and no hub."""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Hypothesis keeps files of its own even without a database: not in the checkout.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(Path(tempfile.gettempdir()) / "hypothesis"))

import pytest

pytest.register_assert_rewrite("support")

from support import models, parity
from support.double import double_precision

from lorasweep.packing import pass_cost
from lorasweep.study import significance
from lorasweep.tracking import mlflow_store

CLIENT = mlflow_store._client

TINY_MODELS = {"tiny_bert", "tiny_llama", "tied_llama", "tiny_t5"}
SERVERS = {"server", "guarded", "postgres", "dashboard"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give each test its level, unless it says its own: what it is given tells."""
    for item in items:
        given = set(item.fixturenames)
        if item.get_closest_marker("integration") or given & SERVERS:
            item.add_marker("integration")
        elif given & TINY_MODELS:
            item.add_marker("train")
        else:
            item.add_marker("unit")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an encoder of width 32."""
    return models.bert(tmp_path_factory.mktemp("tiny_bert"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Llama-shaped language model."""
    return models.llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one whose head is its word embedding."""
    return models.llama(tmp_path_factory.mktemp("tied_llama"), tie_word_embeddings=True)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a T5."""
    return models.t5(tmp_path_factory.mktemp("tiny_t5"))


@pytest.fixture
def always_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no clock decide who shares a pass."""
    monkeypatch.setattr(pass_cost, "overhead", lambda *a: float("inf"))


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Train in double precision."""
    monkeypatch.setattr(parity, "precision", "double")
    with double_precision():
        yield
        monkeypatch.undo()  # first what the test put over these patches: it would put them back later


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let many simulated studies be resampled in little time."""
    monkeypatch.setattr(significance, "RESAMPLES", 400)
    significance._weights.cache_clear()
    yield
    significance._weights.cache_clear()


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Return a function that makes an MLflow database without a run, once, and returns its path."""

    @cache
    def made() -> Path:
        path = tmp_path_factory.mktemp("empty") / "mlflow.db"
        mlflow_store.load()
        CLIENT(f"sqlite:///{path}").search_experiments()
        return path

    return made


@pytest.fixture(scope="session", autouse=True)
def quick_store(new_store: Callable[[], Path]) -> Iterator[None]:
    """Begin each new SQLite store as a copy, since to make one takes two seconds; commands that run in processes of
    their own still make theirs."""

    def client(uri: str) -> object:
        path = mlflow_store._sqlite_file(uri)
        if path is not None and path.parent.is_dir() and not path.exists():
            copy = Path(tempfile.mkdtemp(dir=new_store().parent)) / "mlflow.db"
            shutil.copy(new_store(), copy)
            with suppress(FileExistsError):  # another process was faster
                os.link(copy, path)
            shutil.rmtree(copy.parent)
        return CLIENT(uri)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mlflow_store, "_client", client)
        yield


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """Yield the URL of an empty database on a PostgreSQL 16 server of this test run."""
    pgserver = pytest.importorskip("pgserver", reason="pgserver has no wheel for this Python")
    # Not under pytest's folder: as root the server runs as another user, and pytest shuts that folder to others.
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    server = pgserver.get_server(folder, cleanup_mode="delete")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    restart = ["-w", "-m", "fast", "-l", str(folder / "log"), "-o", options, "restart"]
    pgserver.pg_ctl(restart, pgdata=folder, user=server.system_user, timeout=120)
    server.ensure_postgres_running()  # finds the restarted process, for cleanup to stop
    yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    server.cleanup()
