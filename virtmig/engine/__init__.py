"""Threads, sockets, guest memory and userfaultfd: what gives stream/ its bytes and takes its events.

transport.py         addresses, connections, listeners; every wait ends by its bytes, the peer, a stall or a stop
channels.py          connections that arrive, named by stream/channel.py
memory.py image.py   RAM that is mapped; a guest at rest in a folder

incoming.py          a destination: one thread a channel, pause, commit
loading.py           what the stream's events mean to it
manifest.py          what an image says of itself, read without trust
interrupted.py       unfinished images, and who works on one
patience.py          what a destination waits for: its source again, room on the disk
switchover_ack.py    when a source waits for SWITCHOVER_ACK
landing.py           where the guest lands: an image, or (process_landing.py) a process

outgoing.py          a source, of an image; live.py: of a process guest that runs
lazy.py answers.py multifd_sender.py      what is left to send; what the destination says; the channels' threads

lines.py relay.py    between two agents: one connection; one of QEMU's, carried over it
agents.py            asking this host's agent

process_guest.py guest_walk.py            a guest without a hypervisor, and what its memory must hold
userfault.py faults.py dirty.py           userfaultfd; faults served; written pages found
demo.py demo_engine.py                    all of it shown where there is no QEMU
"""
