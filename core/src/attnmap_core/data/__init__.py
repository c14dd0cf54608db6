"""Data sources, the synthetic default, photo reading, transforms and loaders."""
