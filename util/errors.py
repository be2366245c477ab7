"""The one exception that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """A mistake that a user can mend: a flag, a file, an annotation.

    The message names what was found, what is allowed and the way out; `main.py` prints it without a traceback.
    """
