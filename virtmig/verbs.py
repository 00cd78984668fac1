"""THE TABLE of commands: what each one is for, its options, and lines that show it.

virsh's verbs keep virsh's options and words (`virsh help VERB`, the same from libvirt 9.0 to 12.8). From this table
are made the parser, `--help`, the man page and completion. `virtmig lab` has commands of its own, in virtmig/lab.
"""

from __future__ import annotations

import msgspec

from virtmig.options import BY_NAME, OPTIONS, Kind, Option

#: what libvirt's QEMU driver stores for "unlimited": the largest speed migrate-setspeed takes (INT64_MAX in MiB/s)
UNLIMITED_MIB_S = ((1 << 63) - 1) >> 20


class Verb(msgspec.Struct, frozen=True, kw_only=True):
    """One command. `examples` are pairs of a whole command line and what it does."""

    name: str
    help: str
    description: str = ""
    options: tuple[Option, ...] = ()
    examples: tuple[tuple[str, str], ...] = ()
    ours: bool = False  # virsh has no such command


DOMAIN = Option(name="domain", kind=Kind.STRING, help="domain name, id or uuid", positional=True, required=True)


def _switch(name: str, help: str) -> Option:
    return Option(name=name, kind=Kind.BOOL, help=help)


_RECORD = Option(name="id", kind=Kind.STRING, help="a record: its id or the beginning of one, a domain (its newest), "
                 "or last", positional=True, required=True)  # fmt: skip
#: the options of migrate that a handshake can be asked about
HANDSHAKE_OPTIONS = ("live", "postcopy", "postcopy-preempt", "parallel", "parallel-connections", "threads",
                     "comp-methods", "auto-converge", "zerocopy", "copy-storage-all", "strict")  # fmt: skip

# fmt: off
VERBS: tuple[Verb, ...] = (
    Verb(
        name="migrate", help="migrate domain to another host", options=OPTIONS,
        description="Migrate domain to another host. Add --live for live migration. Every option of virsh migrate "
        "has virsh's meaning; what cannot be is refused before anything starts.",
        examples=(
            ("virtmig migrate --live web01 qemu+ssh://host-b/system", "move a running guest, with live progress"),
            ("virtmig migrate --live web01 qemu+ssh://host-b/system --plan",
             "start nothing; show what would be done, and why"),
            ("virtmig migrate --live web01 qemu+ssh://host-b/system --postcopy --postcopy-after-precopy",
             "one pass of pre-copy, then run on host-b and fetch the rest"),
            ("virtmig migrate --live web01 qemu+ssh://host-b/system --threads 4 --bandwidth 1000",
             "four parallel connections, at most 1000 MiB/s"),
            ("virtmig migrate --live web01 qemu+ssh://host-b/system --transport relay",
             "through the agents of both hosts: agreed on first, encrypted, and a broken network is only a pause"),
            ("virtmig migrate --live web01 qemu+ssh://host-b/system --timeout 120 --timeout-abort --json",
             "give up after two minutes; JSON lines for a program"),
        ),
    ),
    Verb(
        name="watch", help="show a running migration, whoever started it", options=(DOMAIN,), ours=True,
        description="Show the progress of a migration that is under way on the source host, started by virtmig, "
        "virsh or anything else. Leaving the view leaves the migration alone.",
        examples=(("virtmig watch web01", "follow the migration of web01"),),
    ),
    Verb(
        name="domjobinfo", help="domain job information", description="Returns information about jobs running on a "
        "domain.",
        options=(
            DOMAIN,
            _switch("completed", "return statistics of a recently completed job"),
            _switch("keep-completed", "don't destroy statistics of a recently completed job when reading"),
            _switch("anystats", "print statistics for any kind of job (even failed ones)"),
            _switch("rawstats", "print the raw data returned by libvirt"),
        ),
        examples=(("virtmig domjobinfo web01 --completed", "the numbers of the migration that has just ended"),),
    ),
    Verb(
        name="domjobabort", help="abort active domain job", description="Aborts the currently running domain job.",
        options=(DOMAIN, _switch("postcopy", "interrupt post-copy migration")),
        examples=(("virtmig domjobabort web01", "stop the migration; the guest stays where it is"),),
    ),
    Verb(
        name="migrate-postcopy", help="switch running migration from pre-copy to post-copy",
        description="Switch running migration from pre-copy to post-copy. The migration must have been started with "
        "--postcopy option.",
        options=(DOMAIN,), examples=(("virtmig migrate-postcopy web01", "run on the destination from now on"),),
    ),
    Verb(
        name="migrate-setmaxdowntime", help="set maximum tolerable downtime",
        description="Set maximum tolerable downtime of a domain which is being live-migrated to another host.",
        options=(
            DOMAIN,
            Option(name="downtime", kind=Kind.NUMBER, help="maximum tolerable downtime for migration",
                   unit="ms", minimum=1, maximum=2_000_000, positional=True, required=True),
        ),
        examples=(("virtmig migrate-setmaxdowntime web01 500", "let the guest stand still for half a second"),),
    ),
    Verb(
        name="migrate-getmaxdowntime", help="get maximum tolerable downtime",
        description="Get maximum tolerable downtime of a domain which is being live-migrated to another host, in "
        "milliseconds.",
        options=(DOMAIN,), examples=(("virtmig migrate-getmaxdowntime web01", "300 unless it was set"),),
    ),
    Verb(
        name="migrate-setspeed", help="set the maximum migration bandwidth",
        description="Set the maximum migration bandwidth (in MiB/s) for a domain which is being migrated to another "
        "host. libvirt keeps the pre-copy value for later migrations.",
        options=(
            DOMAIN,
            Option(name="bandwidth", kind=Kind.NUMBER, help="migration bandwidth limit", unit="MiB/s", minimum=0,
                   maximum=UNLIMITED_MIB_S, positional=True, required=True),
            _switch("postcopy", "set post-copy migration bandwidth"),
        ),
        examples=(("virtmig migrate-setspeed web01 100", "at most 100 MiB/s from now on"),),
    ),
    Verb(
        name="migrate-getspeed", help="get the maximum migration bandwidth",
        description="Get the maximum migration bandwidth (in MiB/s) for a domain; 8796093022207 is libvirt's word for "
        "no limit.",
        options=(DOMAIN, _switch("postcopy", "get post-copy migration bandwidth")),
        examples=(("virtmig migrate-getspeed web01 --postcopy", "the limit of the post-copy phase"),),
    ),
    Verb(
        name="migrate-compcache", help="get/set compression cache size",
        description="Get/set size of the cache (in bytes) used for compressing repeatedly transferred memory pages "
        "during live migration.",
        options=(
            DOMAIN,
            Option(name="size", kind=Kind.NUMBER, help="requested size of the cache used for compression",
                   unit="bytes", minimum=4096, maximum=1 << 62, power_of_two=True),
        ),
        examples=(("virtmig migrate-compcache web01 --size 134217728", "128 MiB for xbzrle"),),
    ),
    Verb(
        name="receive", help="be the destination of a QEMU's migration: keep the guest in a folder", ours=True,
        description="Listen for one migration from a QEMU of any age (`migrate` in its monitor, or libvirt with a "
        "migration URI) and keep the guest at rest in FOLDER: RAM, device state, sums. The source is told of success "
        "only when all is on the disk; after any failure before, its guest runs on. Resume the source's guest "
        "afterwards, and the folder is a checkpoint of it.",
        options=(
            Option(name="address", kind=Kind.STRING, help="where to listen: tcp:HOST:PORT or unix:PATH",
                   positional=True, required=True),
            Option(name="into", kind=Kind.STRING, help="the folder that is made; with --recover also the interrupted "
                   "one itself", required=True),
            Option(name="parallel-connections", kind=Kind.NUMBER, help="number of the source's multifd channels "
                   "(nothing on the wire tells it)", minimum=1, maximum=255),
            _switch("recover", "go on with a postcopy into that folder that was interrupted"),
            _switch("switchover-ack", "the source has switchover-ack on (only for machine types up to 8.0 or without a "
                    "version)"),
            Option(name="stall-timeout", kind=Kind.NUMBER, help="a source that sends nothing for so long has failed "
                   "(default 60)", unit="s", minimum=1, maximum=86_400),
            Option(name="recover-timeout", kind=Kind.NUMBER, help="how long a broken postcopy waits for its source "
                   "(default: until it is stopped)", unit="s", minimum=1, maximum=1_000_000),
            _switch("json", "what happened, as JSON lines"),
        ),
        examples=(
            ("virtmig receive tcp::4444 --into /srv/web01.image --parallel-connections 4",
             "then, in the source's monitor: migrate tcp:HOST:4444"),
        ),
    ),
    Verb(
        name="send", help="be the source of a migration into a QEMU: restore a guest from a folder", ours=True,
        description="Restore a guest that `virtmig receive` keeps into a QEMU that was started with -incoming defer "
        "and told to listen. With --postcopy the guest runs at once and its pages come when it touches them. What was "
        "sent where is kept in FOLDER/sent.json, and an image that may run elsewhere is not sent a second time. Of the "
        "guest it was taken from nothing is known: where that one was resumed, the first sending makes a second copy.",
        options=(
            Option(name="folder", kind=Kind.STRING, help="the image", positional=True, required=True),
            Option(name="address", kind=Kind.STRING, help="where QEMU listens: tcp:HOST:PORT or unix:PATH",
                   positional=True, required=True),
            Option(name="qemu", kind=Kind.CHOICE, help="version of the destination's QEMU (default 11.1)",
                   choices=("7.2", "10.0", "11.1")),
            _switch("postcopy", "run the guest at once (its QEMU needs postcopy-ram)"),
            _switch("postcopy-preempt", "a channel of its own for the pages that the guest waits for"),
            Option(name="parallel-connections", kind=Kind.NUMBER, help="number of multifd channels, as set at the QEMU",
                   minimum=1, maximum=255),
            Option(name="comp-methods", kind=Kind.CHOICE, help="compression of the multifd channels",
                   choices=("zlib", "zstd")),
            Option(name="bandwidth", kind=Kind.NUMBER, help="limit of what no fault waits for", unit="MiB/s", minimum=1,
                   maximum=UNLIMITED_MIB_S),
            _switch("recover", "go on with a postcopy that was interrupted"),
            _switch("again", "although it was sent before and may run there: a second copy of one guest, with its "
                    "addresses and on its disks; with --recover: although its record was lost"),
            _switch("verify", "compare the image with its sums first"),
            Option(name="stall-timeout", kind=Kind.NUMBER, help="a QEMU that takes nothing for so long has failed "
                   "(default 60)", unit="s", minimum=1, maximum=86_400),
            _switch("json", "what happened, as JSON lines"),
        ),
        examples=(
            ("virtmig send /srv/web01.image tcp:127.0.0.1:4445 --postcopy", "the guest runs at once"),
            ("virtmig send /srv/web01.image tcp:127.0.0.1:4446 --postcopy --recover",
             "after a broken connection and migrate-recover"),
        ),
    ),
    Verb(
        name="show-xml", help="show the domain XML that the destination would get, and what differs", ours=True,
        description="Fits the domain's XML to the destination by the rules in /etc/virtmig/rules.d (grammar: "
        "xml/virtmig-rules.rng, example: xml/rules/example.xml) and shows every change with its rule. What the guest "
        "sees is never changed: a rule that would is refused, with every difference.",
        options=(
            DOMAIN,
            Option(name="desturi", kind=Kind.STRING, help="connection URI of the destination host", positional=True,
                   required=True),
            Option(name="rules", kind=Kind.STRING, help="a file of rules or a folder of them, or more separated by "
                   "commas, instead of /etc/virtmig/rules.d"),
            _switch("json", "the new XML and the changes as JSON (passwords included)"),
        ),
        examples=(("virtmig show-xml web01 qemu+ssh://host-b/system", "before the first migration"),),
    ),
    Verb(
        name="inspect", help="show what a recorded migration or a saved guest holds", ours=True,
        description="Show a migration stream, a file of virsh save, a mapped-ram file, the folder of virtmig receive "
        "(whole or on its way), one channel of a migration or a folder with all of them (CHANNEL.s2d.xz): which QEMU "
        "may have written it, machine, capabilities, RAM blocks, pages by kind, multifd packets, commands, device "
        "sections and their fields. A damaged file is shown up to the damage, and the exit status is 1.",
        options=(
            Option(name="file", kind=Kind.FILE, help="a file, a folder, or - for standard input", positional=True,
                   required=True),
            _switch("events", "one line an event, with its offset"),
            _switch("json", "the same as JSON: one object, or with --events one a line"),
        ),
        examples=(
            ("virtmig inspect web01.save", "what virsh save wrote"),
            ("virtmig inspect recording/ --json", "all channels of a recording, for a program"),
            ("virtmig inspect - --events", "a stream from a pipe, as it comes"),
        ),
    ),
    Verb(
        name="list", help="list migrations that were recorded, the newest first", ours=True,
        description="Every migration that virtmig runs leaves a record ($VIRTMIG_RECORDS, /var/lib/virtmig/records of "
        "root, ~/.local/state/virtmig/records of others). Those that libvirt's hook alone has seen here, which virsh, "
        "Nova or another host ran, stand among them with what the hook knows: came, left, vetoed (virtmig hooks).",
        options=(
            Option(name="domain", kind=Kind.STRING, help="those of this domain alone", positional=True),
            Option(name="limit", kind=Kind.NUMBER, help="at most so many (default 20)", minimum=1, maximum=10_000),
            _switch("json", "one object a line"),
        ),
        examples=(("virtmig list web01", "every migration of web01"),),
    ),
    Verb(
        name="show", help="show the record of one migration", ours=True, options=(
            _RECORD,
            _switch("json", "every row of the record, one a line"),
            _switch("redact", "the same without names, addresses and paths, for a bug report"),
        ),
        examples=(("virtmig show last", "the newest"),
                  ("virtmig show web01 --redact > report.jsonl", "for a bug report")),
    ),
    Verb(name="logs", help="what happened in a migration, second by second", ours=True, options=(_RECORD,),
         examples=(("virtmig logs web01", "of web01's newest migration"),)),
    Verb(name="explain", help="a migration in sentences: what was decided and why, and what bounded it", ours=True,
         options=(_RECORD,), examples=(("virtmig explain last", "why did it take so long?"),)),
    Verb(
        name="report", help="write the report of a migration: one HTML file with charts, for a browser", ours=True,
        description="The file needs no network and no JavaScript. The same as migrate --report FILE.",
        options=(_RECORD, Option(name="output", kind=Kind.STRING, help="the file (default: ID.html)"),),
        examples=(("virtmig report last --output /tmp/last.html", "then open it in a browser"),),
    ),
    Verb(name="compare", help="two migrations beside each other", ours=True,
         options=(_RECORD,
                  Option(name="other", kind=Kind.STRING, help="the other one", positional=True, required=True)),
         examples=(("virtmig compare 20261101-101500-a1b2c3 last", "did it get better?"),)),
    Verb(
        name="replay", help="what another policy would have decided in a recorded migration", ours=True,
        options=(_RECORD, Option(name="policy", kind=Kind.FILE, required=True, help="a TOML file with the fields of a "
                                 "policy, for example on_stall = \"abort\"")),
        examples=(("virtmig replay last --policy strict.toml", "before a policy is used for all"),),
    ),
    Verb(
        name="agent", help="run the agent of this host", ours=True,
        description="The service that other hosts' agents and this host's clients talk to: it says what this host can "
        "do, agrees on migrations, and carries QEMU's channels over the network (--transport relay). Normally started "
        "by systemd; its settings are in /etc/virtmig/agent.toml.",
        options=(
            Option(name="config", kind=Kind.FILE, help="settings, instead of /etc/virtmig/agent.toml"),
            Option(name="listen", kind=Kind.STRING, help="addresses instead of those of the settings, separated by "
                   "commas: tcp:HOST:PORT, unix:PATH"),
            _switch("stdio", "carry standard input and output to this host's agent, which is started when none runs: "
                    "what the agent of another host calls over ssh"),
            _switch("local-only", "listen on the clients' socket alone"),
            Option(name="idle-exit", kind=Kind.NUMBER, help="end when nothing was to be done for so long", unit="s",
                   minimum=1, maximum=86_400),
        ),
        examples=(
            ("virtmig agent --listen tcp:0.0.0.0:16515", "in a terminal, to try it"),
        ),
    ),
    Verb(
        name="api", help="serve the HTTP API, its page and metrics", ours=True,
        description="Plan, start, watch and steer migrations over HTTP, and show them on one page. A migration that it "
        "starts is a process of its own and goes on when the API ends. Needs virtmig[api].",
        options=(
            Option(name="listen", kind=Kind.STRING, help="unix:PATH (default: api.sock beside the agent's socket) or "
                   "tcp:HOST:PORT, which is mutual TLS (no port: 16516)"),
            _switch("plain", "tcp without TLS, on loopback alone: every user of this host may come in"),
            Option(name="config", kind=Kind.FILE, help="agent.toml, for its tls, allow and local rows"),
        ),
        examples=(("virtmig api", "on the unix socket"),
                  ("virtmig api --listen tcp:127.0.0.1:16516 --plain", "then open http://127.0.0.1:16516/")),
    ),
    Verb(
        name="handshake", help="let two agents shake hands, and show what they agree on", ours=True,
        description="Opens a session between this host's agent and another one, every channel included, shows each "
        "message and the agreement, and ends it. Nothing is migrated.",
        options=(
            Option(name="source", kind=Kind.STRING, help="socket of the source's agent, or local", positional=True,
                   required=True),
            Option(name="destination", kind=Kind.STRING, help="the other agent: tcp:HOST:PORT, unix:PATH or ssh:HOST",
                   positional=True, required=True),
            Option(name="domain", kind=Kind.STRING, help="the guest that would be migrated", positional=True),
            *(BY_NAME[name] for name in HANDSHAKE_OPTIONS),
            _switch("json", "every message and the agreement as JSON lines"),
        ),
        examples=(
            ("virtmig handshake local tcp:host-b:16515 --parallel-connections 10 --parallel",
             "would host-b take ten connections?"),
        ),
    ),
    Verb(
        name="order", help="put a migration's connections in the order that an old QEMU needs", ours=True,
        description="For a destination on its own, without agents and handshake: QEMU 7.2 takes the first connection "
        "for the main stream, whatever it is. This listens in the place of the destination's QEMU, names each "
        "connection by its first bytes, and connects them to QEMU one by one, main first; strangers are turned away. "
        "QEMU's own TLS hides those bytes and cannot be used with it.",
        options=(
            Option(name="listen", kind=Kind.STRING, help="where the source connects: tcp:HOST:PORT or unix:PATH",
                   positional=True, required=True),
            Option(name="qemu", kind=Kind.STRING, help="where the destination's QEMU listens: tcp:HOST:PORT or "
                   "unix:PATH", positional=True, required=True),
            Option(name="parallel-connections", kind=Kind.NUMBER, help="number of the source's multifd channels "
                   "(nothing on the wire tells it)", minimum=1, maximum=255),
            _switch("postcopy-preempt", "the source has a preempt channel"),
        ),
        examples=(
            ("virtmig order tcp:10.0.0.2:49200 tcp:127.0.0.1:49200 --parallel-connections 4",
             "on the destination; then virsh migrate --parallel --parallel-connections 4 --migrateuri "
             "tcp://10.0.0.2:49200 --listen-address 127.0.0.1"),
        ),
    ),
    Verb(
        name="recover", help="finish a postcopy that broke, as this host's agent remembers it", ours=True,
        description="Where a postcopy through the agents was broken off, the source's agent remembers how it was "
        "started; this resumes it.",
        options=(
            DOMAIN,
            Option(name="agent", kind=Kind.STRING, help="socket of this host's agent"),
            Option(name="transport", kind=Kind.CHOICE, help="who moves the rest", choices=("relay", "direct")),
        ),
        examples=(("virtmig recover web01", "go on where it broke"),),
    ),
    Verb(
        name="hooks", help="libvirt's hook on this host: fit incoming guests, refuse them, note what comes and goes",
        ours=True,
        description="libvirt runs the hook for every guest that comes in, whoever sends it: virsh, Nova or virtmig. It "
        "fits the XML by the rules of this host, notes every phase, and refuses a guest only where "
        "/etc/virtmig/hook.toml requires something. install puts it beside the hooks of others; test shows what it "
        "would do to a guest; history lists what it saw.",
        options=(
            Option(name="action", kind=Kind.CHOICE, help="what to do", choices=("install", "remove", "status", "test",
                   "history"), positional=True, required=True),
            Option(name="file", kind=Kind.FILE, help="test: a domain XML, or - for standard input", positional=True),
            Option(name="source-host", kind=Kind.STRING, help="test: as if it came from this host"),
            Option(name="operation", kind=Kind.STRING, help="test: another operation of libvirt's than migrate"),
            Option(name="config", kind=Kind.FILE, help="settings, instead of /etc/virtmig/hook.toml"),
            Option(name="folder", kind=Kind.STRING, help="libvirt's hooks, instead of /etc/libvirt/hooks"),
            Option(name="limit", kind=Kind.NUMBER, help="history: at most so many (default 20)", minimum=1,
                   maximum=10_000),
            _switch("json", "status and history as JSON"),
        ),
        examples=(
            ("virtmig hooks install", "on the destination, as root"),
            ("virtmig hooks test web01.xml --source-host host-a", "what would it do to this guest?"),
            ("virtmig hooks history", "guests that came and went, whoever moved them"),
        ),
    ),
    Verb(
        name="doctor", help="check whether the hosts are ready to migrate, and say how to fix what is not", ours=True,
        description="PASS, WARN and FAIL lines for this host and, when given, for the destination; each finding comes "
        "with the command that fixes it.",
        options=(
            Option(name="desturi", kind=Kind.STRING, help="connection URI of the destination host", positional=True),
            _switch("json", "the findings as JSON"),
        ),
        examples=(("virtmig doctor qemu+ssh://host-b/system", "check both ends before the first migration"),),
    ),
    Verb(
        name="lab", help="two libvirt hosts and a self-checking guest on this machine, to try things on", ours=True,
        examples=(("virtmig lab up", "start both hosts and the guest"),
                  ("virtmig lab down", "leave nothing running")),
    ),
    Verb(
        name="completion", help="print the completion script of a shell", ours=True,
        description="Print the script that completes virtmig's commands, options, domain names and URIs.",
        options=(Option(name="shell", kind=Kind.CHOICE, help="which shell", choices=("bash", "zsh", "fish"),
                        positional=True, required=True),),
        examples=(('eval "$(virtmig completion bash)"', "in ~/.bashrc"),
                  ('eval "$(virtmig completion zsh)"', "in ~/.zshrc"),
                  ("virtmig completion fish > ~/.config/fish/completions/virtmig.fish", "once, for fish")),
    ),
    Verb(
        name="help", help="print help", description="Prints global help or command specific help.",
        options=(
            Option(name="command", kind=Kind.STRING, help="name of command", positional=True),
            _switch("man", "print the manual page, for man -l or groff -man"),
        ),
        examples=(("virtmig help migrate", "every option of migrate"),
                  ("virtmig help --man | man -l -", "the whole manual page")),
    ),
    Verb(name="version", help="show the versions of virtmig and of the libvirt it uses",
         description="The versions of virtmig, of the libvirt library it uses and of Python.",
         examples=(("virtmig version", "for a bug report"),)),
)
# fmt: on

VERB_BY_NAME: dict[str, Verb] = {verb.name: verb for verb in VERBS}


class GlobalOption(msgspec.Struct, frozen=True, kw_only=True):
    """An option that goes before the command. Without a metavar it takes no value; `short` is one letter."""

    name: str
    help: str
    short: str = ""
    metavar: str = ""
    ours: bool = False


# fmt: off
GLOBAL_OPTIONS: tuple[GlobalOption, ...] = (
    GlobalOption(name="connect", short="c", metavar="URI", help="hypervisor connection URI of the source host"),
    GlobalOption(name="debug", short="d", metavar="NUM", help="debug level [0-4], 0 says most and shows tracebacks"),
    GlobalOption(name="help", short="h", help="this help"),
    GlobalOption(name="keepalive-interval", short="k", metavar="NUM", help="keepalive interval in seconds, "
                 "0 for disable"),
    GlobalOption(name="keepalive-count", short="K", metavar="NUM", help="number of possible missed keepalive messages"),
    GlobalOption(name="log", short="l", metavar="FILE", help="output logging to file"),
    GlobalOption(name="quiet", short="q", help="quiet mode"),
    GlobalOption(name="readonly", short="r", help="connect readonly"),
    GlobalOption(name="timing", short="t", help="print timing information"),
    GlobalOption(name="version", short="v", help="short version; -V or --version=long for the long one"),
    GlobalOption(name="no-color", help="no colours; the same as NO_COLOR in the environment", ours=True),
)

#: (name, what it does), for --help and the man page
ENVIRONMENT: tuple[tuple[str, str], ...] = (
    ("LIBVIRT_DEFAULT_URI", "the source host when there is no --connect; libvirt reads it"),
    ("VIRSH_DEFAULT_CONNECT_URI", "the same, virsh's older name"),
    ("VIRTMIG_DEBUG", "as --debug: 0 to 4; any other text means 0"),
    ("VIRTMIG_LOG_FILE", "as --log"),
    ("NO_COLOR", "no colours when it is set and not empty"),
)

EXIT_STATUS: tuple[tuple[str, str], ...] = (
    ("0", "it was done"),
    ("1", "anything else; with --exit-codes fine: it failed, and the guest runs on the source as before"),
    ("2", "inspect: there was nothing to be shown (no such file, or no recording)"),
    ("3", "with --exit-codes fine: refused, nothing was started"),
    ("4", "with --exit-codes fine: aborted on request, the guest runs on the source"),
    ("5", "with --exit-codes fine: the guest needs attention"),
)
# fmt: on
