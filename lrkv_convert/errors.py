"""The one exception users see: what was found, and a hint at what to do next. The command line prints it as a single line."""


class LrkvError(Exception):
    """A refusal. `message` says what was found, `hint` what to do."""

    def __init__(self, message: str, hint: str = ""):
        super().__init__(f"{message} ({hint})" if hint else message)
        self.message, self.hint = message, hint


def first_line(error: BaseException) -> str:
    """The first line of another library's message, or the name of the exception."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
