"""The face of Dreamscale: the command, the demo, local and cluster launching."""
