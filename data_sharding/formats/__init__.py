"""Recordings of every maker behind one signal interface: headers, channels, readers."""
