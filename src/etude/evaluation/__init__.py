"""How well a model does, on any tasks, clean and under noise, and how sure that is."""
