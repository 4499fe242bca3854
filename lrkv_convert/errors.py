"""The one exception users see: what was found, and a hint at what to do next. The command line
prints it as a single line.
"""

LONGEST = 400  # characters of another library's message: it may hold a value of any length


class LrkvError(Exception):
    """A refusal. `message` says what was found, `hint` what to do."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message, self.hint = message, hint


def first_line(error: BaseException) -> str:
    """The first line of another library's message, and the next where it only announces that one;
    or the name of the exception.
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    return line if len(line) <= LONGEST else line[:LONGEST] + "…"
