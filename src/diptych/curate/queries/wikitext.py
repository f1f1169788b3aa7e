"""Wiki markup to the text a reader sees.

Templates, tables, references, galleries, formulas, code, comments and links to files and categories go; links leave
their label. Markup that is never closed stays as text, so that one slip of an author does not lose the
rest of an article.
"""

import html
import re
from collections.abc import Collection

NAMESPACES = frozenset({"file", "image", "category", "media", "special", "template", "user", "wikipedia", "portal"})
"""Names before a colon in a link that is not to an article; a dump names its own language's as well."""

_UNREAD = "ref|math|chem|gallery|syntaxhighlight|source|code|score|timeline|nowiki|pre|hiero|graph|mapframe|imagemap"
_EMPTY_TAG = re.compile(rf"<(?:{_UNREAD})\b[^<>]*/>", re.IGNORECASE)
_UNREAD_TAG = re.compile(rf"<(/?)({_UNREAD})\b[^<>]*>|<!--|-->", re.IGNORECASE)
_PARAMETER = re.compile(r"\{\{\{[^{}]*\}\}\}")
_BRACES = re.compile(r"\{\{|\}\}|^[ \t:*]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_LINK = re.compile(r"\[\[([^\[\]]*)\]\]")
_OUTSIDE = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\[\]]*[ \t]*([^\[\]]*)\]")
_ADDRESS = re.compile(r"(?:https?|ftp)://[^\s\[\]<>|]+")
_BREAK = re.compile(r"<(?:br|hr|p|/p|div|/div|li|/li|tr|td)\b[^<>]*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_LINE_START = re.compile(r"^(?:[*#:;]+|=+|----+|[ \t]*[|!].*$)", re.MULTILINE)
_HEADING_END = re.compile(r"=+[ \t]*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[A-Z]+__")
_DEPTH = 8  # links inside the labels of files inside ...


def strip_markup(text: str, namespaces: Collection[str] = NAMESPACES) -> str:
    """The readable text of an article; each paragraph, heading and list item is a line."""
    text = _cut_unread(_EMPTY_TAG.sub(" ", text))
    text = _cut_braces(_PARAMETER.sub("", text))
    for _ in range(_DEPTH):
        text, changed = _LINK.subn(lambda link: _label(link[1], namespaces), text)
        if not changed:
            break
    text = _OUTSIDE.sub(lambda link: link[1] or " ", text)
    text = _ADDRESS.sub(" ", text)
    text = _TAG.sub("", _BREAK.sub("\n", text))
    text = _HEADING_END.sub("", _LINE_START.sub("", text))
    return html.unescape(_SWITCH.sub("", _QUOTES.sub("", text)))


def _label(link: str, namespaces: Collection[str]) -> str:
    target, _, label = link.partition("|")
    namespace, colon, _ = target.partition(":")
    if colon and namespace.strip().replace("_", " ").lower() in namespaces:
        return " "
    return label.rpartition("|")[2] if label else target.lstrip(":").replace("_", " ")


def _cut_unread(text: str) -> str:
    """Drop comments and what stands in tags that are not read; a tag that is never closed stays."""
    marks = list(_UNREAD_TAG.finditer(text))
    ends: dict[str, list[int]] = {}  # of each kind, the marks that end it, last first
    for number in range(len(marks) - 1, -1, -1):
        if marks[number][1] or marks[number][0] == "-->":
            ends.setdefault((marks[number][2] or "-->").lower(), []).append(number)
    kept, start, number = [], 0, 0
    while number < len(marks):
        closers = ends.get((marks[number][2] or "-->").lower(), [])
        while closers and closers[-1] < number:
            closers.pop()
        if not closers or closers[-1] == number:  # never closed, or closes nothing
            number += 1
            continue
        kept += [text[start : marks[number].start()], "" if marks[number][0] == "<!--" else " "]
        start, number = marks[closers[-1]].end(), closers[-1] + 1
    return "".join([*kept, text[start:]])


def _cut_braces(text: str) -> str:
    """Drop templates and tables, however nested; a brace without its partner stays."""
    opened: list[tuple[int, str]] = []
    spans: list[tuple[int, int]] = []
    for mark in _BRACES.finditer(text):
        kind = mark[0].strip(" \t:*")
        if kind in ("{{", "{|"):
            opened.append((mark.start(), kind))
            continue
        partner = "{{" if kind == "}}" else "{|"
        for place in range(len(opened) - 1, max(-1, len(opened) - 1 - _DEPTH), -1):
            if opened[place][1] == partner:
                while spans and spans[-1][0] > opened[place][0]:
                    spans.pop()  # inside the one that ends here
                spans.append((opened[place][0], mark.end()))
                del opened[place:]
                break
    kept, start = [], 0
    for begin, end in spans:
        kept += [text[start:begin], " "]
        start = end
    return "".join([*kept, text[start:]])
