"""The rate limiter: when each request may be sent, so that limits are used but not exceeded."""
