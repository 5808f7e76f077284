"""Errors made for people: they name the thing, what was expected, what was found, and the way out."""

from __future__ import annotations


class SparsityError(ValueError):
    """A mistake that the user can fix. Command lines print it without a traceback."""


class CheckpointError(SparsityError):
    """A file that is missing, damaged, foreign, unsafe, or does not fit the model."""


class VerificationError(SparsityError):
    """A weight that breaks its N:M pattern."""
