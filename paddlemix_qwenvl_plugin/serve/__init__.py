"""`qwenvl serve`: OpenAI-compatible HTTP server with the engine in a separate process."""
