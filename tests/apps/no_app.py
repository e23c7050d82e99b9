"""A module without an application."""

app = "not an application"
