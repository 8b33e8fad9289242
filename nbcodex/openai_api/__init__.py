"""Requests to OpenAI's API and compatible servers, and their answers: the sole user of its SDK."""
