"""Numbers from pictures and their features."""
