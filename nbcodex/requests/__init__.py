"""One request from its options to its ending: attempts, waits, conversation, schema and budget."""
