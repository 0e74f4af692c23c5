"""Tools and tasks that come with the program: deterministic, without a network."""
