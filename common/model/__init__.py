"""Models: created by name or from weights. Freezing, the optimizer and the layer table have modules of their own."""

from common.model.create import create_finetuned_model, create_model
