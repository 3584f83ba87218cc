"""`qwenvl serve`: an HTTP server in OpenAI's form, with the engine in a process of its own."""
