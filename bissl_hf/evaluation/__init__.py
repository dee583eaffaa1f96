"""Metrics, features and figures."""
