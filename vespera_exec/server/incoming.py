"""What a message holds, told from its bytes: parsing it could hold up everybody else."""

from __future__ import annotations

import re

MOST_VALUES = 50_000
"""JSON values in one message. So many cost the loop a few hundredths of a second."""

_SEPARATORS = b",[{"
_ID_BYTES = 512
_ID = rb'"id"\s*:\s*(\d{1,15}|"[A-Za-z0-9_.:-]{1,100}")'
_ID_FIRST = re.compile(rb'\s*\{\s*(?:"jsonrpc"\s*:\s*"2\.0"\s*,\s*)?' + _ID + rb"\s*,")
_ID_LAST = re.compile(rb'"jsonrpc"\s*:\s*"2\.0"\s*,\s*' + _ID + rb"\s*\}\s*$")


def has_too_many_values(message: bytes, *, most: int = MOST_VALUES) -> bool:
    """It holds more than `most` values, as many as its commas and brackets outside of strings tell.

    Takes milliseconds for megabytes, whatever is in them. Of bytes that are no JSON it says anything.
    """
    if _separators(message) <= most:
        return False
    unescaped = message.replace(b"\\\\", b"").replace(b'\\"', b"")
    # Each string is a value or the key of one; beyond this, splitting at them would cost what parsing costs.
    if unescaped.count(b'"') > 4 * most:
        return True
    return _separators(b"".join(unescaped.split(b'"')[::2])) > most


def request_id(message: bytes) -> int | str | None:
    """The id of a request that cannot be read, where it stands at the beginning or the end as clients write it.

    Without it the client would wait for an answer until its own timeout.
    """
    found = _ID_FIRST.match(message[:_ID_BYTES]) or _ID_LAST.search(message[-_ID_BYTES:])
    if found is None or b'"method"' not in message[:_ID_BYTES] + message[-_ID_BYTES:]:
        return None
    text = found[1].decode("ascii", "replace")
    return text[1:-1] if text.startswith('"') else int(text)


def _separators(message: bytes) -> int:
    return len(message) - len(message.translate(None, _SEPARATORS))
