"""Data, evaluation and samples of the supervised and preference stages."""
