"""What the API says, and how it is asked: the sole user of the OpenAI SDK."""
