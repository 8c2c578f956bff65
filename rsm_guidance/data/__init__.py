"""What models are trained on: preferences, sizes of images, the order of batches; nothing here names a model."""
