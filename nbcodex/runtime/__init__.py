"""Process-wide infrastructure: clock, event loop, files and forks. Knows nothing of requests."""
