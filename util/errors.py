"""The one exception that means "the input is wrong, not the program"."""


class UserError(ValueError):
    """A mistake that a user can mend: a flag, a file, an annotation.

    The message names what was found, what is allowed and the way out; `main.py` prints it without a traceback.
    """

    def __init__(self, message: str) -> None:
        # A DataLoader worker passes an error on as a new one, whose message is the traceback of the worker.
        if message.startswith("Caught UserError in "):
            message = message.rpartition("errors.UserError: ")[2].rstrip()
        super().__init__(message)
