"""Foreign models behind one door: loading, value heads, references, attention."""
