"""The sharding job: Ray tasks read the recordings and cut windows, and then the windows are packed into shards."""
