"""The wheel: built from the checkout, installed apart from it, it composes and shows what its files hold."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = [pytest.mark.slow, pytest.mark.integration]


def ran(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> tuple[Path, str]:
    """Return the wheel and the Python of a fresh environment that has it."""
    place = tmp_path_factory.mktemp("wheel")
    venv.create(place / "venv", with_pip=True)
    python = str(place / "venv" / "bin" / "python")
    pip = [python, "-m", "pip", "-q"]
    made = ran([*pip, "wheel", "--no-deps", "-w", str(place), str(ROOT)], place)
    if made.returncode and "hatchling" in made.stderr and "Could not find" in made.stderr:
        pytest.skip("no package index, from which pip takes hatchling")
    assert made.returncode == 0, made.stderr
    found = next(place.glob("lorasweep-*.whl"))
    done = ran([*pip, "install", "--no-deps", "--no-index", str(found)], place)
    assert done.returncode == 0, done.stderr
    _lend_dependencies(place / "venv")
    return found, python


def _lend_dependencies(environment: Path) -> None:
    """Let the environment import what this one has, the checkout aside: a folder of links, behind its own packages."""
    lent = environment / "lent"
    lent.mkdir()
    folders = [Path(p) for p in sys.path if p.endswith("site-packages")]
    for source in (p for folder in folders for p in folder.iterdir()):
        if not source.name.startswith("lorasweep") and source.suffix != ".pth" and not (lent / source.name).exists():
            (lent / source.name).symlink_to(source)
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    (Path(site) / "lent.pth").write_text(str(lent))


def test_wheel_holds_what_lorasweep_reads(wheel):
    names = set(zipfile.ZipFile(wheel[0]).namelist())
    for folder in ("conf", "sweeps"):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*.yaml")}
        assert files
        assert {f"lorasweep/_data/{name}" for name in files} <= names
    ours = [p for part in ("lorasweep", "hydra_plugins") for p in (ROOT / part).rglob("*") if p.is_file()]
    assert {p.relative_to(ROOT).as_posix() for p in ours if "__pycache__" not in p.parts} <= names
    strange = ("tests/", "outputs/", "benchmarks/", ".venv/")
    assert [name for name in names if name.startswith(strange)] == []


def test_installed_wheel_checks_a_sweep_from_another_folder(wheel, tmp_path):
    _, python = wheel
    where = ran([python, "-c", "import lorasweep; print(lorasweep.__file__)"], tmp_path)
    assert "/venv/lib" in where.stdout, where.stderr
    assert ran([python, "-m", "lorasweep", "--help"], tmp_path).stdout.startswith("lorasweep: which rank")
    done = ran([python, "-m", "lorasweep", "check", "--sweep", "rank", "data.max_train_samples=50"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "lora.r" in done.stdout


def test_installed_wheel_runs_a_study_and_leaves_its_report(wheel, tiny_bert, tmp_path):
    _, python = wheel
    small = ["train.max_steps=2", "data.max_train_samples=32", "data.max_eval_samples=16", "study=s"]
    words = ["-m", "lora.r=2,4", f"model.pretrained={tiny_bert}", *small]
    done = ran([python, "-m", "lorasweep", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "<style>" in (tmp_path / "outputs" / "s" / "report.html").read_text()
