"""The `dreamscale` command, the demo, and the programs that start training locally or on a cluster."""
