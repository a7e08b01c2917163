"""Everything private of torch, Lightning and torchvision that the package relies on; imports nothing of the package."""
