"""Everything that scores episodes."""
