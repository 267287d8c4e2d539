"""From a trained network's weights to those of its padding-free form, by looking at unlabelled images."""
