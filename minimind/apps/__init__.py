"""Programs for users: the chat in a terminal, with tools; zero/ trains a chat model in one command."""
