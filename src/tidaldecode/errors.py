"""The one exception that means: the input was wrong, not the program."""


class InputError(ValueError):
    """Bad input. The message is one line that names what is wrong and how to mend it."""
