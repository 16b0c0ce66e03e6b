"""Data that have changed are read again, whatever their files' size and time say."""

import os
import shutil
from pathlib import Path

import datasets
import pytest

from lorasweep.config.spec import DataSpec
from lorasweep.data import dataset, readers

COLUMNS = {"text": "text", "label": "label"}


def lines(word: str) -> str:
    return "text,label\n" + "".join(f"{word} {i:02},{'ab'[i % 2]}\n" for i in range(40))


def put(path: Path, word: str) -> None:
    """Write a file anew, of the same size and time as before."""
    before = path.stat() if path.exists() else None
    if path.suffix == ".parquet":
        rows = [{"text": f"{word} {i:02}", "label": "ab"[i % 2]} for i in range(40)]
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(lines(word))
    if before is not None:
        assert path.stat().st_size == before.st_size
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def texts(spec: DataSpec, split: str = "train") -> set[str]:
    return {r["text"].split()[0] for r in dataset.load(spec, COLUMNS).splits[split]}


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
def test_file_of_the_same_size_and_time_is_read_again(name, tmp_path):
    put(tmp_path / name, "one")
    spec = DataSpec(source="auto", path=str(tmp_path / name))
    assert texts(spec) == {"one"}
    before = dataset.load(spec, COLUMNS)
    assert dataset.load(spec, COLUMNS) is before, "nothing is read twice"
    put(tmp_path / name, "two")
    assert texts(spec) == {"two"}
    assert dataset.load(spec, COLUMNS).fingerprint != before.fingerprint


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_one_of_several_parts_is_read_again(ending, tmp_path):
    for i in range(3):
        put(tmp_path / f"train-0000{i}-of-00003.{ending}", "one")
    spec = DataSpec(source="auto", path=str(tmp_path))
    assert texts(spec) == {"one"}
    put(tmp_path / f"train-00001-of-00003.{ending}", "two")
    assert texts(spec) == {"one", "two"}


@pytest.mark.parametrize("split", ["eval", "test"])
def test_change_of_another_split_alone_is_seen(split, tmp_path):
    for name in ("train", "eval", "test"):
        put(tmp_path / f"{name}.csv", "one")
    spec = DataSpec(source="csv", path=str(tmp_path / "train.csv"), eval_split="eval", test_split="test")
    before = dataset.load(spec, COLUMNS)
    put(tmp_path / f"{split}.csv", "two")
    after = dataset.load(spec, COLUMNS)
    assert texts(spec, split) == {"two"} and texts(spec) == {"one"}
    assert (before.eval_fingerprint != after.eval_fingerprint) == (split == "eval")


@pytest.mark.parametrize("of_folder", [False, True])
def test_link_that_shows_elsewhere_is_followed(of_folder, tmp_path):
    for word in ("one", "two"):
        (tmp_path / word).mkdir()
        put(tmp_path / word / "train.csv", word)
    shutil.copystat(tmp_path / "one" / "train.csv", tmp_path / "two" / "train.csv")
    link = tmp_path / ("data" if of_folder else "train.csv")
    inside = "" if of_folder else "train.csv"
    link.symlink_to(tmp_path / "one" / inside)
    spec = DataSpec(source="auto", path=str(link))
    assert texts(spec) == {"one"}
    link.unlink()
    link.symlink_to(tmp_path / "two" / inside)
    assert texts(spec) == {"two"}


def test_text_in_a_folder_of_a_class_is_read_again(tmp_path):
    for label in ("good", "bad"):
        (tmp_path / label).mkdir()
        for i in range(20):
            (tmp_path / label / f"{i}.txt").write_text(f"one {label} {i}")
    os.utime(tmp_path / "good" / "19.txt")  # the latest: another's time tells nothing
    spec = DataSpec(source="auto", path=str(tmp_path))
    assert texts(spec) == {"one"}
    before = (tmp_path / "bad" / "3.txt").stat()
    (tmp_path / "bad" / "3.txt").write_text("two bad 3")
    os.utime(tmp_path / "bad" / "3.txt", ns=(before.st_atime_ns, before.st_mtime_ns))
    found = dataset.load(spec, COLUMNS)
    assert any(r["text"].startswith("two") for rows in found.splits.values() for r in rows)


def test_hub_data_set_of_another_commit_is_read_again(monkeypatch):
    """The hub is a stand-in."""
    now = {"commit": "a", "word": "one"}

    def load_dataset(path, config, split, revision):
        rows = [{"text": f"{now['word']} {i}", "label": "ab"[i % 2]} for i in range(40)]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(readers, "hub_commit", lambda spec: now["commit"])
    spec = DataSpec(source="hub", path="somebody/something")
    assert texts(spec) == {"one"}
    now |= {"commit": "b", "word": "two"}
    assert texts(spec) == {"two"}
