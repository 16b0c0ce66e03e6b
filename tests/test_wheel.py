"""The wheel holds all that a checkout has: built, installed into an environment of its own, run from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow

WHERE = """
import lorasweep, pathlib
home = pathlib.Path(lorasweep.__file__).parent
print(*sorted(str(p.relative_to(home)) for p in home.rglob("*") if p.is_file()), sep="\\n")
"""


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """Return the Python of a fresh environment with the wheel, which sees the other packages of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(folder), str(ROOT), cwd=folder)
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("building a wheel takes hatchling from a package index")
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("lorasweep-*.whl")
    venv.create(folder / "env")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    home = run(
        str(scripts / "python"), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder
    ).stdout.strip()
    target = ["--no-deps", "--no-index", "--target", home, str(wheel)]
    installed = run(sys.executable, "-m", "pip", "install", *target, cwd=folder)
    assert installed.returncode == 0, installed.stderr
    # Paths only: a checkout's own editable hook among them must not win over the wheel, which comes first.
    others = [p for p in sys.path if p.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (Path(home) / "others.pth").write_text("\n".join(others) + "\n")
    return scripts / "python"


def test_wheel_holds_configs_sweeps_and_the_parts_of_the_report(python, tmp_path):
    found = run(str(python), "-c", WHERE, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    files = set(found.stdout.split())
    wanted = {f"_data/{p.relative_to(ROOT)}" for top in ("conf", "sweeps") for p in (ROOT / top).rglob("*.yaml")}
    wanted |= {str(p.relative_to(ROOT / "lorasweep")) for p in (ROOT / "lorasweep").rglob("page.*")}
    assert {"page.css", "page.js"} <= {Path(w).name for w in wanted}
    assert wanted <= files
    assert "env" in run(str(python), "-c", "import lorasweep; print(lorasweep.__file__)", cwd=tmp_path).stdout


def test_installed_wheel_checks_a_sweep_from_another_folder(python, tmp_path):
    for words in (["lora.r=4"], ["--sweep", "rank"]):
        done = run(str(python), "-m", "lorasweep", "check", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "trainable" in done.stdout
