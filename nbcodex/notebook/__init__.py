"""Jupyter and IPython: magics, their options and prompts, and how requests are shown."""
