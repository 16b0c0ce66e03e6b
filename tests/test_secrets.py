"""A secret in whatever form, planted wherever a text goes in, comes out nowhere."""

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from html import escape
from json import dumps
from pathlib import Path
from unittest.mock import Mock
from urllib.parse import quote, quote_plus

import pytest

from lorasweep.cli import main, steering
from lorasweep.config.overrides import override_text
from lorasweep.credentials import database_url, redact, tracking_uri, without_password
from lorasweep.errors import ConfigError
from lorasweep.runner.request import Request
from lorasweep.tracking import runs

S = "Zq7Wv9Kx3Lm5Np1R"
"""Stands in every planted form."""
LONG = S + "tT2bB4cC6dD8"

FORMS = {
    "userinfo": f"https://me:{S}@host/x",
    "userinfo with @": f"https://me:a@{S}@host/x",
    "userinfo with /": f"https://me:a/{S}@host/x",
    "userinfo with both": f"https://me:{S}/b@c/{S}@host:80/x",
    "userinfo with ?": f"https://me:a?{S}@host/x",
    "userinfo with escapes": f"https://me:{S}%40%2F{S}@host/x",
    "userinfo that is a token": f"https://{S}@host/x",
    "userinfo with a digit first": f"postgresql://me:5432/{S}@host/db",
    "database": f"postgresql+psycopg://me:{S}@host/db",
    "database's query": f"postgresql://me@host/db?sslmode=require&password={S}",
    "one slash": f"https:/me:{S}@host/x",
    "token": f"https://host/x?token={S}",
    "sig": f"https://host/x?sv=1&sig={S}%3D&se=2",
    "signature": f"https://host/x?Signature={S}",
    "api_key": f"https://host/x?api_key={S}",
    "key": f"https://host/x?v=2&key={S}",
    "query's password": f"https://host/x?password={S}",
    "access_token": f"https://host/x#access_token={S}",
    "escaped query": f"https://host/go?to=https%3A%2F%2Fother%2F%3Ftoken%3D{S}",
    "amz credential": f"https://b.s3.amazonaws.com/k?X-Amz-Credential={S}%2F20240101",
    "amz signature": f"https://b.s3.amazonaws.com/k?X-Amz-Signature={S}&X-Amz-Security-Token={S}",
    "hugging face": f"hf_{LONG}",
    "openai": f"sk-{LONG}",
    "openai's project": f"sk-proj-{LONG}_{S}",
    "anthropic": f"sk-ant-api03-{LONG}-{S}",
    "github": f"ghp_{LONG}{S}",
    "github, fine": f"github_pat_{S}_{LONG}",
    "gitlab": f"glpat-{LONG}",
    "aws": "AKIA" + S.upper(),
    "slack": f"xoxb-123456-{LONG}",
    "google": f"AIza{LONG}{S}"[:39],
    "web token": f"eyJhbGciOi.{LONG}.{S}",
    "bearer": f"Authorization: Bearer {S}",
    "lone bearer": f"bearer {LONG}",
    "basic": f"Authorization: Basic {S}==",
    "header": f"X-Api-Key: {S}",
    "setting": f"password={S}",
    "connection string": f"host=db user=me password='{S} {S}' dbname=x",
    "shell": f"export HF_TOKEN={S}",
    "azure": f"AccountName=me;AccountKey={S}==;EndpointSuffix=x",
    "json": f'{{"password": "{S}"}}',
    "dict": f"{{'token': '{S}'}}",
    "yaml": f"client_secret: {S}",
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{S}\n{S}\n-----END RSA PRIVATE KEY-----",
}

HARMLESS = [
    "data.label_column=key",
    "data.text_column=token",
    "data.label_columns=[key,token,password]",
    "lora.target_modules=[query,key,value]",
    "lora.rank_pattern={key:4,value:8}",
    "-m lora.target_modules=key,value",
    "model.pretrained=some/task-abcdefghijklmnopqrstuvwxyz1",
    "model.pretrained=org/ask-me-anything-about-it-2024-v1",
    "model.pretrained=org/sk-learn-base-2024",
    "model.pretrained=hf_internal_testing/tiny",
    "data.path=/data/token/rows.csv",
    "data.path=/data/my_token=3/password=x/rows.csv",
    "data.path=tokens.jsonl",
    "tracking.uri=http://127.0.0.1:5000",
    "tracking.uri=http://host:5000/some@path",
    "tracking.uri=sqlite:////home/a@b/mlflow.db",
    "search.storage=postgresql://me@host/db",
    "search.question=Which key, token or password is the bearer of meaning?",
    "search.question=Is the bearer instrumentation of 2024 basic?",
    "the password must be in PGPASSWORD; tokens_per_s=123, max_tokens=64",
    "https://host/x?page=2&sort=name#part",
    "git@github.com:org/repo.git",
    "lora.r=8, train.seed=1, 0.8123 at step 12",
]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("around", ["{}", "401 for '{}' (see there)", "<td>{}</td>", '"{}",'])
def test_secret_of_any_form_is_hidden(form, around):
    assert S.lower() not in redact(around.format(form)).lower()


@pytest.mark.parametrize("written", [dumps, repr, escape, override_text])
def test_secret_within_a_quoted_text_is_hidden(written):
    text = written("\n".join(FORMS.values()))
    assert S.lower() not in redact(text).lower()


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_sounds_like_a_secret_stays(text):
    assert redact(text) == text


@pytest.mark.parametrize("text", HARMLESS[:17])
def test_harmless_settings_are_taken_as_they_are(text):
    word = text.removeprefix("-m ")
    assert [kept.replace("'", "") for kept in Request.of([word]).overrides] == [word]


NAMES = ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "PGPASSWORD", "SMTP_PASS", "CI_SECRET", "my_private_key"]


@pytest.mark.parametrize("name", [*NAMES, "DATABASE_URL"])
@pytest.mark.parametrize("value", ["Zq7Wv9Kx3 Lm5/Np1R=&<", "pä\"ss'Zq7Wv9Kx", "pa55wd"])
def test_secret_of_the_environment_is_hidden_however_it_is_written(name, value, monkeypatch):
    if name == "DATABASE_URL" and (value == "pa55wd" or '"' in value or " " in value):
        value = "Zq7Wv9Kx3Lm5"
    monkeypatch.setenv(name, f"postgresql://me:{value}@host/db" if name == "DATABASE_URL" else value)
    for text in (value, quote(value, safe=""), quote_plus(value), dumps(value), escape(value), repr(value)):
        assert redact(f"x {text} y").strip("xy '\"") == "***"


def test_variables_that_are_no_secrets_are_not_looked_for(monkeypatch):
    for name, value in {
        "PWD": "/home/me/work",
        "SSH_ASKPASS": "/usr/bin/ask",
        "MY_TOKEN": "ordinal",
        "KEY": "abc",
    }.items():
        monkeypatch.setenv(name, value)
    text = "/home/me/work /usr/bin/ask ordinal abc"
    assert redact(text) == text


# --- the door --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "kept", "password"),
    [
        ("postgresql://me:s%40cret@host/db", "postgresql://me@host/db", "s@cret"),
        ("postgresql://me:a@b@host/db", "postgresql://me@host/db", "a@b"),
        ("postgresql://me:a/b?c#d@host:5/db", "postgresql://me@host:5/db", "a/b?c#d"),
        ("postgresql://me:a,b{c}[d]@host/db", "postgresql://me@host/db", "a,b{c}[d]"),
        ("postgresql://me:5/6@host/db", "postgresql://me@host/db", "5/6"),
        ("postgresql://me@host/db?password=pw%21&sslmode=require", "postgresql://me@host/db?sslmode=require", "pw!"),
        ("postgresql://me%40there:pw@host/db?password=pw", "postgresql://me%40there@host/db", "pw"),
        ("postgresql://me@host/db", "postgresql://me@host/db", None),
    ],
)
def test_password_of_a_database_goes_into_the_environment(url, kept, password, monkeypatch):
    monkeypatch.delenv("PGPASSWORD", raising=False)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    for word in (f"search.storage={url}", f"search.storage='{url}'", f"tracking.uri={url}"):
        os.environ.pop("PGPASSWORD", None)
        assert Request.of([word]).overrides[0].split("=", 1)[1].strip("'") == kept
        assert os.environ.get("PGPASSWORD") == password
    assert (database_url(url), without_password(url)) == (kept, kept)


def test_password_of_a_server_goes_into_the_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert tracking_uri("http://me:a/b@c@host:5000/x") == "http://host:5000/x"
    assert (os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"]) == ("me", "a/b@c")


@pytest.mark.parametrize(
    "word",
    [
        f"tracking.uri=http://host/x?token={S}",
        f"tracking.uri=mysql://me:{S}@host/db",
        f"search.storage=postgresql://me@host/db?sslpassword={S}",
        f"data.path=https://me:{S}@host/x.csv",
        f"model.pretrained=some/hf_{LONG}",
        f"model.tokenizer='https://host/x?token={S}'",
        f"outputs=/tmp/glpat-{LONG}",
        f"study=hf_{LONG}",
        f"lora.target_modules=[query,hf_{LONG}]",
        f"data.text_column=a,hf_{LONG}",
        f"data.source_prefix='password={S}'",
        f"tracking.register=sk-{LONG}",
        f"search.enqueue=['lora.r=2 data.path=hf_{LONG}']",
        f"hydra.launcher.setup=['export HF_TOKEN={S}']",
        f"+hydra.launcher.ray.init._redis_password={S}",
        f"+hydra.job.env_set={{HF_TOKEN:{S}}}",
    ],
)
def test_setting_that_cannot_do_without_its_secret_is_refused(word, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(ConfigError) as refused:
        Request.of([word, "lora.r=4"])
    assert len(refused.value.problems) == 1
    assert word.lstrip("+").split("=")[0].split("{")[0] in str(refused.value)
    assert S not in str(refused.value)


def test_chat_template_is_no_secret():
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% set token='abc' %}{{ f(token=x, password='y') }}"
    )
    word = f"data.chat_template={override_text(template)}"
    assert Request.of([word]).overrides == [word]


def test_sweep_file_is_asked_at_the_same_door(tmp_path):
    file = tmp_path / "s.yaml"
    file.write_text(
        f"# Is hf_{LONG} good?\noverrides: ['model.pretrained=x']\nspace: {{data.path: ['a', 'hf_{LONG}']}}\n"
    )
    with pytest.raises(ConfigError, match=r"data\.path: holds what looks like a secret"):
        Request.of([], str(file))
    file.write_text(file.read_text().replace(f"'hf_{LONG}'", "'b'"))
    assert Request.of([], str(file)).question == "Is *** good?"


# --- a whole study ---------------------------------------------------------------------------------------------------

VARIABLES = {f"PLANTED_{i}_TOKEN": f"{S}-{i}/{'y' * 6}" for i in range(3)} | {"HF_TOKEN": f"hf_{LONG}"}


def study_words(tiny_bert: Path, outputs: Path) -> list[str]:
    question = " ".join([*FORMS.values(), *VARIABLES.values()]).replace("\n", " ")
    experiment = f"of {VARIABLES['PLANTED_0_TOKEN']} and {FORMS['hugging face']}"
    return [
        *("-m", f"model.pretrained={tiny_bert}", "train.max_steps=2", "train.eval_every=1", "lora.r=2,4"),
        *("data.max_train_samples=32", "data.max_eval_samples=16", f"outputs={outputs}", "study=s"),
        f"search.question={override_text(question)}",
        f"tracking.experiment={override_text(experiment)}",
    ]


def leaks(folder: Path) -> list[str]:
    """Return the files below a folder that hold the planted secret, as it is or in a row of SQLite."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    found = [str(p) for p in files if S.lower().encode() in p.read_bytes().lower()]
    for path in [p for p in files if p.suffix == ".db"]:
        with sqlite3.connect(path) as database:
            found += [f"{path}: {line}" for line in database.iterdump() if S.lower() in line.lower()]
    return found


def command_lines() -> list[bytes]:
    """Return the command lines of this user's other processes: workers are among them."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.parent.stat().st_uid == os.getuid() and int(path.parent.name) != os.getpid():
                lines.append(path.read_bytes())
    return lines


@contextmanager
def watched(seen: list[bytes]) -> Iterator[None]:
    """Collect command lines that hold the secret while the block runs."""
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.5):
            seen.extend(line for line in command_lines() if S.encode() in line)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def carried_out(commands: list[list[str]], folder: Path, monkeypatch, capfd) -> str:
    """Return what commands say, whose environment holds secrets and whose processes are watched."""
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "_senders", {})
    monkeypatch.chdir(folder)
    capfd.readouterr()
    seen: list[bytes] = []
    with watched(seen):
        for words in commands:
            assert main.main(words) == 0, (words[0], capfd.readouterr())
    runs.flush()
    assert seen == []
    return "".join(capfd.readouterr()).lower()


@pytest.mark.slow
def test_whole_study_writes_no_secret_and_goes_on(tiny_bert, tmp_path, monkeypatch, capfd):
    words = [*study_words(tiny_bert, tmp_path / "outputs"), "search.workers=2"]
    others = [
        ["add", "outputs/s", "lora.r=3"],
        ["resume", "outputs/s"],
        ["report", "outputs/s"],
        ["export", "outputs/s"],
    ]
    said = carried_out([words, *others], tmp_path, monkeypatch, capfd)
    assert (S.lower() in said, leaks(tmp_path)) == (False, [])
    assert "***" in (tmp_path / "outputs/s/study.json").read_text()


@pytest.mark.slow
@pytest.mark.integration
def test_whole_study_in_a_database_writes_no_secret_and_goes_on(postgres, tiny_bert, tmp_path, monkeypatch, capfd):
    psycopg = pytest.importorskip("psycopg")
    monkeypatch.setenv("PGPASSWORD", "")
    url = postgres.replace("postgres@", f"postgres:a@b/{S}@")
    study = [*study_words(tiny_bert, tmp_path / "outputs"), f"search.storage={url}"]
    others = [["add", url, "study=s", "outputs=outputs", "lora.r=3"], ["resume", "outputs/s"]]
    said = carried_out([study, *others], tmp_path, monkeypatch, capfd)
    assert os.environ["PGPASSWORD"] == f"a@b/{S}"
    with psycopg.connect(postgres) as connection:
        tables = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        rows = [str(connection.execute(f'SELECT * FROM "{name}"').fetchall()) for (name,) in tables]
    assert any("***" in r for r in rows)
    assert (S.lower() in said, leaks(tmp_path), [r for r in rows if S.lower() in r.lower()]) == (False, [], [])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone lets a process write over its arguments")
def test_command_line_shows_no_secret_to_other_users():
    code = (
        "from lorasweep.credentials import hide_arguments; hide_arguments(); "
        "print(open('/proc/self/cmdline').read().replace(chr(0), ' '))"
    )
    words = [f"search.storage=postgresql://me:a@{S}@host/db", "lora.r=2", f"tracking.uri=http://h/?token={S}", "x"]
    shown = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
    assert S not in shown
    assert {"lora.r=2", "x"} <= set(shown.split())


def test_tracebacks_and_warnings_of_libraries_pass_the_same_redaction():
    code = (
        "import warnings, logging; from lorasweep.credentials import guard_stderr; guard_stderr(); "
        f"warnings.warn('https://me:{S}@h'); logging.warning('token={S}'); raise ValueError('hf_{LONG}')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "ValueError: ***"
    assert done.stderr.count("***") >= 3


def test_reason_of_a_stop_is_written_without_its_secret(monkeypatch):
    study = Mock()
    study.queue.end_waiting.return_value = False
    monkeypatch.setattr(steering, "find", lambda *_: (study, None))
    assert main.main(["stop", "outputs/s", "7", "it", "printed", f"password={S}"]) == 0
    study.signals.stop.assert_called_once_with(7, "stopped by hand: it printed password=***")
