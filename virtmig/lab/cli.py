"""`virtmig lab ...`: two libvirt hosts on this machine, for trying out and for tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click

from virtmig.errors import LabError


def _folder(name: str, folder: str) -> Path:
    from virtmig.lab.lab import default_folder

    return Path(folder) if folder else default_folder(name)


def _which(command: Callable[..., None]) -> Callable[..., None]:
    command = click.option("--dir", "folder", default="", metavar="FOLDER", help="the lab's folder (short!)")(command)
    return click.option("--name", default="", help="a second lab beside the default one")(command)


@click.group(help="Two libvirt hosts and self-checking guests on this machine.", no_args_is_help=True)
def lab() -> None:
    pass


@lab.command(help="Start two hosts and guests; print their URIs.")
@_which
@click.option("--form", type=click.Choice(["auto", "full", "session"]), default="auto", show_default=True,
              help="full: namespaces, needs root; session: any user, no postcopy")  # fmt: skip
@click.option("--guests", type=click.IntRange(0, 64), default=1, show_default=True, help="how many guests")
@click.option("--memory", type=click.IntRange(16, 3072), default=128, show_default=True, help="MiB of each guest")
@click.option("--dirty", default="8", show_default=True, help="MiB/s each guest writes; 0, or max")
@click.option("--walk", type=click.IntRange(1), default=None, help="MiB the guest walks over [default: all that fits]")
@click.option("--bandwidth", type=click.FloatRange(min=0.1), default=None, help="Mbit/s of the link, each way (full)")
@click.option("--delay", type=click.FloatRange(0), default=0.0, help="ms of delay, each way (full)")
@click.option("--loss", type=click.FloatRange(0, 100), default=0.0, help="%% of packets lost, each way (full)")
@click.option("--persistent", is_flag=True, help="define the guests, instead of transient ones")
def up(
    name: str,
    folder: str,
    form: str,
    guests: int,
    memory: int,
    dirty: str,
    walk: int | None,
    bandwidth: float | None,
    delay: float,
    loss: float,
    persistent: bool,
) -> None:
    from virtmig.lab.guest import GuestSettings
    from virtmig.lab.lab import Lab
    from virtmig.lab.link import Shape

    settings = [
        GuestSettings(
            name="guest" if guests == 1 else f"guest{number}",
            memory_mib=memory,
            walk_mib=walk,
            dirty_mib_s=_rate(dirty),
        )
        for number in range(1, guests + 1)
    ]
    for each in settings:  # an impossible size is refused before anything starts
        each.pages  # noqa: B018
    shape = Shape(bandwidth_mbit_s=bandwidth, delay_ms=delay, loss_percent=loss)
    made = Lab.up(_folder(name, folder), form=form, shape=shape)
    try:
        for each in settings:
            made.start_guest(each, persistent=persistent)
    except BaseException:
        made.down()
        raise
    a, b = made.a.uri, made.b.uri
    print(f"host a: {a}\nhost b: {b}")
    if settings:
        print(f"try:    virsh -c '{a}' migrate --live --verbose {settings[0].name} '{b}'")
        print(f"        virtmig -c '{a}' migrate --live {settings[0].name} '{b}'")


@lab.command(help="What runs where.")
@_which
def status(name: str, folder: str) -> None:
    from virtmig.lab.lab import Lab

    made = Lab.opened(_folder(name, folder))
    print(f"{made.state.form} lab in {made.folder}")
    for host in made.hosts:
        alive = host.state.keeper is not None and host.state.keeper.alive
        print(f"host {host.name}: {host.uri} {'' if alive else '(down)'}".rstrip())
    if made.full:
        shape = made.link.state.shape
        rate = f"{shape.bandwidth_mbit_s:g} Mbit/s" if shape.bandwidth_mbit_s else "unlimited"
        cut = ", cut" if made.link.state.cut else ""
        print(f"link: {rate}, delay {shape.delay_ms:g} ms, loss {shape.loss_percent:g} %{cut}")
    for guest in made.state.guests:
        places = ", ".join(f"{where}: {state}" for where, state in made.where(guest.name).items())
        print(f"guest {guest.name}: {guest.memory_mib} MiB; {places}")


@lab.command("exec", help="Run COMMAND on host A or B: in its namespaces, or with its environment.",
             context_settings={"ignore_unknown_options": True})  # fmt: skip
@_which
@click.argument("host", type=click.Choice(["a", "b"]))
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def exec_(name: str, folder: str, host: str, command: tuple[str, ...]) -> None:
    from virtmig.lab.lab import Lab

    made = Lab.opened(_folder(name, folder))
    chosen = made.a if host == "a" else made.b
    sys.exit(subprocess.run(chosen.command(list(command))).returncode)


@lab.command(help="Suspend GUEST wherever it runs, check every byte of its memory, resume it.")
@_which
@click.argument("guest", default="guest")
def check(name: str, folder: str, guest: str) -> None:
    from virtmig.lab.lab import Lab
    from virtmig.lab.memory_check import check_domain
    from virtmig.virt.connection import connected, lookup_domain

    made = Lab.opened(_folder(name, folder))
    settings = made.guest(guest)
    running = [host for host in made.hosts if made.where(guest)[host.name].split(" ")[0] in ("running", "paused")]
    if not running:
        raise LabError(f"{guest} runs on neither host", hint=f"virtmig lab status --dir {made.folder}")
    for host in running:
        with connected(host.uri) as connection:
            result = check_domain(lookup_domain(connection, settings.uuid), settings.pages)
        print(f"{guest} on host {host.name}: {result.checked_bytes >> 20} MiB, every byte as it must be")


@lab.command(help="Change the link of a running lab (what is not given stays), cut it, or restore it.")
@_which
@click.option("--bandwidth", type=click.FloatRange(min=0), default=None, help="Mbit/s, each way; 0: unlimited")
@click.option("--delay", type=click.FloatRange(0), default=None, help="ms, each way")
@click.option("--loss", type=click.FloatRange(0, 100), default=None, help="%%, each way")
@click.option("--cut/--restore", default=None, help="drop everything silently, or stop doing so")
def link(
    name: str, folder: str, bandwidth: float | None, delay: float | None, loss: float | None, cut: bool | None
) -> None:
    import msgspec

    from virtmig.lab.lab import Lab

    asked = {"bandwidth_mbit_s": bandwidth, "delay_ms": delay, "loss_percent": loss}
    given = {key: value for key, value in asked.items() if value is not None}
    if not given and cut is None:
        raise LabError("nothing was asked of the link", hint="--bandwidth, --delay, --loss, --cut or --restore")
    made = Lab.opened(_folder(name, folder))
    if not made.full:
        raise LabError("the session form of the lab has no link of its own", hint="run as root")
    if given:
        made.link.change(msgspec.structs.replace(made.link.state.shape, **given))
    if cut is not None:
        made.link.cut() if cut else made.link.restore()
    made.save()


@lab.command(help="End both hosts and all guests.")
@_which
def down(name: str, folder: str) -> None:
    from virtmig.lab.lab import Lab

    where = _folder(name, folder)
    if not (where / "lab.json").exists():
        print(f"no lab is up in {where}")
        return
    Lab.opened(where).down()


def _rate(text: str) -> float | None:
    if text == "max":
        return None
    try:
        return float(text)
    except ValueError:
        raise LabError(f"'{text}' is no dirty rate", hint="MiB/s, 0, or max") from None
