"""Commands killed at every file event, and what has to hold after."""
