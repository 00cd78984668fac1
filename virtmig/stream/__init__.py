"""QEMU's migration stream: bytes to events, events to bytes. No socket, no clock, no thread.

wire.py                 every number on the wire, with QEMU's own name
cursor.py               a place in bytes that arrive in pieces
events.py               what a main stream says, element by element
decoder.py              main and preempt, read: header, sections, commands, package, description
encoder.py              the same written: any events, or a source's calls
commands.py             commands both ways, and the order they must come in
ram.py                  RAM records both ways, in runs
xbzrle.py               a page as its difference to the last one
device.py               where a device's section ends, and its fields by name
save_file.py            what libvirt writes before the stream in a file of virsh save
multifd.py              multifd channels, read: hello, packets, device state, epochs
multifd_encoder.py      pages as multifd packets, written
multifd_compression.py  zlib and zstd, one stream per channel
return_path.py          the destination's side of the main connection, both ways
channel.py              identify(): which channel is this connection?
channel_rules.py        what each QEMU does about that, as tables
multifd_epochs.py       syncs of all channels against the marks on main
summary.py              what a stream holds, counted (virtmig inspect); summary_rows.py its result
version_guess.py        which QEMU wrote it, and why
lifecycle.py            migration and postcopy states, as transition tables
mapped_ram.py           RAM at fixed places in a file, both ways
"""
