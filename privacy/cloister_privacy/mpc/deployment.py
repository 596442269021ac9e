"""Who computes together: two parties and a dealer, by their pinned certificates, and the limits that they keep. Knows no network."""

from __future__ import annotations

from dataclasses import dataclass

from cloister.wire.private_deployments import shared_by
from cloister_privacy.mpc.errors import CoLocated
from cloister_privacy.mpc.links import Peer

__all__ = ["Deployment", "Limits"]


@dataclass(frozen=True, slots=True)
class Deployment:
    """A version of a model that is deployed privately."""

    id: str
    parties: tuple[Peer, Peer]
    dealer: Peer

    def check_apart(self, *, development: bool = False) -> None:
        """Raises CoLocated where two of the three roles name one operator, host or certificate: one who has two of them sees all.

        What they declare is not proven. With `development` nothing is asked.
        """
        what = shared_by((*self.parties, self.dealer))
        if what is not None and not development:
            raise CoLocated(
                f"two of the parties and the dealer share their {what}, and could put the shares together; run them under "
                "different administrators, or say development=True where nothing is private"
            )


@dataclass(frozen=True, slots=True)
class Limits:
    """What a role waits for, keeps and takes. Seconds are of the monotonic clock."""

    form_s: float = 30.0
    """To form the group: to reach both others and open the masked weights."""
    request_s: float = 30.0
    """For a request, from its announcement to its end, and for its material before."""
    rows: int = 256
    """The most rows of a request."""
    joined: int = 16
    """The most rows of several requests that are computed as one program."""
    ahead: int = 4
    """How many requests' material is kept ready, for each number of rows that was asked for lately, and for one row."""
    disk_bytes: int = 2**28
    """The most that material may take on disk at party 0."""
    requests: int = 2**20
    """The most requests of so many rows in one generation."""
