"""The monitor of all requests of this process: what it observes, shows and sends to its widget."""
