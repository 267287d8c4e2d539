"""Whether a converted copy still is the network it was."""
