"""Inference: predictor, continuous batching, KV cache, sampling, executors."""
