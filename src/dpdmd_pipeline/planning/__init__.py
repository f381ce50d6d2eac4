"""Everything that is known before a run: identity, reuse, cost, memory, disk and checks; the words for errors."""
