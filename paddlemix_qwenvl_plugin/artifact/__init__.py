"""An exported stage on disk: its contract, its manifest, its parameter file."""
