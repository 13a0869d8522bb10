"""The sharding job: a request, one task a recording, shards packed from their parts, on Ray."""
