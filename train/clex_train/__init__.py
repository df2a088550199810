"""Training of causal language models for contexts longer than they were trained for, with a CLEX layer or without."""

from clex_local.errors import ClexError


class TrainError(ClexError):
    """A training that cannot be done, or that failed."""
