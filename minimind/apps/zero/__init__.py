"""`minimind zero`: one command from nothing to a chat model and a page that shows how it came about."""
