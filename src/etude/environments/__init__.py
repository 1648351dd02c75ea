"""Text environments, and the orchestrator that plays many episodes at once."""
