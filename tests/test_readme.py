"""README.zh-CN.md says what README.md says: the same commands in the same order, the same keys and headings."""

import re
from itertools import zip_longest
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"


def code_lines(path: Path) -> list[str]:
    """Return the lines of the code blocks, without their comments, which are translated."""
    found = []
    fenced = False
    for line in path.read_text(encoding="utf8").splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif line.startswith("    ") or fenced:
            command = re.split(r"(?:^|\s{2,})# ", line.strip())[0].strip()
            found += [command] if command else []
    return found


def inline_commands(path: Path) -> list[str]:
    """Return the commands that stand in running text, in the order of the text."""
    found = re.findall(r"`(python -m lorasweep[^`]*)`", path.read_text(encoding="utf8"))
    return [" ".join(command.split()) for command in found]


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


def test_both_explain_the_same_lora_keys():
    def keys(path: Path) -> list[str]:
        rows = [line for line in path.read_text(encoding="utf8").splitlines() if line.startswith("| `lora.")]
        return [key for row in rows for key in re.findall(r"`(lora\.\w+)`", row)]

    assert "lora.r" in keys(ENGLISH)
    difference = first_difference(keys(ENGLISH), keys(CHINESE))
    assert not difference, difference


def test_both_have_as_many_headings_of_each_depth():
    def depths(path: Path) -> list[str]:
        return re.findall(r"^(#+) ", path.read_text(encoding="utf8"), flags=re.MULTILINE)

    assert depths(ENGLISH) == depths(CHINESE)


def test_a_differing_command_is_named():
    told = first_difference(["make sweep", "make test"], ["make sweep", "make check"])
    assert told == "command 2 differs:\n  README.md:       make test\n  README.zh-CN.md: make check"
    assert "None" in first_difference(["make sweep"], [])
