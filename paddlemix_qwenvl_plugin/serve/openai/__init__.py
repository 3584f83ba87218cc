"""OpenAI-compatible HTTP API over a Service: chat completions, completions, models, tokenize."""
