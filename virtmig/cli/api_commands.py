"""`virtmig api`: the HTTP API, its page and metrics on one address."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from virtmig.cli.signals import stop_on_signals
from virtmig.errors import RequestError

if TYPE_CHECKING:
    from virtmig.cli.main import GlobalOptions


def run_api(values: dict[str, Any], options: GlobalOptions) -> int:
    """Serve until a signal; migrations that it has started go on. Raises RequestError without the extra `api`."""
    try:
        from virtmig.integrations.api.app import Api
        from virtmig.integrations.api.serving import Listening, parse_address
    except ImportError as error:
        if error.name is None or error.name.partition(".")[0] == "virtmig":
            raise
        raise RequestError(
            f"virtmig api needs {error.name}, which is not installed", hint="pip install 'virtmig[api]'"
        ) from None
    from virtmig.agent.config import load_config
    from virtmig.agent.logs import configure_logs
    from virtmig.engine.agents import runtime_folder
    from virtmig.integrations.api.jobs import Jobs
    from virtmig.report.records import records_folder

    folder = records_folder()
    if folder is None:
        raise RequestError(
            "records are switched off (VIRTMIG_RECORDS is empty), and the API shows migrations through them",
            hint="unset VIRTMIG_RECORDS, or set it to a folder",
        )
    config = load_config(Path(str(values["config"])) if values.get("config") else None)
    plain = bool(values.get("plain"))
    address = parse_address(str(values.get("listen") or f"unix:{runtime_folder() / 'api.sock'}"))
    configure_logs(config.log)
    api = Api(Jobs(folder.absolute()), source_uri=options.connect or "", readonly=options.readonly)
    with stop_on_signals(_Asked()), Listening(api.application(), address, config, plain=plain) as listening:
        if not options.quiet:
            print(f"virtmig api: {listening.address}{' (plain text)' if plain else ''}", file=sys.stderr, flush=True)
        listening.run()
    return 0


class _Asked:
    """uvicorn ends by itself at a signal and raises it once more when it has; that one must not end us."""

    def ask(self, what: str) -> None:
        pass
