"""Values in Markdown and pages are shown as they are, and cannot become markup."""

import html
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import UndefinedError
from markdown_it import MarkdownIt

from lrbo.files.rendering import code, fenced, markdown, render
from lrbo.files.tables import Table, columns

READER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
# As they come, and of the characters that mean something.
TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.text(
    "ab \\`*_[]()<>|~&$#!-+=:.;'\"\n"
)


def shown(text: str) -> str:
    """Return what HTML shows of a text, where runs of blanks are one."""
    return " ".join(text.split())


def plain(page: str) -> str:
    return html.unescape(re.sub(r"</?(p|h1|td|code)>", "", page))


@given(TEXTS)
def test_a_text_in_a_line_is_shown_as_it_is(text: str) -> None:
    for before, tag in (("x ", "p"), ("# x ", "h1")):
        page = READER.render(f"{before}{markdown(text)} y")
        assert re.fullmatch(rf"<{tag}>[^<]*</{tag}>\n", page)
        assert shown(plain(page)) == shown(f"x {text} y")


@given(TEXTS)
def test_a_text_in_a_table_is_one_cell(text: str) -> None:
    page = READER.render(f"| a | b |\n|---|---|\n| {markdown(text)} | {code(text)} |\n")
    cells = re.findall(r"<td>(.*?)</td>", page, flags=re.DOTALL)
    assert len(cells) == 2
    for cell in cells:
        assert re.fullmatch(r"[^<]*|<code>[^<]*</code>", cell)
        assert shown(plain(cell)) == shown(text)


@given(TEXTS, st.sampled_from(["", "bash"]))
def test_a_text_cannot_close_its_code_block(text: str, language: str) -> None:
    page = READER.render(f"{fenced(text, language)}\n\nafter\n")
    block = re.fullmatch(r"<pre><code[^>]*>([^<]*)</code></pre>\n<p>after</p>\n", page)
    assert block is not None
    assert html.unescape(block[1]) == f"{text}\n"


def test_a_template_needs_all_its_values() -> None:
    with pytest.raises(UndefinedError, match="lines"):
        render("study_note.md", tables=[])


def test_half_a_surrogate_pair_is_written_as_an_escape() -> None:
    lines = {"Model": "half \ud83d"}
    page = render("study_note.md", lines=lines, tables=[])
    assert "half \\ud83d" in page.encode("utf-8").decode("utf-8")


def test_no_control_character_is_written_for_a_terminal() -> None:
    text = "a\x1b[31mred\x07\x00\x9b\nb"
    assert code(text) == "`a[31mred b`"
    assert markdown(text) == r"a\[31mred b"
    assert fenced(text, "bash") == "```bash\na[31mred\nb\n```"
    table = Table(text, columns(text), [[text]], [text])
    page = render("study_note.md", lines={text: text}, tables=[table])
    assert not {c for c in page if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n"}


def test_no_control_character_is_in_a_page() -> None:
    text = "a\x1b[31mred\x07\x9b\tb"
    table = Table(text, columns(text), [[text]], [text])
    page = render(
        "report.html", study=text, plotly="", lines=[text], head_tables=[table], has_best=True,
        figures=[], detail_tables=[table], trials=table, command=text, origins=[text],
        config_yaml=f"a: b\n{text}",
    )  # fmt: skip
    assert not {c for c in page if ord(c) < 32 or 127 <= ord(c) < 160} - {"\n", "\t"}
    assert "a: b\na[31mred\tb" in page
