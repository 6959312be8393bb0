"""What callers share, so that one of them never takes what another needs; and which caller a request is of.

A caller may hold as much as is left free: dynamic thresholds (Choudhury and Hahne, *Dynamic queue length thresholds for
shared-memory packet switches*, 1998). One caller alone gets half, two get a third each, and there is always room for
the next. The caller with most is the first to be refused.
"""

from ipaddress import IPv6Address, ip_address

from starlette.types import Scope

from quire.server.http.keys import caller_of


class Shares:
    """Of so many units of one thing. A caller without any gets what is free."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._held: dict[str, int] = {}
        self.num_held = 0

    def take(self, caller: str, amount: int = 1) -> bool:
        """Take so many, unless the caller holds more than would be left."""
        held = self._held.get(caller, 0)
        if held > self._total - self.num_held - amount:
            return False
        self._held[caller] = held + amount
        self.num_held += amount
        return True

    def give(self, caller: str, amount: int = 1) -> None:
        """Give so many back."""
        self._held[caller] = self._held.get(caller, 0) - amount
        self.num_held -= amount
        if not self._held[caller]:
            del self._held[caller]


def sharer_of(scope: Scope) -> str:
    """Whose share a request takes from: its key's; where there are no keys, that of the network it comes from."""
    return caller_of(scope) or network_of(scope.get("client"))


def network_of(client: tuple[str, int] | None) -> str:
    """Of an address: itself, and of IPv6 its first 64 bits, since one machine has all that begin with them."""
    if client is None or ":" not in client[0]:
        return "" if client is None else client[0]
    address = ip_address(client[0].partition("%")[0])
    assert isinstance(address, IPv6Address)
    return str(address.ipv4_mapped or address.packed[:8].hex())
