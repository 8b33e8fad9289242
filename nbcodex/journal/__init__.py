"""The journal: one SQLite database in which no prompt and no answer is lost."""
