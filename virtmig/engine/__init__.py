"""Threads, sockets, guest memory and userfaultfd: what gives stream/ its bytes and takes its events.

transport   addresses, connections, listeners; every wait ends by a stop, a stall or the peer
memory      the guest's RAM as blocks that are mapped
image       a guest at rest in a folder
incoming    be the destination of a source          outgoing   be the source of a destination
"""
