"""Client of an OpenAI-compatible server, for `qwenvl chat --url` and `qwenvl batch --url`."""
