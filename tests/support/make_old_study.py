"""Makes tests/fixtures/study_of_7e88fe4.tar.gz: a study as an older lorasweep left it.

    PYTHONPATH=CHECKOUT_OF_7e88fe4 python -P tests/support/make_old_study.py FOLDER ARCHIVE

The base is a BERT with random weights and a vocabulary of its own. Trial 0 has finished, trial 1 is pruned, trial 2 is
interrupted with its checkpoint; MLflow's store holds all three; `old_model` is trial 0 as a pyfunc model, whose loader
is lorasweep.flavor.
"""

import csv
import json
import os
import platform
import shutil
import sqlite3
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import transformers

from lorasweep import cli, flavor, worker
from lorasweep.study import Study

NOUNS = ["socket", "tree", "file", "thread", "queue", "date"]
VERBS = ["open", "parse", "read", "start", "close", "print"]
ROWS = {"train": 48, "eval": 16, "test": 16}


def base(folder: Path) -> None:
    """Save the encoder and its tokenizer."""
    folder.mkdir(parents=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", *NOUNS, *VERBS]
    tokenizer = transformers.BertTokenizer(vocab={word: i for i, word in enumerate(words)})
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rows(folder: Path) -> None:
    """Write a table of sentences whose verb is the class."""
    folder.mkdir(parents=True)
    for split, count in ROWS.items():
        with (folder / f"{split}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["text", "label"])
            for i in range(count):
                table.writerow([f"{VERBS[i % 3]} the {NOUNS[(i * 5 + len(split)) % 6]}", VERBS[i % 3]])


def once(ready: Callable[[Study], bool], folder: Path, *words: str) -> threading.Thread:
    """Run a command as soon as `ready` holds of the study."""

    def wait() -> None:
        while not ((folder / "study.json").exists() and ready(Study.open(folder))):
            time.sleep(0.05)
        cli.main([*words])

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def begun(number: int) -> Callable[[Study], bool]:
    return lambda study: len(study.trials()) > number and bool(study.trials()[number].intermediate_values)


def _of_nobody(file: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leave out whose files these are."""
    file.uid = file.gid = 0
    file.uname = file.gname = ""
    return file


def main(place: Path, target: Path) -> None:
    os.chdir(place)
    base(place / "base")
    rows(place / "rows")
    worker.POLL_S = 0.05
    study = place / "outputs" / "s"
    threads = [once(begun(1), study, "stop", "s", "1"), once(begun(2), study, "stop", "s", "--all")]
    words = ["-m", "lora.r=2,4,8", f"model.pretrained={place / 'base'}", "model.sha256=null", "data=csv"]
    words += [f"data.path={place / 'rows'}", "data.eval_split=eval", "data.test_split=test"]
    words += ["data.max_tokens=16", "train.max_steps=300", "train.eval_every=20"]
    words += ["train.batch_size=8", "train.slots=1", "train.device=cpu", "train.learning_rate=1e-2", "study=s"]
    code = cli.main(words)
    for thread in threads:
        thread.join()
    states = [t.state.name for t in Study.open(study).trials()]
    assert (code, states) == (130, ["COMPLETE", "PRUNED", "WAITING"]), (code, states)
    flavor._save_pyfunc(study / "0", place / "old_model")
    shutil.rmtree(place / "outputs" / ".tokens", ignore_errors=True)
    with sqlite3.connect(place / "outputs" / "mlflow.db") as store:
        store.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it is in one file
    (place / "made.json").write_text(json.dumps({"folder": str(place)}))
    journal = study / "journal.log"
    journal.write_text(journal.read_text().replace(platform.node(), "another-machine"))
    with tarfile.open(target, "w:gz") as archive:
        for path in sorted(place.iterdir()):
            archive.add(path, path.name, filter=_of_nobody)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
