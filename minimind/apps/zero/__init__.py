"""`minimind zero`: one command from random weights to a chat model, with a report about the training."""
