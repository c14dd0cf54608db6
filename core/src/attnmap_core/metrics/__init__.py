"""Metrics: pure functions on arrays, which never see a model."""
