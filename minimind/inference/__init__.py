"""Inference: the engine with continuous batching and a paged key/value cache."""
