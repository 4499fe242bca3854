"""Text that becomes markup. Names of folders, texts and models are anybody's words: in Markdown, in
a shell's command, in a picture they stand as themselves.

Everything in a model card or a picture that this project did not write itself goes through here.
(HTML: the page's template escapes; YAML: a dumper writes it.)
"""

import re
import shlex

import yaml

# what may begin something; an underscore within a word does not
MARKDOWN = re.compile(r"[\\`*\[\]|~$#]|(?<![^\W_])_|_(?![^\W_])")
ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def visible(text) -> str:
    """On one line, without what is not seen: control characters as they are written in code."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


def prose(text) -> str:
    """In a sentence, a heading or a cell."""
    text = " ".join(visible(text).split())
    text = MARKDOWN.sub(lambda found: "\\" + found[0], text)
    # what would begin a list, or underline a heading
    text = re.sub(r"^(\d+(?=[.)](?: |$))|(?=[-+=]))", r"\1\\", text)
    return re.sub("[&<>]", lambda found: ENTITIES[found[0]], text)


def code(text) -> str:
    """As code in a sentence, whatever backticks it has."""
    text = visible(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{ticks}{room}{text}{room}{ticks}"


def cell(text) -> str:
    """As code in a cell of a table, which a bar would end."""
    return code(text).replace("|", "\\|")


def block(language: str, lines: str) -> str:
    """Lines of code, whatever fences they hold."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", lines)), default=0))
    return f"{fence}{language}\n{lines}\n{fence}"


def literal(text: str) -> str:
    """As a string in Python."""
    return '"' + visible(text.replace("\\", "\\\\")).replace('"', '\\"') + '"'


def quoted(words: list[str]) -> str:
    """Words of a command, so that a shell reads them as they are; those with control characters in
    the form that bash knows."""
    return " ".join(
        (
            shlex.quote(word)
            if word.isprintable()
            else "$'" + visible(word.replace("\\", "\\\\").replace("'", "\\'")) + "'"
        )
        for word in words
    )


def front(fields: dict) -> str:
    """YAML, as it stands in front of a card."""
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
