"""QEMU's migration stream: bytes to events, events to bytes. No socket, no clock, no thread.

wire.py                 every number on the wire, with QEMU's own name
cursor.py               a place in bytes that arrive in pieces
multifd.py              multifd channels, read: hello, packets, device state, epochs
multifd_encoder.py      pages as multifd packets, written
multifd_compression.py  zlib and zstd, one stream per channel
return_path.py          the destination's side of the main connection, both ways
channel.py              identify(): which channel is this connection?
channel_rules.py        what each QEMU does about that, as tables
lifecycle.py            migration and postcopy states, as transition tables
mapped_ram.py           RAM at fixed places in a file, both ways
"""
