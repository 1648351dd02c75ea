"""Dataset formats, chat templates, token batches."""
