"""Data that needs no download: made by rules, the same on every machine."""
