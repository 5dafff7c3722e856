"""The one error type for what a user typed wrong."""


class UsageError(ValueError):
    """Bad input from a user: what came, what was wanted and what to do, in one sentence.

    The command line prints it as one line and exits with status 2; it is raised before any work is
    lost. Everything else that escapes is a defect of fastrank and keeps its traceback.
    """
