"""``dreamscale retrieve``: find the image that a person saw among the images of a split, from EEG."""
