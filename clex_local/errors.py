"""The errors that a person sees."""

from __future__ import annotations


class ClexError(Exception):
    """Base of every error meant for the user.

    Its message is one line that says what is wrong, in which file, and what to do. Commands print it after
    their name and end with exit code 1; everything else that is raised is a defect of ours.
    """
