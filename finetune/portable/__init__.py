"""What the packages of all papers share, so that diffusers can load a model from its package without this project."""
