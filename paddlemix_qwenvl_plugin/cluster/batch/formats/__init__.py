"""Input formats of `qwenvl batch --ray`: JSONL, Parquet, WebDataset and folders of images."""
