"""Ctrl-C is counted, whatever stderr is."""

import io
import os
import signal
import sys

from lorasweep.cli import main
from lorasweep.runner import interrupt


def test_interrupt_is_heard_where_stderr_is_no_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # as in a notebook
    with interrupt.heard() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.count == 1


def test_ui_says_how_its_port_is_given(capsys):
    assert main.main(["ui", "--port", "5001"]) == 1
    assert "--port: ui has no flags; it takes port=5001" in capsys.readouterr().err
