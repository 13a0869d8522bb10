"""Store a DM-RE2I model as a diffusers pipeline with its own source files, which can be loaded without this project."""
