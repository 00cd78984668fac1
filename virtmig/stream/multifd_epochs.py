"""Which multifd sync belongs to which marker of the main stream (migration/multifd.c: multifd_recv_sync_main)."""

from __future__ import annotations

from virtmig.errors import RemoteProtocolError


class MultifdEpochs:
    """Syncs of all channels against the markers on main: what came before a sync is placed before what follows it.

    The marker on main is every RAM EOS for 7.2 and machine types up to 8.0, else the word MULTIFD_FLUSH. `sync` and
    `marker` return True when this arrival completed the epoch. A channel that ended, or is a whole epoch ahead of
    main's marker when main ends, leaves a QEMU destination hanging without a word; here it is an error.
    """

    def __init__(self, channels: int) -> None:
        self._syncs = [0] * channels
        self._ended = [False] * channels
        self._markers = 0
        self.completed = 0

    def sync(self, channel_id: int) -> bool:
        """This channel delivered a packet with SYNC; it must not be read on before the epoch completes."""
        self._syncs[channel_id] += 1
        return self._advance()

    def marker(self) -> bool:
        """Main delivered a marker; main must not be read on before the epoch completes."""
        self._markers += 1
        self._check()
        return self._advance()

    def end(self, channel_id: int) -> None:
        """This channel ended."""
        self._ended[channel_id] = True
        self._check()

    def waiting_for(self) -> tuple[int, ...]:
        """The channels whose sync main waits for."""
        return tuple(index for index, syncs in enumerate(self._syncs) if syncs < self._markers)

    def _check(self) -> None:
        for index in self.waiting_for():
            if self._ended[index]:
                raise RemoteProtocolError(
                    f"the channel ended after {self._syncs[index]} syncs, main waits for number {self._markers}",
                    channel=f"multifd {index}",
                )

    def _advance(self) -> bool:
        reached = min(self._markers, *self._syncs)
        if reached > self.completed:
            self.completed = reached
            return True
        return False
