"""Errors that end a command with a message for the user instead of a traceback."""


class PrunewrightError(Exception):
    """A failure that the message explains, with what to do about it (exit code 1)."""


class InputError(PrunewrightError):
    """The user's input or configuration cannot be used (exit code 2)."""


class StoreError(PrunewrightError):
    """A file of a run directory is missing, damaged or cannot be written."""


class ReviewPendingError(PrunewrightError):
    """A decision waits for a person; the run can be resumed with someone to ask."""


class AgentError(PrunewrightError):
    """The agent could not be asked; the run can be resumed."""
