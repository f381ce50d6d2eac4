"""The embedded world: captioned pictures with exact ground truth."""
