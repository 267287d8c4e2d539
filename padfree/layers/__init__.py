"""The new modules, and their description as data."""
