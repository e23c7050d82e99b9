"""The management command ``flowkit``."""
