"""Downstream tasks: what is asked of an image, with the data, transforms and metrics for it."""
