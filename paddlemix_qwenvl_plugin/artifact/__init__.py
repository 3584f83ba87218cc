"""Exported stages on disk: program inputs, manifest, parameter file, verification."""
