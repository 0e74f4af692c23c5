"""Helpers that know nothing of models: files, progress, display, spans, standard streams, the device."""
