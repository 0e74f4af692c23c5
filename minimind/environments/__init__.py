"""Tools that a model calls, tasks that need them, and conversations in which both meet."""
