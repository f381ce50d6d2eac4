"""Images in, numbers out."""
