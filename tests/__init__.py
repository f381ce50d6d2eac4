"""A package, since some published ones install a `tests` of their own."""
