"""What can go wrong, and who can mend it.

    UserError      a person can mend it: exit code 2, and a supervisor must not retry
    RunStopped     the run was asked to stop and has left a full checkpoint: exit code 3

Anything else is a defect of ours: exit code 1.
"""

from __future__ import annotations

DONE, DEFECT, MENDABLE, STOPPED = 0, 1, 2, 3


class UserError(ValueError):
    """Something only a person can mend, told in four parts: what, where, why, fix.

    A ValueError, so that a validator may raise it and the config loader can add the key and its origin.
    """

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, fix: str | None = None
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        parts = (("where", self.where), ("why  ", self.why), ("fix  ", self.fix))
        return "\n".join([self.what, *(f"  {label} {text}" for label, text in parts if text)])


class RunStopped(Exception):
    """A run ended on request, with a full checkpoint."""
