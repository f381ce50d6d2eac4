"""The line: one room per stage, no doors between rooms; `distill` is their sum."""
