"""The error that is the user's to mend, and its words; apart from types.py: the command line answers without torch."""


class InputError(ValueError):
    """What a person gave cannot be used: one line that names the value and the mend.

    The command line prints the line and ends with exit code 2; any other error shows its traceback.
    """


def counted(number: int, noun: str) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
