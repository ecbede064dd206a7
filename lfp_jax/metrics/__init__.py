"""How good: rates with intervals, image distances, distances between sets of images."""
