"""Drivers for hardware, one package each: the only importers of hardware libraries."""
