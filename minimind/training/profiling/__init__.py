"""Profiles of training steps: recording, reading and drawing them."""
