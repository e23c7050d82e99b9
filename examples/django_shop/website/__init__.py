"""The Django project: its settings and addresses."""
