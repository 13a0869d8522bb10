"""The base template, the style and the helper functions of all HTML reports."""
