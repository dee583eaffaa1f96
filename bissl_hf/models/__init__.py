"""Pretext models, and the model that holds both levels."""
