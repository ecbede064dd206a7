"""From an image back to the key it carries."""
