"""An `mlflow server` of a test's own, and what a run holds in it and in its folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow import MlflowClient

from lorasweep.tracking import outbox


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Server:
    """An `mlflow server` that can be killed and started again on its port."""

    def __init__(self, folder: Path, options: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> None:
        self.folder, self.port = folder, free_port()
        self.options, self.environment = options, environment or {}
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        store = f"sqlite:///{self.folder}/server.db"
        options = ["--backend-store-uri", store, "--artifacts-destination", str(self.folder / "artifacts")]
        options += ["--port", str(self.port), "--workers", "1", *self.options]
        command = [sys.executable, "-m", "mlflow", "server", *options]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        environment = {**os.environ, **quiet, **self.environment}
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=1)
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError((self.folder / "server.log").read_text())

    def kill(self) -> None:
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process = None


def remembered(folder: Path) -> outbox.Ledger:
    note = outbox.load(folder)
    assert note is not None
    return note


def in_file(folder: Path) -> Counter:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Counter((k, p["step"], v) for p in lines for k, v in p.items() if k not in ("step", "time_ms"))


def in_mlflow(uri: str, folder: Path) -> Counter:
    client, run_id = MlflowClient(uri), remembered(folder).run_id
    keys = client.get_run(run_id).data.metrics
    return Counter((k, m.step, m.value) for k in keys for m in client.get_metric_history(run_id, k))
