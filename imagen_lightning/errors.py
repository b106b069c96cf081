"""The error that is the user's to mend; apart from types.py, so that the command line answers without torch."""


class InputError(ValueError):
    """What a person gave cannot be used: one line that names the value and the mend.

    The command line prints the line and ends with exit code 2; any other error shows its traceback.
    """
