"""Errors that are for people: one line that names what was found, what was expected and what to do next."""


class LiftkitError(Exception):
    """Something failed that the user can understand; the command line prints it and exits with 1."""

    exit_code = 1


class UsageError(LiftkitError, ValueError):
    """The input is not usable: a wrong path, file, flag or model; exit code 2, nothing written."""

    exit_code = 2


class ProofError(LiftkitError):
    """A converted model does not do what its source does."""
