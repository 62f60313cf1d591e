"""How a secret is shown: not at all, and of an address everything but its credentials."""

from __future__ import annotations

import re

MASK = "***"
_SECRET_QUERY = re.compile(
    r"([?&;][^=&;]*(?:pass|pwd|secret|token|key|auth|credential|sig)[^=&;]*=)[^&;]*", re.IGNORECASE
)


def mask_url(text: str) -> str:
    """The address without passwords, user tokens and secret query values; ``***`` if it is no address.

    Errs on the side of hiding: a password may hold unescaped ``@`` and ``/``, so everything up to the last ``@`` is
    taken for credentials. Of these the user name stays where a password follows it.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return MASK
    credentials, at, place = rest.rpartition("@")
    if "?" in credentials:
        return f"{scheme}://{MASK}"  # the @ may belong to a secret in the query as well as to a password with a ?
    user, colon, _ = credentials.partition(":")
    shown = (f"{user}:{MASK}" if colon else MASK) + at if at else ""
    return f"{scheme}://{shown}{_SECRET_QUERY.sub(_hide, place)}"


def _hide(match: re.Match[str]) -> str:
    return match.group(1) + MASK
