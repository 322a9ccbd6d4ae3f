"""Errors of running, apart from what needs torch."""


class RunError(RuntimeError):
    """A run cannot start or go on where it was told to; the message says why and what to do."""


class OptionError(ValueError):
    """An option of a run has a value that it cannot have; the message names it and what is allowed."""
