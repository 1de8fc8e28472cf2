"""What belongs to the small models: worlds, weights, clips, and the recipes that made them."""
