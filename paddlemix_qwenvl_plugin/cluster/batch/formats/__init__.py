"""Input formats: JSONL, Parquet, WebDataset and folders of images, each read as lines of JSON."""
