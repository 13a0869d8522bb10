"""The package of a DM-RE2I model as a diffusers pipeline that loads without this project, with its own source files."""
