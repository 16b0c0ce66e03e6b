"""The commands of README.md, docs/ and CONTRIBUTING.md: README's run, in order, on a tiny model; the others compose.

README.zh-CN.md has README.md's commands, keys, links and headings.
"""

import json
import re
import shlex
import tomllib
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import pytest
from support import studies

from lorasweep import tasks
from lorasweep.cli import commands, main
from lorasweep.config import compose, keys
from lorasweep.data import columns, readers
from lorasweep.runner.points import points
from lorasweep.runner.request import Request

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = [ENGLISH, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = "python -m lorasweep"
KEYS = {key.path for key in keys.described_keys()}
FEWEST_WORDS, MOST_WORDS = 900, 1100


def code_lines(path: Path) -> list[str]:
    """Return the lines of the code blocks, without their comments, which are translated; `\\` joins two."""
    found: list[str] = []
    fenced = False
    text = re.sub(r" \\\n +", " ", path.read_text(encoding="utf8"))
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif line.startswith("    ") or fenced:
            command = re.split(r"(?:^|\s{2,})# ", line.strip())[0].strip()
            found += [command] if command else []
    return found


def inline_commands(path: Path) -> list[str]:
    """Return the commands that stand in running text, in the order of the text."""
    found = re.findall(rf"`({OURS}[^`]*)`", path.read_text(encoding="utf8"))
    return [" ".join(command.split()) for command in found]


def ours(path: Path) -> list[list[str]]:
    """Return the words of each lorasweep command of a page; output that names one is not at a line's start."""
    lines = [line for line in code_lines(path) if line.startswith(OURS)] + inline_commands(path)
    return [shlex.split(line.removeprefix(OURS)) for line in lines]


# --- both languages --------------------------------------------------------------------------------------------------


def first_difference(ours: list[str], theirs: list[str]) -> str:
    """Return which command differs first, "" where none does."""
    for i, (english, chinese) in enumerate(zip_longest(ours, theirs), start=1):
        if english != chinese:
            return f"command {i} differs:\n  README.md:       {english}\n  README.zh-CN.md: {chinese}"
    return ""


def test_code_blocks_hold_the_same_commands():
    assert code_lines(ENGLISH), "README.md has no code blocks: the rule is dead"
    difference = first_difference(code_lines(ENGLISH), code_lines(CHINESE))
    assert not difference, difference


def test_running_text_holds_the_same_commands():
    difference = first_difference(inline_commands(ENGLISH), inline_commands(CHINESE))
    assert not difference, difference


def test_both_have_the_same_keys_links_and_pictures():
    def parts(path: Path) -> Counter[str]:
        text = path.read_text(encoding="utf8")
        return Counter(re.findall(r"`([^`\n]+)`", text)) + Counter(re.findall(r"\]\(([^)]+)\)", text))

    assert parts(ENGLISH)["search.margin"], "README.md has no keys: the rule is dead"
    assert parts(ENGLISH) - parts(CHINESE) == parts(CHINESE) - parts(ENGLISH) == Counter()


def test_both_have_as_many_headings_of_each_depth():
    def depths(path: Path) -> list[str]:
        return re.findall(r"^(#+) ", path.read_text(encoding="utf8"), flags=re.MULTILINE)

    assert depths(ENGLISH) == depths(CHINESE)


def test_a_differing_command_is_named():
    told = first_difference(["make sweep", "make test"], ["make sweep", "make check"])
    assert told == "command 2 differs:\n  README.md:       make test\n  README.zh-CN.md: make check"
    assert "None" in first_difference(["make sweep"], [])


# --- what pages say is there -----------------------------------------------------------------------------------------


def test_readme_is_short():
    assert FEWEST_WORDS <= len(ENGLISH.read_text(encoding="utf8").split()) <= MOST_WORDS


@pytest.mark.parametrize("page", [*PAGES, CHINESE], ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_keys_are_there(page):
    text = page.read_text(encoding="utf8")
    groups = {key.partition(".")[0] for key in KEYS if "." in key}
    named = set(re.findall(rf"`((?:{'|'.join(groups)})\.\w+)", text))
    assert {name for name in named - KEYS if not name.endswith(".json")} == set()


def test_extras_and_pinned_versions_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    extras = set(project["optional-dependencies"])
    for page in PAGES:
        for group in re.findall(r"(?:lorasweep|\.)\[([\w,]+)\]", page.read_text(encoding="utf8")):
            assert set(group.split(",")) <= extras, page
    table = ENGLISH.read_text(encoding="utf8").partition("| extra |")[2].partition("\n\n")[0]
    assert {e for e in extras if f"`{e}`" in table} == extras
    assert f"torch is pinned to {version_of('torch')}" in ENGLISH.read_text(encoding="utf8")


def version_of(name: str) -> str:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf8")
    return re.search(rf"^{name}==(\S+)", pinned, re.MULTILINE)[1]


def test_make_targets_are_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf8"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"^    make ([a-z-]+)", page.read_text(encoding="utf8"), re.MULTILINE))
        assert named <= targets, page


def test_sweep_file_in_readme_is_the_one_that_runs_up_to_its_recipes():
    file, recipes = (ROOT / "sweeps" / "lora_search.yaml").read_text(encoding="utf8").split("  enqueue:\n")
    for page in (ENGLISH, CHINESE):
        shown = page.read_text(encoding="utf8").partition("```yaml\n")[2].partition("```")[0]
        assert shown == file
    assert recipes.count("- >-") == 6, "as the sentence behind it says"


# --- commands compose ------------------------------------------------------------------------------------------------

STEERED = [w for page in PAGES for w in ours(page)]


def test_pages_have_commands():
    assert len(STEERED) > 50


@pytest.mark.parametrize("words", STEERED, ids=" ".join)
def test_command_is_understood_and_its_settings_compose(words, tmp_path, monkeypatch):
    """What is trained is composed to the last point; of the other commands the flags and the keys are read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "NAME").mkdir(parents=True)
    (tmp_path / "outputs" / "NAME" / "best.yaml").write_text("overrides: [lora.r=8]\n")
    name = words[0] if words and words[0] in commands.COMMANDS else ""
    command = commands.COMMANDS.get(name, commands.TRAIN)
    options = command.parser().parse(words[1:] if name else words)
    settings = [w for w in getattr(options, "words", []) if "=" in w]
    if name in ("", "check"):
        assert points(Request.of(options.words, options.sweep)).specs
    elif name != "ui":
        assert {w.partition("=")[0] for w in settings} <= KEYS


# --- tables of docs/tasks.md -----------------------------------------------------------------------------------------

TASKS = (ROOT / "docs" / "tasks.md").read_text(encoding="utf8")
TABLES = dict(re.findall(r"^```\w+ (\S+)\n(.*?)^```", TASKS, flags=re.MULTILINE | re.DOTALL))
READ = [(w, name) for w in ours(ROOT / "docs" / "tasks.md") for name in TABLES if f"data.path={name}" in w]


def test_each_table_is_read_by_a_command():
    assert {name for _, name in READ} == set(TABLES)


@pytest.mark.parametrize(("words", "name"), READ)
def test_table_of_the_page_is_read_by_the_command_beside_it(words, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_text(TABLES[name], encoding="utf8")
    spec = compose.compose_trial([w for w in words if "=" in w and "," not in w])
    table = readers.read_splits(spec.data)["train"]
    assert len(table.rows) == 2
    found = columns.find_columns(tasks.make(spec.task_type).columns(spec.data), table, spec.data)
    assert set(found.by_field.values()) <= set(table.columns) and found.by_field


# --- README's commands run -------------------------------------------------------------------------------------------

SMALL = [
    *(s for s in studies.SMALL if not s.startswith("train.max_steps")),
    *("train.max_steps=2", "train.eval_every=2", "tracking.reload_check=false", "tracking.system_metrics=false"),
]
NOT_RUN = {"ui": "serves until it is stopped", "fetch": "downloads", "data=hub": "downloads"}


@pytest.fixture(scope="module")
def place(tiny_bert, tiny_llama, tmp_path_factory):
    """Return a folder with the files that README's commands name, and a study NAME whose trial 2 waits."""
    folder = tmp_path_factory.mktemp("readme")
    rows = [f"the {i}. word is {('red', 'blue')[i % 2]},{('low', 'high')[i % 2]}" for i in range(60)]
    (folder / "reviews.csv").write_text("\n".join(["body,stars", *rows]) + "\n")
    (folder / "texts.csv").write_text("body\nthe word is red\n")
    chat = [{"role": "user", "content": "what is {}?"}, {"role": "assistant", "content": "a number"}]
    chats = [json.dumps({"messages": chat}).replace("{}", str(i)) for i in range(60)]
    (folder / "chats.jsonl").write_text("\n".join(chats) + "\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        named = [*SMALL, f"model.pretrained={tiny_bert}", "study=NAME", "data.path=reviews.csv"]
        assert main.main(["-m", "lora.r=1,2", *named]) == 0
        assert main.main(["add", "outputs/NAME", "lora.r=3"]) == 0
    return folder


def small(words: list[str], bert: Path, llama: Path) -> list[str]:
    """Return a command line of README on a tiny model and few steps."""
    model = llama if "task_type=causal_lm" in words else bert
    more = [*SMALL, f"model.pretrained={model}", "search.trials=2", "tracking=none"]
    more += ["data.chat_template=chatml"] if model == llama else []
    given = {w.partition("=")[0] for w in words} - {"train.max_steps", "model.pretrained"}
    kept = [w for w in words if w.partition("=")[0] not in ("train.max_steps", "model.pretrained", "train.epochs")]
    return [*kept, *(m for m in more if m.partition("=")[0] not in given)]


@pytest.mark.parametrize("words", [w for w in ours(ENGLISH) if not NOT_RUN.keys() & set(w)], ids=" ".join)
def test_command_of_readme_runs(words, place, tiny_bert, tiny_llama, monkeypatch):
    monkeypatch.chdir(place)
    trains = not words or words[0] not in commands.COMMANDS or words[0] == "check"
    words = [w for w in words if w != "--watch"]  # until all trials have ended
    assert main.main(small(words, tiny_bert, tiny_llama) if trains else words) == 0
