"""The base template, the style and the helper that the HTML reports of all stages share."""
