"""The monitor: all requests of a process, live."""
