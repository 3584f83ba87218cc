"""Reading and converting model folders: config, checkpoint, shards, file formats."""
