"""The service on each host: one port for everything, who may use it, what this host is and can do.

server.py         listens, greets whoever comes, starts sessions
session.py        one migration between two agents: one thread decides, carriers (engine/relay.py) carry
responding.py     a session that another host began
clients.py        this host's clients
meeting.py        where QEMU meets its agent, in the order that it needs
peers.py          connections between agents, dialled and accepted
journal.py        which sessions are and were
config.py         every key of agent.toml, its default and its unit
discovery.py      this host: kernel, limits, links, files, libvirt and each QEMU -> HostFacts, AgentFacts
qmp.py            one QEMU asked over QMP, started with no machine for the purpose
certificates.py   which certificates are taken, TLS both ways with them, and what its failures mean
access.py         who the peer is, and what the allow-list lets it do; the pre-shared key
limits.py         how many migrations and channels at once, and how fast together
notify.py         systemd: ready, watchdog, sockets handed over
logs.py           one line for each event: console, JSON or the journal
systemd/          units and a commented agent.toml
"""
