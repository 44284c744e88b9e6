# SPDX-License-Identifier: AGPL-3.0-or-later
"""What can go wrong with Prism: one class for each thing that an operator, or the caller, can do about it.

A message is one line, names the host and what was asked, and holds no secret.
"""

from __future__ import annotations

from replicator.errors import ReferenceLostError, SourceError


class PrismError(SourceError):
    """Prism failed in a way that has no class of its own: the message says with what.

    ``status``: the HTTP status, where there was an answer. ``words``: its error codes, groups and reasons as Prism spells them.
    """

    status: int | None = None
    words: frozenset[str] = frozenset()


class PrismUnreachableError(PrismError):
    """No connection, or no answer in time. Mend the network or the address, try again."""


class PrismTlsError(PrismError):
    """The certificate was not accepted: give its authority (prism_ca_cert), or prism_insecure in a lab."""


class PrismAuthError(PrismError):
    """401: the account or its password is wrong or has expired."""


class PrismPermissionError(PrismError):
    """403: the account may not do this. ``permission`` is what it lacks, as Prism calls it, if that is known."""

    def __init__(self, message: str, permission: str | None = None) -> None:
        super().__init__(message)
        self.permission = permission


class PrismNotFoundError(PrismError):
    """404: the object, or the path, is not there."""


class PrismConflictError(PrismError):
    """The object was changed meanwhile (ETag, spec_version) again and again."""


class PrismRateLimitedError(PrismError):
    """Prism went on to refuse for too many requests: lower prism_rate_rpm."""


class PrismTaskError(PrismError):
    """A task of Prism failed, was cancelled, or did not end in time. ``code`` is Prism's own, if it gave one.

    ``timed_out``: what became of it is not known: the object must be looked for.
    """

    def __init__(self, message: str, code: str | None = None, *, timed_out: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.timed_out = timed_out


class PrismRefusedError(PrismError):
    """Prism refused the request itself (400, 409, 422): what was asked does not fit what is there."""


class PrismAnswerError(PrismError):
    """An answer that does not have the documented shape, or breaks one of its promises."""


class NoDataServicesError(PrismError):
    """The cluster has no data services address (DSIP): set it in Prism, or give dsip."""


class RegionsLostError(ReferenceLostError):
    """Changed regions against this reference cannot be had: it is gone, or of another disk."""


class ImageNeededError(PrismRefusedError):
    """No snapshot's disk is cloned here without an image of it: make one (``clones_by_image`` is true from now on), try again."""
