"""The sharding job: a Ray task reads each recording into a part, and then the parts are packed into shards."""
