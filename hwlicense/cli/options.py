"""Options that several commands of `hwlicense device` take."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Callable

FILE = click.Path(path_type=Path, readable=False)


def place_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """--home and --state, which every device command takes."""
    home = click.option(
        "--home",
        type=FILE,
        metavar="DIR",
        help="The device's home.  [default: $HWLICENSE_HOME or the system's state folder]",
    )
    state = click.option(
        "--state", type=FILE, metavar="DIR", help="Where changes after installation go if the home is read-only."
    )
    return home(state(function))


tpm_option = click.option(
    "--tpm",
    metavar="TCTI",
    help="The TPM, such as device:/dev/tpmrm0 or swtpm:path=SOCKET.  [default: $HWLICENSE_TPM or as enrolled]",
)
token_option = click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="PKCS11_URI",
    help="A token with its module: pkcs11:token=NAME?module-path=/usr/lib/MODULE.so (RFC 7512).  "
    "[default: $HWLICENSE_TOKEN or as enrolled]",
)
pcrs_option = click.option(
    "--pcrs", multiple=True, metavar="BANK:N,N", help="PCRs of the platform state, such as sha256:7."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
