"""Every error that bezel raises on purpose.

A message says which file, which tensor or key, what was there, what was expected and what to do.
"""

from __future__ import annotations


class BezelError(Exception):
    """Base of all of bezel's own errors; the command line prints it without a traceback."""


class InvalidConfig(BezelError):
    """A config that is incomplete, contradicts itself, or describes a model that bezel cannot run exactly."""


class InvalidCheckpoint(BezelError):
    """A checkpoint folder whose files or tensors are missing, extra, misshapen or damaged."""


class InvalidModelFile(BezelError):
    """A model file that is damaged or hostile. `offset` is the byte at which it stopped making sense."""

    _what = "invalid model file"

    def __init__(self, path: object, reason: str, offset: int | None = None) -> None:
        where = f" at byte {offset}" if offset is not None else ""
        super().__init__(f"{path}: {self._what}{where}: {reason}")
        self.path, self.reason, self.offset = path, reason, offset


class UnsupportedModelFile(InvalidModelFile):
    """A model file that may be sound, with what bezel has no code for."""

    _what = "not supported"


class InvalidSession(BezelError):
    """A saved session that is damaged, or that belongs to another model or cache type."""


class CacheError(BezelError):
    """A cache was asked for something that it no longer, or does not yet, hold."""


class ContextFull(BezelError):
    """The session has no position left for the tokens that it was asked to take."""


class InvalidRequest(BezelError):
    """An argument of the API or the command line that makes no sense for this model."""


class HubError(BezelError):
    """The hub could not be asked, does not let us have what was asked for, or gave something else."""
