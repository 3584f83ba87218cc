"""OpenAI's HTTP interface over a Service: chat completions, completions, models, tokenize."""
