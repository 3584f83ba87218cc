"""Inputs and outputs of the model: images, prompts, tokenizer, boxes."""
