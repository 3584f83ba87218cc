"""A model that a server has, in OpenAI's form: what `qwenvl chat --url` and `qwenvl batch --url` ask."""
