"""Image data sets, and augmentation in whole batches."""
