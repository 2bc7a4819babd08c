"""`python -m hwlicense_simulators` is `hwlicense-simulate`."""

from hwlicense_simulators.cli import simulate

simulate(prog_name="hwlicense-simulate")
