"""Bytes in, values out: no file, clock, environment, network or hardware."""
