"""The command ``dreamscale doctor``: show which parts of Dreamscale work here, and what to do about the others."""
