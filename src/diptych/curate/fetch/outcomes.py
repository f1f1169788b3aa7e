"""What became of an address: one short word, and whether another try may end differently.

`ok` is a picture that was stored. Every other word is the reason why there is none; it is written to the ledger and
becomes the `reason` of the row.
"""

import re

OK = "ok"
DELETED = "deleted"
"""Someone asked for the picture to be removed; it is never asked for again."""

TRANSIENT = frozenset(
    {
        "dns",  # the name has no address, or the resolver did not answer
        "connect",  # refused, unreachable, reset before an answer
        "tls",  # no common protocol, a certificate that does not hold
        "timeout",  # of the connection, of a pause between bytes, of the whole
        "protocol",  # an answer that is not HTTP
        "cut_off",  # fewer bytes than announced
        "robots_unreachable",  # robots.txt answers 5xx, 429 or not at all: RFC 9309 forbids the whole host then
        "host_down",  # the host failed so often in a row that the rest was left for later
    }
)
"""Failures of today. So are `http_429`, `http_408` and `http_5xx`."""

REFUSALS = frozenset(
    {
        "url",  # no address, or one that cannot be read in only one way
        "scheme",  # not http or https
        "userinfo",  # a name or a password in the address
        "port",  # not one of those that may be asked
        "address",  # the host is, or has, an address that is not public
        "redirects",  # more redirects than allowed, or one that leads nowhere
        "robots",  # robots.txt forbids it
        "opt_out",  # a header forbids to train on it
        "known_hash",  # on a list of pictures that must not be stored
        "too_large",  # more bytes than allowed
        "encoding",  # packed in a way that was not asked for and is not known, or wrongly
        "empty",  # no bytes
        "not_a_picture",  # of no known format
        "format",  # of one that is not taken from strangers
    }
)
"""What another try would not change. So are all `http_` statuses that are not transient."""

_STATUS = re.compile(r"http_(408|429|5\d\d)")


def is_transient(reason: str) -> bool:
    """Whether it is worth trying again."""
    return reason in TRANSIENT or _STATUS.fullmatch(reason) is not None


class NotFetched(Exception):
    """There is no picture. It never leaves the room: it becomes a counted reason."""

    def __init__(self, reason: str, detail: str = "", *, wait: float | None = None) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.wait = wait
        """Seconds that the host asked us to wait."""
