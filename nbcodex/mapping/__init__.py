"""Many prompts: one template over many rows, answered in order and kept row by row."""
