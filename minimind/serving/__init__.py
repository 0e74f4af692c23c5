"""The OpenAI-compatible server and the web chat."""
