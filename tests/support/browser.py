"""`python -m lorasweep ui` and Debian's chromium, for the tests and benchmarks that look at pages."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium")
ROWS = ".ag-row"
"""Rows of MLflow's table of runs."""


@contextmanager
def served(outputs: Path) -> Iterator[str]:
    """Yield the address at which `python -m lorasweep ui` serves the store of an outputs folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lorasweep", "ui", f"outputs={outputs}", f"port={port}"]
    log = outputs.parent / f"{outputs.name}.ui.log"
    with log.open("w") as file:
        ui = subprocess.Popen(command, start_new_session=True, stdout=file, stderr=file)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait(address, log)
        yield address
    finally:
        os.killpg(ui.pid, signal.SIGKILL)
        ui.wait()
        log.unlink()


def _wait(address: str, log: Path) -> None:
    for _ in range(300):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=1)
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"the UI does not answer:\n{log.read_text()}")


@contextmanager
def tab(**options: Any) -> Iterator[Any]:
    """Yield a new page of chromium; `options` are those of Playwright's new_context."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser.new_context(**options).new_page()
        browser.close()


def open_runs(page: Any, address: str) -> None:
    """Open the table of runs of the first experiment, and wait for its rows."""
    page.goto(f"{address}/#/experiments/1/runs")
    page.locator(ROWS).first.wait_for(timeout=60_000)


def close_panel(page: Any) -> None:
    """Close the assistant's panel, which stands over the table."""
    page.get_by_role("button", name="Close").first.click()


def expand(page: Any) -> None:
    """Open the first study of the table to its trials."""
    page.locator(f".ag-pinned-left-cols-container {ROWS}").first.locator("[col-id*='Run Name'] button").first.click()
