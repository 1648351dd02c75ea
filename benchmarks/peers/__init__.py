"""The libraries we measure against, each in a virtual environment of its own."""
