"""Signals that ask for an end are counted, whatever stderr is; only a second Ctrl-C ends at once."""

import io
import os
import pty
import signal
import sys

import pytest

from lorasweep.cli import main
from lorasweep.runner import interrupt


def test_interrupt_is_heard_where_stderr_is_no_file(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # as in a notebook
    with interrupt.heard() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupts.count == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1"])
def test_notice_of_an_end_is_heard_and_may_come_twice(name):
    """A closed terminal sends SIGHUP to its group, and so does the shell; a scheduler to a job and its steps."""
    with interrupt.heard() as interrupts:
        signal.raise_signal(getattr(signal, name))
        signal.raise_signal(getattr(signal, name))
        assert interrupts.count == 2


def test_nohup_stays_in_force(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupt.heard() as interrupts:
            signal.raise_signal(signal.SIGHUP)
            assert interrupts.count == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_after_a_terminal_was_closed_lines_go_nowhere(monkeypatch):
    outer, inner = pty.openpty()
    kept = os.dup(interrupt.STDOUT)
    os.dup2(inner, interrupt.STDOUT)
    os.close(inner)
    os.close(outer)  # from here on a write fails
    try:
        with interrupt.heard():
            signal.raise_signal(signal.SIGHUP)
        os.write(interrupt.STDOUT, b"said to nobody\n")
    finally:
        os.dup2(kept, interrupt.STDOUT)
        os.close(kept)


def test_submitits_signal_is_handed_on_once_all_is_saved(monkeypatch):
    order = []
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "local")
    before = signal.signal(signal.SIGUSR2, lambda *_: order.append("requeued"))
    try:
        with interrupt.heard() as interrupts:
            signal.raise_signal(signal.SIGUSR2)
            assert interrupts.count == 1
            order.append("saved")
        interrupt.hand_on()
        interrupt.hand_on()
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert order == ["saved", "requeued"]


def test_ui_says_how_its_port_is_given(capsys):
    assert main.main(["ui", "--port", "5001"]) == 1
    assert "--port: ui has no flags; it takes port=5001" in capsys.readouterr().err
