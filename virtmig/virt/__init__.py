"""The only importer of libvirt. Everything above speaks our nouns; everything libvirt-shaped ends here.

connection.py    open and watch connections, the event loop thread, libvirtError -> VirtError
capabilities.py  libvirt's answers -> HostFacts and GuestFacts
parameters.py    a plan -> flags and typed parameters of one migrate call
job.py           one migration job: start it, sample it, act on it, ask both hosts where the guest is
"""
