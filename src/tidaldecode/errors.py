"""The one exception that means: the input was wrong, not the program."""


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to mend it."""


class MemoryShortError(InputError):
    """What was asked for does not fit the memory."""


def one_line(error: Exception, most: int = 300) -> str:
    """The message of another library's error, for a place in one of ours: at most `most` characters of it."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."
