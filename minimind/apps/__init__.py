"""Programs for users: the chat in a terminal."""
