"""What joins flowkit to other frameworks. Each part needs the package it is named after, and is imported by name."""
