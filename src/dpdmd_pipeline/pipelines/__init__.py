"""The stages, a package each; they do not import each other. `distill` is their sum."""
