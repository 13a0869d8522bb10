"""The whole chain on data that it makes itself: corpus, sharding, training, images, report."""
