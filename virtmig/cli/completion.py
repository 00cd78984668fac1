"""What the shells offer for a value: choices, files, domain names and URIs. click speaks to the shells.

libvirt is asked for domain names with a limit of one second, in a thread that the end of the process takes along:
a shell must never hang on a dead host. For bash the words come from the line itself and not from COMP_WORDS, which
bash cuts at every `:` and `=`, as if `qemu+ssh://host/system` were three words.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from click.shell_completion import BashComplete, CompletionItem, add_completion_class, split_arg_string

from virtmig.options import Kind, Option

ANSWER_WITHIN_S = 1.0

#: what a destination or --connect may begin with, beside the aliases of libvirt.conf
URIS = ("qemu:///system", "qemu:///session", "qemu+ssh://", "qemu+tls://", "qemu+tcp://", "qemu+unix:///system?socket=")


def complete_value(row: Option, incomplete: str, *, connect: str | None = None) -> list[CompletionItem]:
    if row.kind is Kind.FILE:
        return [CompletionItem(incomplete, type="file")]
    if row.kind is Kind.LIST and row.choices:
        given, comma, _ = incomplete.rpartition(",")
        taken = given.split(",")
        return _beginning(incomplete, [given + comma + word for word in row.choices if word not in taken])
    if row.choices:
        return _beginning(incomplete, list(row.choices))
    if row.name == "domain":
        return _beginning(incomplete, within(ANSWER_WITHIN_S, lambda: domain_names(connect)))
    if row.name == "desturi":
        return complete_uri(incomplete)
    if row.name == "command":
        from virtmig.verbs import VERBS

        return _beginning(incomplete, [verb.name for verb in VERBS])
    return []


def complete_uri(incomplete: str) -> list[CompletionItem]:
    return _beginning(incomplete, [*uri_aliases(os.environ), *URIS])


def _beginning(incomplete: str, values: list[str]) -> list[CompletionItem]:
    return [CompletionItem(value) for value in values if value.startswith(incomplete)]


def within(seconds: float, ask: Callable[[], list[str]]) -> list[str]:
    """What `ask` returns, or nothing when it takes longer or fails: a completion is never an error."""
    answers: list[str] = []

    def collect() -> None:
        try:
            answers.extend(ask())
        except Exception:  # the shell wants words or nothing: there is nowhere to report to
            answers.clear()

    thread = threading.Thread(target=collect, name="virtmig-completion", daemon=True)
    thread.start()
    thread.join(seconds)
    return [] if thread.is_alive() else answers


def domain_names(connect: str | None) -> list[str]:
    from virtmig.virt.connection import connected

    with connected(connect, readonly=True) as connection:
        return sorted(domain.name() for domain in connection.listAllDomains())


def uri_aliases(environment: Mapping[str, str]) -> list[str]:
    """The names in `uri_aliases` of the client's libvirt.conf (src/util/virconf.c virConfLoadConfigPath)."""
    if os.geteuid() == 0:
        path = Path("/etc/libvirt/libvirt.conf")
    else:
        home = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "/")) / ".config"
        path = Path(home) / "libvirt" / "libvirt.conf"
    try:
        return read_aliases(path.read_text(errors="replace"))
    except OSError:
        return []


def read_aliases(text: str) -> list[str]:
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found = re.search(r"^\s*uri_aliases\s*=\s*\[([^\]]*)\]", lines, re.MULTILINE)
    return re.findall(r"""["']([^"'=]+)=""", found[1]) if found else []


_SOURCE_BASH = """\
%(complete_func)s() {
    local type value
    COMPREPLY=()
    while IFS=, read -r type value; do
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                [[ $value == *[/=,] ]] && compopt -o nospace ;;
        esac
    done < <(env COMP_LINE="${COMP_LINE:0:COMP_POINT}" COMP_WORDBREAKS="$COMP_WORDBREAKS" \\
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}

complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class LineBashComplete(BashComplete):
    """bash, from COMP_LINE: URIs and `--opt=value` stay whole."""

    name = "bash"
    source_template = _SOURCE_BASH
    #: how many characters of the last value bash has already cut off as words of their own
    cut = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = words.pop() if len(words) > 1 and not line[-1:].isspace() else ""
        value = incomplete.partition("=")[2] if incomplete.startswith("--") else incomplete
        breaks = os.environ.get("COMP_WORDBREAKS", "")
        self.cut = max(value.rfind(mark) + 1 for mark in ":=" if mark in breaks) if set(":=") & set(breaks) else 0
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{item.value[self.cut :]}"


add_completion_class(LineBashComplete)


def completion_script(shell: str, program: object) -> str:
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    if kind is None:
        raise ValueError(f"click completes no {shell}")
    return kind(program, {}, "virtmig", "_VIRTMIG_COMPLETE").source()  # type: ignore[arg-type]
