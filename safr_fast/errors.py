"""Errors that a user may want to catch."""


class BackendUnavailable(RuntimeError):
    """A back end was named by ``impl`` and cannot serve; the message says why and what to do."""
