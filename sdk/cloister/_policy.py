"""Who may do what in the client's tenant, and why; sync and async over the same operations."""

from __future__ import annotations

from cloister._http import AsyncSender, Sender
from cloister._operations import Operations
from cloister.wire.policy import Explanation, Holders

__all__ = ["AsyncPolicy", "Policy"]


class Policy:
    """What the operator granted in the client's own tenant, for clients that are granted `policy.read`, as stewards are."""

    def __init__(self, sender: Sender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    def explain(self, principal: str, verb: str, resource: str, *, address: str | None = None) -> Explanation:
        """Whether a client, by its id or name, may do `verb` to a resource now, and which grant says so.

        `resource`: its id or name, or '*' for any. `address`: where the client would ask from. Raises NotFound where there is no
        such client or resource here.
        """
        return self._sender.run(
            self._operations.explain(principal=principal, verb=verb, resource=resource, address=address)
        )

    def who_can(self, verb: str, resource: str) -> Holders:
        """All clients, of this tenant and others, that may do `verb` to a resource now, each with the grant that says so."""
        return self._sender.run(self._operations.who_can(verb=verb, resource=resource))


class AsyncPolicy:
    """As `Policy`."""

    def __init__(self, sender: AsyncSender, operations: Operations) -> None:
        self._sender, self._operations = sender, operations

    async def explain(self, principal: str, verb: str, resource: str, *, address: str | None = None) -> Explanation:
        """As `Policy.explain`."""
        return await self._sender.run(
            self._operations.explain(principal=principal, verb=verb, resource=resource, address=address)
        )

    async def who_can(self, verb: str, resource: str) -> Holders:
        """As `Policy.who_can`."""
        return await self._sender.run(self._operations.who_can(verb=verb, resource=resource))
