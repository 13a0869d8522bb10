"""The sharding job. First, Ray tasks read the recordings and cut windows. Then the windows are packed into shards."""
