"""One forward pass written down; nothing of the user's is changed."""
