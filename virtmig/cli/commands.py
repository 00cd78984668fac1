"""What each command does. Imported only when a command runs: `--help` and completion never come here.

Each function takes parsed values and the global options, prints what virsh would print, and returns an exit status;
MigrationError and its children go up to main, which prints them.
"""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from virtmig.errors import MigrationError, PlanRefused, RequestError
from virtmig.progress import Outcome, Status, Whereabouts
from virtmig.request import MigrationRequest

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions

#: --exit-codes fine
EXIT_DONE, EXIT_FAILED, EXIT_REFUSED, EXIT_ABORTED, EXIT_ATTENTION = 0, 1, 3, 4, 5


def _connected(options: GlobalOptions) -> AbstractContextManager[Any]:
    """The connection of -c, -r, -k and -K."""
    from virtmig.virt.connection import connected

    _use_keepalive(options)
    return connected(options.connect, readonly=options.readonly)


def _use_keepalive(options: GlobalOptions) -> None:
    from virtmig.virt.connection import set_default_keepalive

    set_default_keepalive(options.keepalive_interval_s, options.keepalive_count)


def run_migrate(request: MigrationRequest, options: GlobalOptions) -> int:
    """`virtmig migrate`, and `--plan`, which starts nothing."""
    from virtmig.attempts import StopRequest
    from virtmig.cli.display import make_display, resolve_mode
    from virtmig.cli.plan_view import plan_json, print_plan
    from virtmig.cli.signals import stop_on_signals
    from virtmig.migrate import migrate, plan_only

    fine = request.text("exit-codes") == "fine"
    _use_keepalive(options)
    if "plan" in request:
        plan, _, _ = plan_only(request, source_uri=options.connect)
        if "json" in request:
            print(plan_json(plan))
        else:
            print_plan(plan, connect=options.connect or "")
        return (EXIT_REFUSED if fine else EXIT_FAILED) if plan.refusals else EXIT_DONE
    mode = resolve_mode(request, is_terminal=sys.stderr.isatty(), quiet=options.quiet)
    environ = {**os.environ, **({"NO_COLOR": "1"} if options.no_color else {})}
    display = make_display(mode, environ=environ)
    try:
        if options.readonly:
            raise MigrationError(
                "operation migrate forbidden for read only access",
                hint="leave out --readonly",
                guest=Whereabouts.SOURCE,
            )
        with stop_on_signals(StopRequest()) as stop, display:
            outcome = migrate(request, source_uri=options.connect, watcher=display, stop=stop)
        _write_report(request, outcome)
    except MigrationError as error:
        if isinstance(error, (PlanRefused, RequestError)):
            error.exit_status = EXIT_REFUSED if fine else EXIT_FAILED
        display.refused(error)
        raise
    return exit_status(outcome, fine=fine)


def _write_report(request: MigrationRequest, outcome: Outcome) -> None:
    """--report FILE. The migration is over: whatever goes wrong with its report costs a warning."""
    if "report" not in request:
        return
    from pathlib import Path

    from virtmig.report.html import write_report
    from virtmig.report.records import find_record

    try:
        write_report(find_record(outcome.report_id or "-"), Path(request.text("report")))
    except Exception as error:
        kind = "" if isinstance(error, (OSError, MigrationError)) else f"{type(error).__name__}: "
        print(f"virtmig: warning: no report: {kind}{error}", file=sys.stderr)


def exit_status(outcome: Outcome, *, fine: bool) -> int:
    """virsh's 0 or 1, or the finer ones: 3 refused, 4 aborted, 5 the guest needs a person."""
    if outcome.status is Status.COMPLETED and outcome.guest in (Whereabouts.DESTINATION, Whereabouts.NEITHER):
        return EXIT_DONE
    if not fine:
        return EXIT_FAILED
    if outcome.guest not in (Whereabouts.SOURCE, Whereabouts.DESTINATION):
        return EXIT_ATTENTION
    if outcome.status is Status.ABORTED:
        return EXIT_ABORTED
    if outcome.status is Status.REFUSED:
        return EXIT_REFUSED
    return EXIT_FAILED


def run_watch(values: dict[str, Any], options: GlobalOptions) -> int:
    """Attach to a migration that anybody started, show it, and say where the guest is when it ends."""
    from virtmig.cli.display import make_display
    from virtmig.watch import watch

    mode = "rich" if sys.stderr.isatty() else "log"
    display = make_display("none" if options.quiet else mode)
    with display:
        return EXIT_DONE if watch(str(values["domain"]), source_uri=options.connect, watcher=display) else EXIT_FAILED


def run_migrate_setmaxdowntime(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        verbs.set_max_downtime(connection, values["domain"], values["downtime"])
    return EXIT_DONE


def run_migrate_getmaxdowntime(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        print(verbs.get_max_downtime(connection, values["domain"]))
    return EXIT_DONE


def run_migrate_setspeed(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        verbs.set_speed(connection, values["domain"], values["bandwidth"], postcopy=bool(values.get("postcopy")))
    return EXIT_DONE


def run_migrate_getspeed(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        print(verbs.get_speed(connection, values["domain"], postcopy=bool(values.get("postcopy"))))
    return EXIT_DONE


def run_migrate_compcache(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.job_info import capacity
    from virtmig.virt import verbs

    with _connected(options) as connection:
        size = verbs.compression_cache(connection, values["domain"], values.get("size"))
    print(f"Compression cache: {capacity(size)}")
    return EXIT_DONE


def run_migrate_postcopy(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        verbs.start_postcopy(connection, values["domain"])
    return EXIT_DONE


def run_domjobinfo(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.job_info import lines, raw_lines
    from virtmig.virt import verbs

    completed, any_stats = bool(values.get("completed")), bool(values.get("anystats"))
    if values.get("keep-completed") and not completed:
        raise RequestError("Option --completed is required by option --keep-completed", option="keep-completed")
    with _connected(options) as connection:
        stats = verbs.job_stats(
            connection, values["domain"], completed=completed, keep=bool(values.get("keep-completed"))
        )
    shown = raw_lines(stats) if values.get("rawstats") else lines(stats, completed=completed, any_stats=any_stats)
    print("\n".join(shown) + "\n")
    return EXIT_DONE


def run_domjobabort(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.virt import verbs

    with _connected(options) as connection:
        verbs.abort_job(connection, values["domain"], postcopy=bool(values.get("postcopy")))
    return EXIT_DONE


def run_receive(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.engine_commands import run_receive as run

    return run(values, quiet=options.quiet)


def run_send(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.engine_commands import run_send as run

    return run(values, quiet=options.quiet)


def run_inspect(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.inspect import run_inspect as run

    return run(values)


def run_show_xml(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.show_xml import run_show_xml as run

    return run(values, options)


def run_agent(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.agent_commands import run_agent as run

    return run(values, options)


def run_handshake(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.agent_commands import run_handshake as run

    return run(values, options)


def run_order(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.agent_commands import run_order as run

    return run(values, options)


def run_recover(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.agent_commands import run_recover as run

    return run(values, options)


def run_hooks(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.hooks_commands import run_hooks as run

    return run(values, options)


def run_list(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_list as run

    return run(values, options)


def run_show(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_show as run

    return run(values, options)


def run_logs(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_logs as run

    return run(values, options)


def run_explain(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_explain as run

    return run(values, options)


def run_compare(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_compare as run

    return run(values, options)


def run_replay(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_replay as run

    return run(values, options)


def run_report(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.report_commands import run_report as run

    return run(values, options)


def run_api(values: dict[str, Any], options: GlobalOptions) -> int:
    from virtmig.cli.api_commands import run_api as run

    return run(values, options)
