"""Text from outside is shown as text in a terminal, in Markdown and in HTML."""

import unicodedata

import pytest

from bissl_hf.text import for_html, for_markdown, for_terminal, format_table, markdown_code


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("cat\x1b[2J", "cat\\x1b[2J"),
        ("a\nb\rc\td", "a\\x0ab\\x0dc\\x09d"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udcff\x9b\u2028", "\\udcff\\x9b\\u2028"),
        ("tag\U000e0041", "tag\\U000e0041"),
        ("Käse 猫 क्\u200dष", "Käse 猫 क्\u200dष"),
    ],
)
def test_a_terminal_gets_no_control_characters(text, shown):
    assert for_terminal(text) == shown


def test_every_control_and_format_character_is_escaped_in_each_medium():
    hidden = [chr(code) for code in range(0x110000) if unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")]
    hidden = [character for character in hidden if character not in "\u200c\u200d"]
    assert len(hidden) > 2000
    for medium in (for_terminal, for_markdown, for_html, markdown_code):
        assert set(medium("".join(hidden))).isdisjoint(hidden)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<b>a</b> & c", "&lt;b&gt;a&lt;/b&gt; &amp; c"),
        ("[a](b) ![c](d)", "\\[a\\](b) \\!\\[c\\](d)"),
        ("*a* _b_ ~c~ `d` $e$", "\\*a\\* \\_b\\_ \\~c\\~ \\`d\\` \\$e\\$"),
        ("http://e.example www.e.example me@e.example", "http:/\\/e.example www\\.e.example me\\@e.example"),
        ("# a", "\\# a"),
        ("1. a", "1\\. a"),
        ("a\\b", "a\\\\b"),
        ("cosine_with_min_lr, 0.5 - 1.0, Food-101", "cosine_with_min_lr, 0.5 - 1.0, Food-101"),
    ],
)
def test_markdown_shows_text_as_it_is(text, shown):
    assert for_markdown(text) == shown


def test_html_and_code():
    assert for_html("<a href=\"x\" title='y'>") == "&lt;a href=&quot;x&quot; title=&#x27;y&#x27;&gt;"
    assert markdown_code("a`<b>\n") == "`a'<b>\\x0a`"


def test_tables_of_the_terminal_keep_their_rows():
    assert format_table([{"class": "a\n\x1b[1m"}]).splitlines()[-1] == "a\\x0a\\x1b[1m"
