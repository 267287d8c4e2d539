"""Other layers in the place of a network's convolutions, with values that keep what it has learnt."""
