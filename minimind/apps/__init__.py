"""Programs for people: the chat in a terminal."""
