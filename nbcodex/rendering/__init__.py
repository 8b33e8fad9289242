"""Pure functions that turn answers and figures into Markdown, HTML and text."""
