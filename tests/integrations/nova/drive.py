"""Run by the environment that has Nova: nova.virt.libvirt.guest.Guest moves a guest, and is watched as Nova watches.

    drive.py SOURCE_URI UUID DEST_URI FLAGS [disks=a,b] [uri=URI] [parallel=N] [bandwidth=N] [then=abort|postcopy]

Prints one JSON object. virtmig is not named here: its .pth file has put it in place, or has not.
"""

import json
import sys
import threading
from importlib.metadata import version

import libvirt
from nova.virt.libvirt.guest import Guest

source_uri, uuid, destination, flags = sys.argv[1:5]
more = dict(word.split("=", 1) for word in sys.argv[5:])
libvirt.registerErrorHandler(lambda context, error: None, None)  # nova/virt/libvirt/host.py initialize
libvirt.virEventRegisterDefaultImpl()


def native_thread() -> None:
    """nova/virt/libvirt/host.py _native_thread: Nova turns libvirt's event loop by itself."""
    while True:
        libvirt.virEventRunDefaultImpl()


threading.Thread(target=native_thread, daemon=True).start()
guest = Guest(libvirt.open(source_uri).lookupByUUIDString(uuid))
watcher = libvirt.open(source_uri)
watched = Guest(watcher.lookupByUUIDString(uuid))
said = {"version": "", "error": None, "code": None, "domain": None, "samples": 0, "events": 0, "facade": False}


def lifecycle(connection: object, domain: object, event: int, detail: int, opaque: object) -> None:
    said["events"] += 1


watcher.domainEventRegisterAny(None, libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, None)
ended = threading.Event()


def migrate() -> None:
    """nova/virt/libvirt/driver.py _live_migration_operation, the call."""
    try:
        guest.migrate(
            destination,
            migrate_uri=more.get("uri"),
            migrate_disks=more["disks"].split(",") if "disks" in more else None,
            destination_xml=guest.get_xml_desc(dump_migratable=True),
            flags=int(flags),
            bandwidth=int(more.get("bandwidth", 0)),
            parallel=int(more.get("parallel", 1)),
        )
    except libvirt.libvirtError as error:
        said.update(error=str(error), code=error.get_error_code(), domain=error.get_error_domain())
    finally:
        ended.set()


said["version"] = version("nova")
said["facade"] = libvirt.virDomain.migrateToURI3.__code__.co_filename != libvirt.virDomain.name.__code__.co_filename
threading.Thread(target=migrate).start()
acted = False
while not ended.wait(0.05):  # _live_migration_monitor asks every 0.5 s
    info = watched.get_job_info()
    if info.type == libvirt.VIR_DOMAIN_JOB_UNBOUNDED and info.memory_processed:
        said["samples"] += 1
        if "then" in more and not acted:
            acted = True
            watched.migrate_configure_max_downtime(50)
            watched.abort_job() if more["then"] == "abort" else watched.migrate_start_postcopy()
print(json.dumps(said))
