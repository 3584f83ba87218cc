"""Read and convert model folders: config, checkpoint, adapters, shards, file formats."""
