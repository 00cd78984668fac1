"""Run by the environment that has VDSM: its vdsm.virt.migration.SourceThread moves a guest and watches it.

    drive.py SOURCE_URI UUID DESTINATION_HOST {minimal downtime|abort|post-copy} [bandwidth=N] [parallel=N]

Prints one JSON object. What VDSM's Vm is to that thread is below, with libvirt's real domain inside; the other host has
no VDSM, so that it creates nothing there. virtmig is not named here: its .pth file has put it in place, or has not.
"""

import json
import logging
import sys
import threading
import time

import libvirt
from vdsm.config import config

config.set("vars", "ssl", "false")
from vdsm.common import response  # noqa: E402
from vdsm.virt import cpumanagement, migration, virdomain  # noqa: E402

source_uri, uuid, host, policy = sys.argv[1:5]
more = dict(word.split("=", 1) for word in sys.argv[5:])
DOWNTIME = {"name": "setDowntime", "params": ["300"]}
SCHEDULES = {
    "minimal downtime": {"init": [DOWNTIME], "stalling": [{"limit": 100, "action": {"name": "abort", "params": []}}]},
    "abort": {"init": [DOWNTIME], "stalling": [{"limit": 0, "action": {"name": "abort", "params": []}}]},
    "post-copy": {"init": [DOWNTIME], "stalling": [{"limit": 0, "action": {"name": "postcopy", "params": []}}]},
}
said = {"error": None, "code": None, "domain": None, "events": 0, "facade": False}
libvirt.virEventRegisterDefaultImpl()


def turn() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


threading.Thread(target=turn, daemon=True).start()
connection = libvirt.open(source_uri)


class Vm:
    """vdsm/virt/vm.py, as far as the migration asks for it."""

    log = logging.getLogger("vm")
    id = uuid
    hasSpice = False
    client_ip = ""
    post_copy = migration.PostCopyPhase.NONE

    def __init__(self) -> None:
        self._dom = virdomain.Notifying(connection.lookupByUUIDString(uuid), lambda timed_out: None)

    def min_cluster_version(self, major: int, minor: int) -> bool:
        return True

    def cpu_policy(self) -> str:
        return cpumanagement.CPU_POLICY_NONE

    def migratable_domain_xml(self) -> str:
        return self._dom.XMLDesc(libvirt.VIR_DOMAIN_XML_MIGRATABLE)

    def prepare_migration(self) -> None:
        pass

    def job_stats(self) -> dict[str, object]:
        return self._dom.jobStats()

    def send_migration_status_event(self) -> None:
        said["events"] += 1

    def abort_domjob(self) -> None:
        self._dom.abortJob()

    def switch_migration_to_post_copy(self) -> bool:
        self.post_copy = migration.PostCopyPhase.REQUESTED
        self._dom.migrateStartPostCopy(0)
        return True


class Destination:
    """The other host's VDSM."""

    def migrationCreate(self, params: object, limit: object) -> object:
        return response.success()


migration.MonitorThread._MIGRATION_MONITOR_INTERVAL = 0.1
thread = migration.SourceThread(
    Vm(), dst=host, consoleAddress="127.0.0.1", autoConverge=False, convergenceSchedule=SCHEDULES[policy],
    maxBandwidth=int(more.get("bandwidth", 0)) or None, parallel=int(more["parallel"]) if "parallel" in more else None,
)  # fmt: skip
thread.remoteHost = host
thread._destServer = Destination()
said["facade"] = libvirt.virDomain.migrateToURI3.__code__.co_filename != libvirt.virDomain.name.__code__.co_filename
try:
    thread._startUnderlyingMigration(time.time(), {})
except libvirt.libvirtError as error:
    said.update(error=str(error), code=error.get_error_code(), domain=error.get_error_domain())
print(json.dumps(said | {"flags": thread.migration_flags}))
