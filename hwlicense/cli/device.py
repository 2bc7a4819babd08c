"""`hwlicense device`: what the integrator and the operator do on the machine that runs the model."""

from __future__ import annotations

import click

from hwlicense.cli.commands import Lazy


@click.group(
    cls=Lazy,
    places={
        "check": "hwlicense.cli.checking:check",
        "doctor": "hwlicense.cli.diagnosing:doctor",
        "enroll": "hwlicense.cli.installing:enroll",
        "install": "hwlicense.cli.installing:install",
        "probe": "hwlicense.cli.diagnosing:probe",
        "status": "hwlicense.cli.status:status",
        "trust": "hwlicense.cli.installing:trust",
    },
)
def device() -> None:
    """The machine that runs the model: enroll, install, check, diagnose."""
