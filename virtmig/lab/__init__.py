"""Two libvirt hosts and a self-checking guest on one machine.

guest.S, guest.bin   the boot sector: fills memory, dirties it at a set rate, prints a heartbeat
guest.py             a guest's settings -> its boot image and its domain XML
memory_check.py      is every byte of a stopped guest what it must be?
keeper.py            the process that stands for one host: namespaces, its libvirt daemon, reaping
hosts.py             one host: its folder, configuration, URI, daemon
link.py              the wire between two hosts: bandwidth, delay, loss, cut
wire.py              the forwarder that delays and loses packets where the kernel has no netem
lab.py               up, open, down
cli.py demo.py       `virtmig lab ...` and `./dev demo`
"""
