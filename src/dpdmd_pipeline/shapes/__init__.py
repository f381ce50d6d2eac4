"""The embedded world: captioned pictures whose truth is known exactly."""
