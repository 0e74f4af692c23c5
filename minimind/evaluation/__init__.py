"""How good a model is: perplexity, and the tasks of lm-evaluation-harness."""
