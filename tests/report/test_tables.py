"""report.md shows texts of data, names and errors letter by letter, as report.html does."""

import html
import re

import pytest
from markdown_it import MarkdownIt

from lorasweep.report.tables import plain

TEXTS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)> and <b>bold</b>",
    "a | b || c",
    "`code` and ``more``",
    "**bold** __init__ _a_ lora_alpha *x* ~~gone~~",
    "[link](javascript:alert(1)) ![image](http://host/x.png)",
    "&lt;script&gt; &#60; &copy; a & b",
    "# no heading",
    "- no list",
    "1. no list",
    "> no quote",
    r"C:\path\*.csv \| \`",
    "<https://host/x> $x^2$",
    "\x1b[31mred",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_shown_letter_by_letter(text):
    shown = MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(plain(text))
    paragraph = re.fullmatch(r"<p>([^<>]*)</p>\n", shown)
    assert paragraph, shown
    assert html.unescape(paragraph.group(1)) == text.replace("\x1b", "")


@pytest.mark.parametrize("text", [*TEXTS, "two\nlines", "a\r\n\n| b |\n|---|", "x\u2028y\u202ez"])
def test_text_stays_in_its_cell(text):
    table = f"| a | b |\n|---|---|\n| {plain(text)} | end |"
    shown = MarkdownIt("commonmark").enable("table").render(table)
    assert shown.count("<td>") == 2
    assert "<td>end</td>" in shown
