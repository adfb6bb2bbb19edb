"""Settings and limits of the server."""

import ipaddress
from dataclasses import dataclass

from cat_fast.errors import UserError
from cat_fast.models.decode_tier import check_tier

GENERATIONS = "/v1/images/generations"
RECONSTRUCTIONS = "/v1/images/reconstructions"
MAX_BODY_BYTES = 20_000_000
"""Of uploads."""
MAX_JSON_BYTES = 1_000_000
"""Of other bodies: parsing a larger one would hold up the event loop, whatever the thread."""
MAX_IMAGE_PIXELS = 40_000_000
MAX_PROMPT_CHARACTERS = 4096
MAX_IMAGES = 10
MAX_STEPS = 1000
MAX_RECONSTRUCTIONS = 4
"""Uploads that are reconstructed at the same time; further ones get 429."""


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Settings of one server.

    Raises:
        UserError: a value out of range, or an address that others can reach without a token.
    """

    name: str
    """Name of the model in replies: that of the pipeline's folder."""
    host: str = "127.0.0.1"
    port: int = 8000
    token: str | None = None
    """Bearer token that requests must carry; None for none."""
    insecure: bool = False
    """Allow addresses that others can reach without a token."""
    max_tokens: int = 4096
    """Tokens per step of the engine."""
    max_queue: int = 256
    """Unfinished images; further requests get 429."""
    requests_per_minute: int = 1200
    """Per client; 0 for no limit."""
    drain_seconds: float = 60.0
    """Time to finish images after SIGTERM."""
    coarser_after: float | None = None
    """Predicted seconds of waiting, times the complexity score, after which requests with `allow_coarser` get
    a coarser ratio."""
    decode_tier: str = "exact"
    """See `CATPipeline.use_decode_tier`."""

    def __post_init__(self) -> None:
        check_tier(self.decode_tier)
        if not 0 <= self.port <= 65535:
            raise UserError(f"port {self.port}: expected 0 to 65535, where 0 chooses a free one")
        if self.token is not None and len(self.token) < 8:
            raise UserError("the token is shorter than 8 characters; write a longer one to the token file")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise UserError(
                "the token has characters that a header cannot carry; write one line of ASCII characters"
                " to the token file"
            )
        if self.token is None and not self.insecure and not is_loopback(self.host):
            raise UserError(
                f"host {self.host} can be reached from other machines: give --token-file, or --insecure to"
                " serve without a token"
            )


def is_loopback(host: str) -> bool:
    """Return True for an address of this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
