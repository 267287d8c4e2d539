"""What padding does to a network: its footprint by arithmetic, its effect on features by measurement."""
