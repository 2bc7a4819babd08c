"""`python -m hwlicense`."""

from hwlicense.cli import main

main()
