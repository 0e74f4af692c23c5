"""Evaluation of models: perplexity by context length, and the benchmarks of lm-evaluation-harness."""
