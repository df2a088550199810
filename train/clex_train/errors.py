"""The error of a training that cannot be done."""

from clex_local.errors import ClexError


class TrainError(ClexError):
    """A training that cannot be done, or that failed."""
